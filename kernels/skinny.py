"""A few rows times weights on tensor cores: the weights are the M operand of the dot and the rows its N, from 8 up.

A program owns BM rows of a weight and a share of K. SK slices of a tile are a batch of dots side by side, a warp each, so
that 16 rows of a weight keep four warps busy; one slice is a dot of two axes, which all warps share. Where that leaves SMs
idle, K is dealt out to `splits` programs, and the last to arrive adds up their parts, in the order of the splits.

Weights in few bits (`packed`) become floats in registers. In 4 bits a slice is a block of 64 numbers, 16 words of 16 bits: the
four places of these words are as many dots, with the columns of x that belong to each.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .append import Cache, into_slots
from .blocks import finish, prefetch, statistics
from .packed import BLOCK, Packed, Weight, in_bytes, number, scales_of_blocks
from .tickets import arrives_last, tickets

MOST_ROWS = 64  # more go to `gemm`; not timed yet
NORM_ROWS = 16  # up to here a program normalises its rows itself; for more, `layer_norm` has run before


class Tile(NamedTuple):
    """Weight rows of a program, slices of a tile and K of a slice, programs that share K, warps, pipeline stages.

    ahead: tiles, a power of two, that are asked for before the rows are normalised or waited for. Two in each of an SM's
    programs are what its share of the bandwidth brings meanwhile; the rows would queue behind more.
    """

    BM: int
    SK: int
    BK: int
    splits: int
    warps: int
    stages: int
    ahead: int = 2


# (kernel, K) in 16 bits, up to NORM_ROWS rows. No spills, weights 128 bits at a time. Those of 2048 and 8192 by whole steps of
# 1.3B on an H200, eight rows at a time; the others are not timed.
TILES = {
    ("qkv", 768): Tile(16, 4, 64, 1, 4, 3),
    ("norm_linear", 768): Tile(16, 4, 64, 1, 4, 3),
    ("linear_add", 768): Tile(16, 2, 32, 4, 2, 3),
    ("linear_add", 3072): Tile(16, 2, 64, 8, 2, 3),
    ("qkv", 2048): Tile(32, 4, 64, 1, 4, 4),
    ("norm_linear", 2048): Tile(32, 4, 64, 1, 4, 4),
    ("linear_add", 2048): Tile(32, 4, 64, 2, 4, 4),
    ("linear_add", 8192): Tile(32, 4, 64, 4, 4, 4),
    ("qkv", 2560): Tile(16, 4, 64, 1, 4, 3),
    ("norm_linear", 2560): Tile(16, 4, 64, 1, 4, 3),
    ("linear_add", 2560): Tile(16, 2, 64, 4, 2, 4),
    ("linear_add", 10240): Tile(16, 4, 64, 4, 4, 4),
}


PACKED = {  # (bits, bytes of x, whether there are more than NORM_ROWS); a slice of 4 bits is BLOCK numbers. Not yet timed.
    (4, 2, False): Tile(16, 4, BLOCK, 1, 4, 4),
    (4, 2, True): Tile(64, 1, BLOCK, 1, 4, 4),
    (4, 4, False): Tile(32, 4, BLOCK, 1, 8, 2),
    (4, 4, True): Tile(64, 1, BLOCK, 1, 4, 3),
    (8, 2, False): Tile(16, 4, BLOCK, 1, 4, 4),
    (8, 2, True): Tile(64, 1, BLOCK, 1, 4, 4),
    (8, 4, False): Tile(16, 2, BLOCK, 1, 4, 1),
    (8, 4, True): Tile(32, 1, 2 * BLOCK, 1, 8, 1),
}


def tile(kernel: str, M: int, N: int, K: int, itemsize: int, sms: int, bits: int = 0) -> Tile:
    """The row of the table; for other widths, more rows and packed weights one by rule: programs for every SM, whole tiles."""
    if bits:
        found = PACKED[bits, itemsize, M > NORM_ROWS]
    elif M > NORM_ROWS:
        found = Tile(64, 1, 128, 1, 4, 3) if itemsize == 2 else Tile(32, 1, 32, 1, 8, 3)
    elif itemsize == 4:
        found = Tile(16, 4, 32, 1, 8 if kernel == "linear_add" else 4, 1)  # four warps spill under triton 3.6
    elif (found := TILES.get((kernel, K), Tile(16, 4, 64, 1, 4, 3))).splits > 1:
        return found
    steps = max(1, K // (found.SK * found.BK))
    for splits in range(1, 9):  # at least two steps each
        if steps % splits == 0 and (splits == 1 or steps >= 2 * splits):
            found = found._replace(splits=splits)
            if launch.blocks(N, found.BM) * splits >= sms:
                break
    return found


@triton.jit(do_not_specialize=["M", "tiles_m", "tiles_n", "T", "R", "lengths_ptr", "starts_ptr"])
def skinny(
    x_ptr, norm, w_ptrs, scale_ptrs, bias_ptr, residual_ptr, out_ptr, cache, lengths_ptr, starts_ptr, part_ptr, ticket_ptr,
    M, N, K, blocks, tiles_m, tiles_n, splits, share, stride_om, T, R, GELU: tl.constexpr, BITS: tl.constexpr,
    GROUP: tl.constexpr, NB: tl.constexpr, BM: tl.constexpr, SK: tl.constexpr, BK: tl.constexpr, AHEAD: tl.constexpr,
    EVEN_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out = [residual +] [gelu](norm(x) @ w.T [+ bias]) for rows x [M, K]; w: [N, K]; a share of K is `share` columns.

    Grid: for each weight, each BM rows of it and each NB rows of x, `splits` programs. norm, cache: as in `gemv`. BITS: of a
    packed weight, whose rows have `blocks` blocks of 64 numbers and scales for each GROUP of them, or 0.
    """
    pid = tl.program_id(0)
    split, group = pid % splits, pid // splits
    pid_m, pid_n, third = group % tiles_m, group // tiles_m % tiles_n, 0  # what shares weights runs side by side
    w_ptr = w_ptrs[0]
    if BITS:
        scale_ptr = scale_ptrs[0]
    if cache is not None:
        third = group // tiles_m // tiles_n
        if third == 1:
            w_ptr = w_ptrs[1]
            if BITS:
                scale_ptr = scale_ptrs[1]
        elif third == 2:
            w_ptr = w_ptrs[2]
            if BITS:
                scale_ptr = scale_ptrs[2]
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    PER: tl.constexpr = 4 if BITS else 1  # numbers of a loaded element, which is a word of 16 or 32 bits where they are packed
    PLACES: tl.constexpr = 4 if BITS == 4 else 1
    row = blocks * (64 // PER) if BITS else K  # elements
    if BITS:
        w_ptr = w_ptr.to(tl.pointer_type(tl.int16 if BITS == 4 else tl.int32), bitcast=True)
    begin = split * share
    end = tl.minimum(begin + share, K)
    offs_n = pid_n * BM + tl.arange(0, BM)
    first_n = tl.minimum(offs_n, N - 1).to(tl.int64) * row  # rows past the end repeat the last one: loads need no mask
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    if AHEAD > 0 and (PDL or norm is not None):
        LINE: tl.constexpr = 1024 * PER // w_ptr.dtype.element_ty.primitive_bitwidth  # numbers of 128 bytes
        LINES: tl.constexpr = (AHEAD * SK * BK + LINE - 1) // LINE
        ahead = tl.minimum(begin + tl.arange(0, LINES) * LINE, end - 1) // PER
        prefetch(w_ptr + first_n[:, None] + ahead[None])
    if PDL:
        tl.extra.cuda.gdc_wait()
    rows = pid_m * NB + tl.arange(0, NB)
    mask_m = (rows < M)[:, None]  # [NB, 1]
    offs_m = rows.to(tl.int64)
    if norm is not None:
        gamma_ptr, beta_ptr, eps = norm
        CHUNK: tl.constexpr = 4096 // NB  # 32 numbers a thread of four warps
        base, mean, scale = statistics(x_ptr, offs_m, rows < M, K, eps, CHUNK)
        base, mean, scale = base[:, None], mean[:, None], scale[:, None]

    if SK == 1:  # a batch of one dot would be one warp's work, four times over (triton 3.6)
        offs_w, offs_k, offs_b = tl.arange(0, BK // PER), tl.arange(0, BK // PLACES), tl.arange(0, 1)
        acc = tl.zeros([BM, NB], tl.float32)
    else:
        offs_b = tl.arange(0, SK)[:, None]  # blocks
        offs_w = offs_b * (BK // PER) + tl.arange(0, BK // PER)[None]  # elements of w
        offs_k = offs_b * BK + tl.arange(0, BK // PLACES)[None]  # columns of x, of the first place
        acc = tl.zeros([SK, BM, NB], tl.float32)
    x_ptrs = x_ptr + offs_m[:, None] * K + tl.expand_dims(offs_k, -2)  # [SK, NB, BK], or without the first axis
    w_ptrs = w_ptr + first_n[:, None] + tl.expand_dims(offs_w, -2)  # [SK, BM, BK]
    if BITS == 4:
        groups = blocks * 64 // GROUP
        scale_ptrs = scale_ptr + tl.minimum(offs_n, N - 1).to(tl.int64) * groups  # [BM]
        ahead_low, ahead_high = scales_of_blocks(scale_ptrs, begin // 64 + offs_b, blocks, GROUP)
    for k in range(begin, end, SK * BK):
        at_w = k // 64 * (64 // PER) if BITS else k  # so written, the compiler sees that 16 divide it
        if EVEN_K:
            w = tl.load(w_ptrs + at_w, eviction_policy="evict_first")
        else:
            held_w = tl.expand_dims(offs_w < row - at_w, -2)
            w = tl.load(w_ptrs + at_w, mask=held_w, other=0, eviction_policy="evict_first")
        if BITS == 4:
            low, high = ahead_low, ahead_high
            ahead_low, ahead_high = scales_of_blocks(scale_ptrs, (k + SK * BK) // 64 + offs_b, blocks, GROUP)
        for p in tl.static_range(PLACES):
            at = k + 16 * p
            held = tl.expand_dims(offs_k < end - at, -2)
            x = tl.load(x_ptrs + at, mask=mask_m if EVEN_K else mask_m & held, other=0)
            if norm is not None:
                gamma = tl.expand_dims(tl.load(gamma_ptr + at + offs_k, mask=offs_k < end - at, other=0).to(tl.float32), -2)
                beta = tl.expand_dims(tl.load(beta_ptr + at + offs_k, mask=offs_k < end - at, other=0).to(tl.float32), -2)
                x = ((x.to(tl.float32) - base - mean) * scale * gamma + beta).to(dtype)
            if BITS == 4:
                y = (number(w.to(tl.int32), p, 4) * (low if p < 2 else high)).to(dtype)
            elif BITS == 8:
                y = in_bytes(w, dtype)
            else:
                y = w
            if SK == 1:
                acc = tl.dot(y, tl.trans(x), acc, input_precision="ieee")
            else:
                acc = tl.dot(y, tl.permute(x, (0, 2, 1)), acc, input_precision="ieee")
    total = acc if SK == 1 else tl.sum(acc, 0)  # [BM, NB]
    if BITS == 8:
        total *= tl.load(scale_ptr + offs_n, mask=offs_n < N, other=0)[:, None]

    mine = True
    if splits > 1:
        at = tl.arange(0, BM)[:, None] * NB + tl.arange(0, NB)[None]
        part_ptr += group.to(tl.int64) * splits * (BM * NB)
        tl.store(part_ptr + split * (BM * NB) + at, total)
        mine = arrives_last(ticket_ptr + group, splits)
        if mine:
            total = tl.zeros([BM, NB], tl.float32)
            for s in range(splits):
                total += tl.load(part_ptr + s * (BM * NB) + at, cache_modifier=".cg")
    if mine:
        n, m = offs_n[:, None], rows[None]
        if cache is None or third == 0:
            finish(total, m, n, (n < N) & (m < M), N, out_ptr, stride_om, bias_ptr, residual_ptr, GELU)
        else:
            into_slots(total, m, n, (n < N) & (m < M), third, cache, lengths_ptr, starts_ptr, T, R)


def run(
    kernel: str, x: Tensor, weights: tuple[Weight, ...], out: Tensor, *, norm: tuple[Tensor, Tensor, float] | None = None,
    bias: Tensor | None = None, residual: Tensor | None = None, gelu: bool = False, cache: Cache | None = None,
) -> None:  # fmt: skip
    """Rows x [M, K] through `skinny`; out [M, N] may have a row stride. Arguments as those of `gemv.run`, or packed weights."""
    (M, K), weight = x.shape, weights[0]
    N = weight.shape[0]
    values, scales = tuple(w.values if isinstance(w, Packed) else w for w in weights), None
    bits, group, blocks = 0, 0, None
    if isinstance(weight, Packed):
        scales = tuple(w.scales for w in weights if isinstance(w, Packed))
        bits, group, blocks = weight.bits, weight.group, weight.blocks
    t = tile(kernel, M, N * len(weights), K, x.element_size(), launch.multiprocessors(x), bits)
    NB = min(64, max(8, launch.power_of_2(M)))
    tiles_m, tiles_n = launch.blocks(M, NB), launch.blocks(N, t.BM)
    groups = tiles_m * tiles_n * len(weights)
    share = launch.blocks(K, t.splits * t.SK * t.BK) * t.SK * t.BK
    parts = launch.empty((groups * t.splits * t.BM * NB if t.splits > 1 else 1,), x, torch.float32)
    slots, lengths, starts, T, R = Cache.arguments(cache)
    launch.run(
        skinny, groups * t.splits, x,
        x, norm, values, scales, bias, residual, out, slots, lengths, starts, parts, tickets(groups, x.device),
        M, N, K, blocks, tiles_m, tiles_n, t.splits, share, out.stride(0), T, R, GELU=gelu, BITS=bits, GROUP=group,
        NB=NB, BM=t.BM, SK=t.SK, BK=t.BK, AHEAD=0 if launch.INTERPRETED else t.ahead, EVEN_K=K % (t.splits * t.SK * t.BK) == 0,
        num_warps=t.warps, num_stages=t.stages, **launch.chained(kernel, x),
    )  # fmt: skip
