"""Tiles of the prefill kernels: one table per kernel, by dtype class. Set from ahead-of-time compiles, not from timings yet.

Every row up to head dim 128 compiles without spills for sm_80 and sm_90; 16-bit rows have 64 rows or more for four warps,
as HGMMA wants. float32 multiplies on the plain cores (IEEE, no TF32), from registers, and so has small tiles of its own.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cache, cached_property

import torch

from . import launch


@dataclass(frozen=True)
class Tile:
    """What a kernel is compiled for: tile sizes by letter, warps of a program, stages of its pipeline."""

    M: int
    N: int
    K: int
    num_warps: int
    num_stages: int

    @cached_property
    def meta(self) -> dict[str, int]:
        """As keyword arguments of a launch."""
        fields = asdict(self)
        return {f"BLOCK_{k}" if len(k) == 1 else k: v for k, v in fields.items() if v}


_WORTH_IT = 0.8  # of the busiest SM's work: above it a smaller tile is not worth what it reads more; not measured yet
# Matrix products, from the largest tile. float32's are bound by its FMA units.
_LINEAR = {
    2: (Tile(128, 256, 64, 8, 3), Tile(128, 128, 64, 8, 3), Tile(64, 128, 64, 4, 4), Tile(64, 64, 64, 4, 4)),
    4: (Tile(128, 64, 16, 8, 2), Tile(64, 64, 16, 8, 2), Tile(32, 64, 16, 4, 2)),
}
# Queries and keys of a block by (bytes of the dtype, padded head dim); K stands for nothing here.
_ATTENTION = {
    (2, 16): Tile(64, 64, 0, 4, 3),
    (2, 32): Tile(64, 64, 0, 4, 3),
    (2, 64): Tile(64, 64, 0, 4, 3),  # 128 rows take 143 registers for 8 warps: one program an SM, and 192 of them at 125m
    (2, 128): Tile(128, 64, 0, 8, 3),
    (2, 256): Tile(64, 32, 0, 8, 2),
    (4, 16): Tile(16, 32, 0, 4, 2),
    (4, 32): Tile(16, 32, 0, 4, 2),
    (4, 64): Tile(16, 32, 0, 8, 2),
    (4, 128): Tile(16, 32, 0, 8, 2),
    (4, 256): Tile(16, 16, 0, 8, 1),
}
MOST_HEAD_DIM = 256


@cache
def linear(dtype: torch.dtype, M: int, N: int, multiprocessors: int) -> Tile:
    """The tile for M rows and N columns (of all the weights that one launch multiplies with).

    From the largest tile, which reads least per product, to a smaller one where that takes work off the busiest SM.
    """
    best, *smaller = _LINEAR[dtype.itemsize]
    for tile in smaller:
        if _busiest(tile, M, N, multiprocessors) <= _WORTH_IT * _busiest(best, M, N, multiprocessors):
            best = tile
    return best


def _busiest(tile: Tile, M: int, N: int, multiprocessors: int) -> int:
    """Elements that the SM with the most tiles computes."""
    tiles = launch.blocks(M, tile.M) * launch.blocks(N, tile.N)
    return launch.blocks(tiles, multiprocessors) * tile.M * tile.N


def attention(dtype: torch.dtype, D: int) -> Tile:
    """The tile for a head dim, which kernels pad to a power of two of 16 or more."""
    return _ATTENTION[dtype.itemsize, max(16, launch.power_of_2(D))]
