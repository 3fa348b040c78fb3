"""One row times weights: LayerNorm or not, one weight or q, k and v, and what follows a linear layer, on CUDA cores.

A program owns ROWS * granules rows of the weight. A granule is ROWS whole rows, read as CHUNKS tiles [ROWS, BK], of
which AHEAD granules are asked for before anything else; the row x, normalised again by every program, stays in registers.
16-bit elements are read two at a time as int32 and taken apart by shift and mask after the activations have been asked
for: with 16-bit loads ptxas moves the conversion up, and the activations queue behind the weights.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .append import Cache, into_slots
from .blocks import finish, moments


class Tile(NamedTuple):
    """rows x BK a load, `granules` of rows a program, `ahead` of them in flight before the wait, warps."""

    rows: int
    BK: int
    granules: int
    ahead: int
    warps: int


# (kernel, K) in 16 bits. What takes several waves leaves at most 3.1 % of 132 SMs idle in its last one; each spills nothing on
# sm_80 and sm_90, and keeps 32 KB of weights or all there are in flight an SM (tests/kernels/test_kernels_decode_tiles.py).
# Those of 2048 and 8192 are the fastest that whole steps of 1.3B showed on an H200 (benchmarks/NOTES.md); others are not timed.
TILES = {
    ("qkv", 768): Tile(2, 256, 3, 3, 2),
    ("qkv", 2048): Tile(8, 1024, 4, 1, 8),
    ("qkv", 2560): Tile(4, 512, 5, 2, 4),
    ("norm_linear", 768): Tile(8, 256, 1, 1, 4),
    ("norm_linear", 2048): Tile(8, 1024, 4, 1, 8),
    ("norm_linear", 2560): Tile(4, 512, 4, 2, 8),
    ("linear_add", 768): Tile(2, 256, 1, 1, 1),
    ("linear_add", 2048): Tile(2, 512, 1, 1, 2),
    ("linear_add", 2560): Tile(4, 512, 1, 1, 4),
    ("linear_add", 3072): Tile(2, 1024, 1, 1, 4),
    ("linear_add", 8192): Tile(2, 1024, 1, 1, 4),
    ("linear_add", 10240): Tile(2, 1024, 1, 1, 4),
    ("lm_head", 768): Tile(8, 256, 2, 2, 4),
    ("lm_head", 2048): Tile(4, 1024, 4, 2, 4),
    ("lm_head", 2560): Tile(4, 512, 4, 2, 8),
}


def tile(kernel: str, K: int, itemsize: int) -> Tile:
    """The row of the table; other widths take the widest power of two that divides K, or a masked one."""
    if (found := TILES.get((kernel, K))) is None:
        divisor = min(K & -K, 1024)
        BK = divisor if divisor >= 64 else min(launch.power_of_2(K), 1024)
        found = Tile(max(4, min(16, 1024 // BK)), BK, 1, 1, 4 if BK >= 512 else 1)
    if itemsize == 4:  # float32: the same bytes a tile
        found = found._replace(rows=found.rows // 2, granules=found.granules * 2)
    return found


@triton.jit
def raw(ptr, offs, mask, PACKED: tl.constexpr, MASKED: tl.constexpr, WEIGHT: tl.constexpr):
    """What stands at `offs`, as it stands there; PACKED: offsets of pairs of 16-bit elements, which come as int32."""
    at = (ptr.to(tl.pointer_type(tl.int32), bitcast=True) if PACKED else ptr) + offs
    policy: tl.constexpr = "evict_first" if WEIGHT else ""  # weights are read once, activations by every program
    if MASKED:
        x = tl.load(at, mask=mask, other=0, eviction_policy=policy)
    else:
        x = tl.load(at, eviction_policy=policy)
    return x


@triton.jit
def low(x, dtype: tl.constexpr, PACKED: tl.constexpr):
    """The elements of even columns in float32, or all where they are not packed."""
    if not PACKED:
        y = x.to(tl.float32)
    elif dtype == tl.bfloat16:
        y = (x << 16).to(tl.float32, bitcast=True)
    else:
        y = (x & 0xFFFF).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    return y


@triton.jit
def high(x, dtype: tl.constexpr):
    """The elements of odd columns in float32."""
    if dtype == tl.bfloat16:
        y = (x & -65536).to(tl.float32, bitcast=True)
    else:
        y = (x >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    return y


@triton.jit(do_not_specialize=["zero", "R", "lengths_ptr", "starts_ptr"])
def gemv(
    x_ptr, norm, w_ptrs, bias_ptr, residual_ptr, out_ptr, cache, lengths_ptr, starts_ptr, K, N, granules, zero, R,
    GELU: tl.constexpr, ROWS: tl.constexpr, BK: tl.constexpr, CHUNKS: tl.constexpr, AHEAD: tl.constexpr, PACKED: tl.constexpr,
    EVEN_K: tl.constexpr, EVEN_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out = [residual +] [gelu](norm(x) @ w.T [+ bias]) for one row x [K]; w: [N, K].

    norm: gamma [K], beta [K] and eps, or None. With a cache, see `into_slots`, the weights are three: q goes to out, k and v
    to the slots of the token. AHEAD granules are in flight at a time. `zero` is 0, which the compiler does not know.
    """
    w_ptr = w_ptrs[0]
    dtype: tl.constexpr = w_ptr.dtype.element_ty
    pid, third = tl.program_id(0), 0
    if cache is not None:
        programs = tl.num_programs(0) // 3
        third = pid // programs
        pid = pid % programs
        if third == 1:
            w_ptr = w_ptrs[1]
        elif third == 2:
            w_ptr = w_ptrs[2]
    PER: tl.constexpr = 2 if PACKED else 1  # elements of a loaded word
    WIDTH: tl.constexpr = BK // PER
    offs_k = tl.arange(0, WIDTH)
    first = pid * granules * ROWS
    offs_n = first + tl.arange(0, ROWS)
    limit = tl.minimum(first + granules * ROWS, N)
    words = K // PER

    ws = ()
    for g in tl.static_range(AHEAD):
        rows = offs_n + g * ROWS
        for c in tl.static_range(CHUNKS):
            offs = c * WIDTH + offs_k
            mask = (rows < limit)[:, None] & (offs < words)[None]
            ws = ws + (
                raw(w_ptr, rows.to(tl.int64)[:, None] * words + offs[None], mask, PACKED, not EVEN_N or not EVEN_K, True),
            )
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()

    xs, held = (), ()  # float32 [WIDTH], even and odd columns in turn where they are packed
    gate = tl.zeros([WIDTH], tl.int32)
    for c in tl.static_range(CHUNKS):
        offs = c * WIDTH + offs_k
        x = raw(x_ptr, offs, offs < words, PACKED, not EVEN_K, False)
        xs, held = xs + (low(x, dtype, PACKED),), held + (offs < words,)
        if PACKED:
            xs, held = xs + (high(x, dtype),), held + (offs < words,)
            gate |= x
    gate &= zero  # zero, but who computes with it has the whole row: else ptxas unpacks weights before it asks for the row
    if norm is not None:
        gamma_ptr, beta_ptr, eps = norm
        mean, squares, rest = moments(xs, None if EVEN_K else held, K, 0)
        scale = 1 / tl.sqrt(squares / K - rest * rest + eps)
        ys = ()
        for c in tl.static_range(CHUNKS):
            offs = c * WIDTH + offs_k
            gamma = raw(gamma_ptr, offs, offs < words, PACKED, not EVEN_K, False)
            beta = raw(beta_ptr, offs, offs < words, PACKED, not EVEN_K, False)
            ys = ys + ((xs[c * PER] - mean - rest) * scale * low(gamma, dtype, PACKED) + low(beta, dtype, PACKED),)
            if PACKED:
                ys = ys + ((xs[c * PER + 1] - mean - rest) * scale * high(gamma, dtype) + high(beta, dtype),)
        xs = ys

    for g in tl.range(0, granules, loop_unroll_factor=1):
        acc = tl.zeros([ROWS, WIDTH], tl.float32)
        for c in tl.static_range(CHUNKS):
            w = ws[c] ^ gate[None] if PACKED and norm is None else ws[c]
            acc += low(w, dtype, PACKED) * xs[c * PER][None]
            if PACKED:
                acc += high(w, dtype) * xs[c * PER + 1][None]
        later = offs_n + (g + AHEAD) * ROWS
        new = ()
        for c in tl.static_range(CHUNKS):
            offs = c * WIDTH + offs_k
            mask = (later < limit)[:, None] & (offs < words)[None]
            new = new + (raw(w_ptr, later.to(tl.int64)[:, None] * words + offs[None], mask, PACKED, True, True),)
        ws = ws[CHUNKS:] + new
        n, m = (offs_n + g * ROWS)[:, None], tl.zeros([1, 1], tl.int32)
        if cache is None or third == 0:
            finish(tl.sum(acc, 1)[:, None], m, n, n < N, N, out_ptr, 0, bias_ptr, residual_ptr, GELU)
        else:
            into_slots(tl.sum(acc, 1)[:, None], m, n, n < N, third, cache, lengths_ptr, starts_ptr, 1, R)


def run(
    kernel: str, x: Tensor, weights: tuple[Tensor, ...], out: Tensor, *, norm: tuple[Tensor, Tensor, float] | None = None,
    bias: Tensor | None = None, residual: Tensor | None = None, gelu: bool = False, cache: Cache | None = None,
) -> None:  # fmt: skip
    """One row through `gemv`.

    Args:
        kernel: whose row of the tile table: qkv, norm_linear, linear_add or lm_head.
        x: contiguous, K elements. weights: one contiguous [N, K], or q, k and v. out: N elements (of q).
        norm: gamma [K], beta [K] and eps. bias: [N]. residual: contiguous, N elements.
        cache: takes k and v.
    """
    N, K = weights[0].shape
    t = tile(kernel, K, x.element_size())
    programs = launch.blocks(N, t.rows * t.granules)
    read = (x, *(norm[:2] if norm else ()), *weights)
    packed = x.element_size() == 2 and all(y.storage_offset() % 2 == 0 for y in read) and K % 2 == 0
    slots, lengths, starts, _, R = Cache.arguments(cache)
    launch.run(
        gemv, programs * len(weights), x,
        x, norm, weights, bias, residual, out, slots, lengths, starts, K, N, t.granules, 0, R,
        GELU=gelu, ROWS=t.rows, BK=t.BK, CHUNKS=launch.blocks(K, t.BK), AHEAD=t.ahead, PACKED=packed, EVEN_K=K % t.BK == 0,
        EVEN_N=N % (t.rows * t.granules) == 0, num_warps=t.warps, **launch.chained(kernel, x),
    )  # fmt: skip
