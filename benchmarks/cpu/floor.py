"""What memory allows: how fast this machine reads, measured in the run, and what a decode step would take at that rate."""

from __future__ import annotations

import functools
import math
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.models import DTYPES
from gptneo_fast.ops import cpu, extension
from gptneo_fast.ops.quantized import Format
from gptneo_fast.tools.bench import step_bytes

BYTES, PASSES = 1 << 30, 4


@functools.cache
def _data() -> Tensor:
    """A gibibyte of float32, [N, 3072], in the pages that weights have."""
    return extension.memory([torch.empty(BYTES // 4 // 3072, 3072, device="meta")], "cpu")[0].fill_(1)


def read_rate(threads: int) -> float:
    """Bytes per second: the best pass over a gibibyte of torch's sum and of a product, ours where it is built."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    data = _data()
    x = torch.ones(1, data.shape[1])
    product = F.linear if extension.why_not() else cpu.linear
    best = 0.0
    for read in (data.sum, functools.partial(product, x, data)):
        for _ in range(PASSES):
            begin = time.perf_counter()
            read()
            best = max(best, BYTES / (time.perf_counter() - begin))
    torch.set_num_threads(before)
    return best


def read_by_step(config: Any, dtype: str, context: int) -> int:
    """Bytes that a decode step of one text must read.

    Args:
        config: of the model. dtype: "fp32", ...; "int8" or "int4" for weights of layers and head, all else in bfloat16.
        context: tokens in the cache.
    """
    if dtype in DTYPES:
        return step_bytes(config, DTYPES[dtype], 1, context)
    C, F, how = config.hidden_size, config.ffn_size, Format.of(dtype)
    layers = [(C, C)] * 4 + [(F, C), (C, F)]
    weights = layers * config.num_layers + [(config.vocab_size, C)]
    kept = [math.prod(s) * d.itemsize for N, K in weights for s, d in zip(how.shapes(N, K), how.dtypes, strict=True)]
    return step_bytes(config, torch.bfloat16, 1, context) + sum(kept) - 2 * sum(N * K for N, K in weights)


def beside_floor(config: Any, dtype: str, context: int, step: float, rate: float) -> dict[str, float]:
    """What a row says of a decode step of one text.

    Args:
        config, dtype, context: as for `read_by_step`. step: seconds that were measured. rate: bytes per second.
    """
    floor = read_by_step(config, dtype, context) / rate
    return {"step_ms": step * 1e3, "floor_ms": floor * 1e3, "share_of_floor": floor / step, "read_gb_per_s": rate / 1e9}
