"""The C++ extension that `csrc/` becomes: loaded at its first use, and where it cannot be used, why not.

An install makes as much of it as the machine can (setup.py) and leaves a report beside it. Nothing here raises because the
extension is missing: `why_not` and `why_not_on` say so, and `kv_append` is called only after they have given None.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import DeviceError, InputError
from ..forks import new_lock

LIBRARY = Path(__file__).parents[1] / "_csrc.so"
REPORT = Path(__file__).parents[1] / "_csrc.json"
_SHAPE_RULES: dict[str, Callable[..., Any]] = {
    "kv_append": lambda *_: None,
    "linear": lambda x, weight, *_: x.new_empty(*x.shape[:-1], weight.shape[0]),
    "dequantize": lambda *_: None,
    "large_pages": lambda like: [t.new_empty(t.shape) for t in like],
    "likeliest": lambda logits, *_: logits.new_empty(len(logits), dtype=torch.int64),
    "multinomial": lambda probabilities, *_: probabilities.new_empty(len(probabilities), dtype=torch.int64),
}
_LOADING = new_lock()
_TWIN = "on CUDA the Triton kernel stores keys and values"


def built() -> str:
    """What the install made of it and why not more, in words: `built for the CPU only: no nvcc in ...`."""
    try:
        return str(json.loads(REPORT.read_text())["line"])
    except (OSError, ValueError, KeyError, TypeError):
        return "not built: installed without running setup.py; `pip install .` builds it"


def why_not() -> str | None:
    """Load the library, once; None where that worked, else the reason."""
    with _LOADING:  # of two threads that come first, one would be told that its twin's registrations exist
        return _load()


@functools.cache
def _load() -> str | None:
    if not LIBRARY.is_file():
        return built()
    try:
        torch.ops.load_library(str(LIBRARY))
        for name, rule in _SHAPE_RULES.items():  # raises for an op that a library of older sources does not have
            torch.library.register_fake(f"gptneo_fast_csrc::{name}", rule)
    except (OSError, RuntimeError) as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]  # torch wraps what the loader says
        return f"cannot be used with torch {torch.__version__}: {reason}; install gptneo_fast again, with this torch in place"
    return None


@functools.cache
def why_not_on(device: torch.device) -> str | None:
    """Why the extension cannot serve tensors of a device (its driver, its architecture), or None where it can."""
    reason = why_not()
    if reason is None and device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        fault = torch.ops.gptneo_fast_csrc.cuda_fault(index)
        return f"not usable on cuda:{index}: {fault}" if fault else None
    if reason is None and device.type != "cpu":
        return f"it serves the CPU and CUDA, not {device.type}"
    return reason


def memory(like: Sequence[Tensor], device: torch.device | str) -> list[Tensor]:
    """Tensors without values, of the shapes and dtypes of these, to hold weights: on the CPU in pages of 2 MB where the system
    gives them, so that a decode step, which reads all weights, misses fewer translations of addresses."""
    if torch.device(device).type == "cpu" and why_not() is None:
        shapes = [torch.empty((), dtype=t.dtype, device="cpu").expand(t.shape) for t in like]  # what is on "meta" gives such
        made: list[Tensor] = torch.ops.gptneo_fast_csrc.large_pages.default(shapes)
        return made
    return [torch.empty(t.shape, dtype=t.dtype, device=device) for t in like]


def status() -> str:
    """One line for `gptneo-fast info`: what was built and whether it loads, and where it does not serve CUDA what does."""
    reason = why_not()
    if reason is not None:
        return f"{reason}; {_TWIN}"
    if not torch.ops.gptneo_fast_csrc.has_cuda():
        return f"{built()}; {_TWIN}"
    faults = [why_not_on(torch.device("cuda", i)) for i in range(torch.cuda.device_count())]
    return "; ".join([built(), *(f"{fault}, where {_TWIN}" for fault in faults if fault)])


def likeliest(logits: Tensor) -> Tensor:
    """The first of the largest logits of each row, or -1 where one of them is not finite: int64 [B] of logits [B, V]."""
    if logits.device.type == "cpu" and logits.dtype is torch.float32 and logits.stride(1) == 1 and why_not() is None:
        found: Tensor = torch.ops.gptneo_fast_csrc.likeliest(logits)
        return found
    return torch.where(logits.isfinite().all(-1), logits.argmax(-1), -1)


def kv_append(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, lengths: Tensor, starts: Tensor | None = None) -> None:
    """`reference.kv_append` in one pass (one launch on CUDA, on torch's current stream), the cache changed in place.

    Args:
        k_cache, v_cache: [B, H, R, D] float16, bfloat16, float32 or float64, of any strides without overlap.
        k, v: [B, H, T, D] of the same dtype, of any strides; rows that start at multiples of 16 bytes are fastest.
        lengths: int32 [B], tokens held before. starts: int32 [B] or None.

    Raises:
        InputError: a shape, dtype, device or stride does not fit, or on the CPU a length or start is out of range; nothing
            has been written. On CUDA, where looking at these values would wait for the device, such a row is left alone.
        DeviceError: the launch failed.
    """
    try:
        torch.ops.gptneo_fast_csrc.kv_append(k_cache, v_cache, k, v, lengths, starts)
    except RuntimeError as error:
        text = str(error).partition("\nException raised from")[0]
        if text.startswith("kv_append: "):
            raise InputError(text) from None
        raise DeviceError(text) from error
