"""The one way to allocate, check and launch: guards of arguments, the tensor's own device, its current stream.

Launchers call these through the module (`launch.run`), so that a test may count or watch them in one place.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from gptneo_fast.errors import InputError, SetupError

INTERPRETED = bool(triton.knobs.runtime.interpret)  # what `triton.jit` makes of the kernels of this process
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INTERPRETED_DTYPES = (torch.float32, torch.float16)  # the interpreter multiplies bfloat16 matrices silently wrong
_SMS_OF_NO_DEVICE = 132
early: ContextVar[bool] = ContextVar("early", default=False)


def run(kernel: Any, programs: int, like: Tensor, *args: Any, **meta: Any) -> None:
    """Run `kernel` on a 1-D grid, on the device of `like` and its current stream; never waits for it."""
    if programs == 0:
        return
    if like.is_cuda and like.device.index != torch.cuda.current_device():
        with torch.cuda.device(like.device):
            kernel[(programs,)](*args, **meta)
    else:
        kernel[(programs,)](*args, **meta)


@contextmanager
def early_launches() -> Iterator[None]:
    """Within it, kernels of a decode step start before the kernel before them has ended: programmatic dependent launch.

    Each waits by itself before it touches an activation or the cache; until then it may load weights.
    """
    token = early.set(True)
    try:
        yield
    finally:
        early.reset(token)


def chained(op: str, like: Tensor) -> dict[str, bool]:
    """Options of a launch, for a kernel with a PDL constexpr: whether it starts early.

    Raises:
        SetupError: within `early_launches`, on a device that cannot do it.
    """
    if not early.get():
        return {"PDL": False}
    if INTERPRETED or torch.cuda.get_device_capability(like.device) < (9, 0):
        where = "in the interpreter" if INTERPRETED else f"on {torch.cuda.get_device_name(like.device)}"
        raise SetupError(f"{op}: early_launch=True needs a GPU of capability 9.0 and is not possible {where}; leave it off")
    return {"PDL": True, "launch_pdl": True}


def empty(shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Contiguous memory for a result, on the device of `like` and, unless told otherwise, in its dtype."""
    return like.new_empty(shape, dtype=dtype)


def check(op: str, like: Tensor, **tensors: object) -> None:
    """Refuse what the kernels of an op cannot read; alignment needs no check: triton compiles for what it meets.

    Args:
        op: its name, for the message.
        like: decides dtype and device.
        tensors: by argument name; each needs that dtype and device and neighbours in memory along its last axis. What is
            no tensor is passed over: None, and weights in few bits, see `packed.of`.

    Raises:
        InputError: another dtype, device or stride.
        SetupError: tensors that are not on CUDA, or bfloat16, in the interpreter.
    """
    if like.dtype not in DTYPES:
        raise InputError(f"{op}: kernels take float32, float16 and bfloat16, not {like.dtype}; use backend='reference'")
    if INTERPRETED and like.dtype not in INTERPRETED_DTYPES:
        raise SetupError(f"{op}: the Triton interpreter computes {like.dtype} wrong; use float32, float16 or a GPU")
    if not (INTERPRETED or like.is_cuda):
        raise SetupError(
            f"{op}: kernels run on CUDA tensors, not on {like.device}; move the model, use backend='reference', or set "
            "TRITON_INTERPRET=1 before Python starts"
        )
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            continue  # none, or a weight in few bits, which `packed.of` has looked at
        if x.dtype != like.dtype or x.device != like.device:
            raise InputError(f"{op}: {name} is {x.dtype} on {x.device}, expected {like.dtype} on {like.device}")
        if x.stride(-1) != 1 and x.shape[-1] != 1:
            raise InputError(f"{op}: the last axis of {name} has stride {x.stride(-1)}, expected 1; call .contiguous()")


def expect(op: str, *, like: Tensor, **tensors: tuple[Any, tuple[int, ...]]) -> None:
    """Refuse shapes that a kernel would read past, and integers per row that it could not read.

    Args:
        op: its name, for the message. like: decides the device.
        tensors: by argument name, each with the shape that it must have; whole numbers must be contiguous.

    Raises:
        InputError: another shape; whole numbers with gaps, or on another device.
    """
    for name, (x, shape) in tensors.items():
        if x is None:
            continue
        if tuple(x.shape) != shape:
            raise InputError(f"{op}: {name} has shape {list(x.shape)}, expected {list(shape)}")
        if isinstance(x, Tensor) and not x.dtype.is_floating_point and (x.device != like.device or not x.is_contiguous()):
            raise InputError(f"{op}: {name} must be contiguous on {like.device}; it is on {x.device}, strides {x.stride()}")


def blocks(n: int, size: int) -> int:
    """How many blocks of `size` cover n. Triton's `cdiv` is written for kernels: called from the host it costs 10 us."""
    return -(-n // size)


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least n, for n from 1; see `blocks`."""
    return 1 << (n - 1).bit_length()


def as_rows(x: Tensor) -> Tensor:
    """[..., C] as contiguous rows [M, C]; a copy only where x is not contiguous already."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def multiprocessors(like: Tensor) -> int:
    """How many SMs share the programs of a grid; for tensors on no GPU, as many as an H100 has."""
    return _multiprocessors(like.device) if like.is_cuda else _SMS_OF_NO_DEVICE


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def forget_devices() -> None:
    """Ask torch again: for a process that changes what it answers."""
    _multiprocessors.cache_clear()
