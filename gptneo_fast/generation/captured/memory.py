"""What a generation will need of the device's memory, told before anything is allocated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...errors import OutOfMemoryError
from ...network.cache import cache_bytes

_CHUNK = 2**20


def needed(config: Any, dtype: torch.dtype, rows: int, columns: int) -> int:
    """Bytes that `rows` texts of up to `columns` tokens need beside the weights: the cache, and the larger of what reading a
    prompt of that length and what a step holds at one time.

    Reading a prompt holds, of each token, the residual stream twice, q, k, v and the attention's result (6 C), or the
    residual stream twice and the MLP's inner layer (2 C + F); a step holds a row's logits three times in float32.
    """
    C, F, V = config.hidden_size, config.ffn_size, config.vocab_size
    prompt = rows * columns * max(6 * C, 2 * C + F) * dtype.itemsize
    step = 3 * rows * V * 4
    return cache_bytes(config, rows, columns, dtype) + max(prompt, step) + rows * (V + 8 * columns)


def free_bytes(device: torch.device) -> int:
    """Bytes that a CUDA device has left: the driver's, and what torch holds in reserve."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def check_memory(model: Any, rows: int, columns: int, make_room: Callable[[], None], free: int | None = None) -> None:
    """Refuse a request that cannot fit.

    Args:
        make_room: frees what is kept for later requests; called before giving up.
        free: bytes; None asks the device, and there is nothing to ask on a CPU.

    Raises:
        OutOfMemoryError: with the bytes needed and free, and the rows and the columns that would fit.
    """
    if free is None and model.device.type != "cuda":
        return
    config, dtype = model.config, model.dtype
    need = needed(config, dtype, rows, columns)
    left = free_bytes(model.device) if free is None else free
    if need <= left:
        return
    make_room()
    left = free_bytes(model.device) if free is None else free
    if need <= left:
        return
    fits = [n for n in range(rows, 0, -1) if needed(config, dtype, n, columns) <= left][:1]
    shorter = [n for n in range(columns, 0, -1) if needed(config, dtype, rows, n) <= left][:1]
    ways = [f"{fits[0]} rows of {columns} tokens"] if fits else []
    ways += [f"{rows} rows of {shorter[0]} tokens"] if shorter else []
    raise OutOfMemoryError(
        f"{rows} rows of {columns} tokens need {need / _CHUNK:.0f} MiB beside the weights and {model.device} has "
        f"{left / _CHUNK:.0f} MiB left; "
        + (f"{' or '.join(ways)} would fit" if ways else "not one row would fit")
        + ("" if dtype.itemsize == 2 else ", or dtype=torch.bfloat16")
    )
