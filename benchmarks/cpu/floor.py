"""What memory allows: how fast this machine reads, measured in the run, and what a decode step would take at that rate."""

from __future__ import annotations

import functools
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gptneo_fast.ops import cpu, extension
from gptneo_fast.tools.bench import step_bytes

BYTES, PASSES = 1 << 30, 4


@functools.cache
def _data() -> Tensor:
    """A gibibyte of float32, [N, 4096]."""
    return torch.ones(BYTES // 4 // 4096, 4096)


def read_rate(threads: int) -> float:
    """Bytes per second: the best pass over a gibibyte of torch's sum and of a product, ours where it is built."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    data, x = _data(), torch.ones(1, 4096)
    product = F.linear if extension.why_not() else cpu.linear
    best = 0.0
    for read in (data.sum, functools.partial(product, x, data)):
        for _ in range(PASSES):
            begin = time.perf_counter()
            read()
            best = max(best, BYTES / (time.perf_counter() - begin))
    torch.set_num_threads(before)
    return best


def beside_floor(config: Any, dtype: torch.dtype, context: int, step: float, rate: float) -> dict[str, float]:
    """What a row says of a decode step of one text.

    Args:
        config: of the model; dtype: of its weights, keys and values. context: tokens in the cache.
        step: seconds that were measured. rate: bytes per second.
    """
    floor = step_bytes(config, dtype, 1, context) / rate
    return {"step_ms": step * 1e3, "floor_ms": floor * 1e3, "share_of_floor": floor / step, "read_gb_per_s": rate / 1e9}
