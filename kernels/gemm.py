"""Many rows times weights: one weight or q, k and v, and what follows a linear layer, on tensor cores.

A norm before it is a kernel of its own: within this one every column tile would redo the statistics of its rows.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .blocks import finish
from .packed import BLOCK, Packed, Weight, in_bytes, in_nibbles, scales_of_blocks, unpacked

MOST_PACKED_ROWS = 512  # for more a packed weight is unpacked before; by what both cost to compute and to read, not timed


class Tile(NamedTuple):
    """Rows, columns and K of a tile, warps, pipeline stages."""

    M: int
    N: int
    K: int
    warps: int
    stages: int


# By bytes of the dtype, from the largest tile; set from ahead-of-time compiles, not from timings yet: no spills on sm_80 and
# sm_90, in 16 bits 64 rows or more for four warps, as HGMMA wants. float32 multiplies on the plain cores (IEEE, no TF32), from
# registers, and is bound by their FMA units.
TILES = {
    2: (Tile(128, 256, 64, 8, 3), Tile(128, 128, 64, 8, 3), Tile(64, 128, 64, 4, 4), Tile(64, 64, 64, 4, 4)),
    4: (Tile(128, 64, 16, 8, 2), Tile(64, 64, 16, 8, 2), Tile(32, 64, 16, 4, 2)),
}
PACKED = {  # as TILES, of weights in few bits: a block of K at a time, which goes through registers
    2: (Tile(128, 128, BLOCK, 8, 3), Tile(64, 128, BLOCK, 4, 3), Tile(64, 64, BLOCK, 4, 4)),
    4: (Tile(32, 128, BLOCK, 8, 1),),
}
_WORTH_IT = 0.8  # of the busiest SM's work: above it a smaller tile is not worth what it reads more; not measured yet
_GROUP_M = 8  # row tiles that run side by side and share the tiles of the weight in L2


@cache
def tile(dtype: torch.dtype, M: int, N: int, multiprocessors: int, packed: bool = False) -> Tile:
    """The tile for M rows and N columns (of all the weights that one launch multiplies with, which may be packed).

    From the largest tile, which reads least per product, to a smaller one where that takes work off the busiest SM.
    """
    best, *smaller = (PACKED if packed else TILES)[dtype.itemsize]
    for other in smaller:
        if _busiest(other, M, N, multiprocessors) <= _WORTH_IT * _busiest(best, M, N, multiprocessors):
            best = other
    return best


def _busiest(t: Tile, M: int, N: int, multiprocessors: int) -> int:
    """Elements that the SM with the most tiles computes."""
    tiles = launch.blocks(M, t.M) * launch.blocks(N, t.N)
    return launch.blocks(tiles, multiprocessors) * t.M * t.N


def stays_packed(weight: Weight, M: int) -> bool:
    """Whether `gemm` reads a weight in few bits, and does not have it unpacked, for M rows."""
    return isinstance(weight, Packed) and M <= MOST_PACKED_ROWS


@triton.jit(do_not_specialize=["M"])
def gemm(
    x_ptr, w_ptrs, scale_ptrs, bias_ptr, residual_ptr, out_ptrs, M, N, K, blocks, GELU: tl.constexpr, BITS: tl.constexpr,
    GROUP: tl.constexpr, EVEN_K: tl.constexpr, GROUP_M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out = [residual +] [gelu](x @ w.T [+ bias]) for rows x [M, K], one w [N, K] or three, as many outs [M, N].

    BITS: of packed weights, whose rows have `blocks` blocks of 64 numbers and scales for each GROUP of them, or 0.
    """
    pid = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = GROUP_M * tiles_n * len(w_ptrs)  # programs of GROUP_M row tiles
    first_m = pid // group * GROUP_M
    size_m = tl.minimum(tiles_m - first_m, GROUP_M)
    pid_m = first_m + pid % group % size_m
    pid_n = pid % group // size_m
    w_ptr, out_ptr = w_ptrs[0], out_ptrs[0]
    if BITS:
        scale_ptr = scale_ptrs[0]
    if len(w_ptrs) == 3:
        third = pid_n // tiles_n
        if third == 1:
            w_ptr, out_ptr = w_ptrs[1], out_ptrs[1]
            if BITS:
                scale_ptr = scale_ptrs[1]
        if third == 2:
            w_ptr, out_ptr = w_ptrs[2], out_ptrs[2]
            if BITS:
                scale_ptr = scale_ptrs[2]
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    PER: tl.constexpr = 4 if BITS else 1  # numbers of a loaded element, which is a word of 16 or 32 bits where they are packed
    row = blocks * (64 // PER) if BITS else K  # elements
    if BITS:
        w_ptr = w_ptr.to(tl.pointer_type(tl.int16 if BITS == 4 else tl.int32), bitcast=True)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    # Rows past the edges repeat the last one, so that loads need no mask; only the store leaves them out.
    x_at = x_ptr + tl.minimum(offs_m, M - 1).to(tl.int64)[:, None] * K + offs_k[None, :]  # [M, K]
    first_n = tl.minimum(offs_n, N - 1).to(tl.int64)
    w_at = w_ptr + first_n[:, None] * row + tl.arange(0, BLOCK_K // PER)[None, :]  # [N, K / PER]

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, K, BLOCK_K):
        held = offs_k[None, :] < K - k
        x = tl.load(x_at + k) if EVEN_K else tl.load(x_at + k, mask=held, other=0.0)
        if BITS:  # whole blocks, which a row is padded to
            y = tl.load(w_at + k // 64 * (64 // PER))
            if BITS == 8:
                w = in_bytes(y, dtype)
            else:
                at = scale_ptr + first_n * (blocks * 64 // GROUP)
                block = k // 64 + tl.arange(0, BLOCK_K // 64)
                low, high = scales_of_blocks(at[:, None], block[None, :], blocks, GROUP)
                w = in_nibbles(y, low, high, dtype)
        elif EVEN_K:
            w = tl.load(w_at + k)
        else:
            w = tl.load(w_at + k, mask=held, other=0.0)
        acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
    if BITS == 8:
        acc *= tl.load(scale_ptr + offs_n, mask=offs_n < N, other=0)[None, :]

    m = offs_m[:, None]
    if BLOCK_N > 128:  # in halves: a residual as wide as the sums would not fit in the registers beside them
        HALF: tl.constexpr = BLOCK_N // 2
        first, second = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, HALF)), (0, 2, 1)))
        n = (pid_n % tiles_n * BLOCK_N + tl.arange(0, HALF))[None, :]
        finish(first, m, n, (m < M) & (n < N), N, out_ptr, N, bias_ptr, residual_ptr, GELU)
        n += HALF
        finish(second, m, n, (m < M) & (n < N), N, out_ptr, N, bias_ptr, residual_ptr, GELU)
    else:
        n = offs_n[None, :]
        finish(acc, m, n, (m < M) & (n < N), N, out_ptr, N, bias_ptr, residual_ptr, GELU)


def run(
    rows: Tensor, weights: tuple[Weight, ...], outs: tuple[Tensor, ...], *, bias: Tensor | None = None,
    residual: Tensor | None = None, gelu: bool = False,
) -> None:  # fmt: skip
    """Rows through `gemm`.

    Args:
        rows: contiguous [M, K]. weights: one or three of [N, K], or packed in one format. outs: as many, contiguous
            [M, N].
        bias: [N]. residual: contiguous [M, N].
    """
    (M, K), N = rows.shape, weights[0].shape[0]
    bits, group, blocks, scales = 0, 0, None, None
    if isinstance(weight := weights[0], Packed) and stays_packed(weight, M):
        scales = tuple(w.scales for w in weights if isinstance(w, Packed))
        bits, group, blocks = weight.bits, weight.group, weight.blocks
    else:
        weights = tuple(unpacked(w, rows) for w in weights)
    values = tuple(w.values if isinstance(w, Packed) else w for w in weights)
    t = tile(rows.dtype, M, N * len(weights), launch.multiprocessors(rows), bits > 0)
    launch.run(
        gemm, launch.blocks(M, t.M) * launch.blocks(N, t.N) * len(weights), rows,
        rows, values, scales, bias, residual, outs, M, N, K, blocks, GELU=gelu, BITS=bits, GROUP=group, EVEN_K=K % t.K == 0,
        GROUP_M=_GROUP_M, BLOCK_M=t.M, BLOCK_N=t.N, BLOCK_K=t.K, num_warps=t.warps, num_stages=t.stages,
    )  # fmt: skip
