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


class Tile(NamedTuple):
    """rows x BK a load, `granules` of rows a program, `ahead` of them in flight before the wait, warps."""

    rows: int
    BK: int
    granules: int
    ahead: int
    warps: int


# (kernel, K) in 16 bits. Each leaves at most 3.1 % of 132 SMs idle in its last wave, spills nothing on sm_80 and sm_90, and
# keeps 32 KB of weights or all there are in flight an SM (tests/kernels/test_kernels_decode_tiles.py). Not yet timed.
TILES = {
    ("qkv", 768): Tile(2, 256, 3, 3, 2),
    ("qkv", 2048): Tile(4, 1024, 4, 2, 4),
    ("qkv", 2560): Tile(4, 512, 5, 2, 4),
    ("norm_linear", 768): Tile(8, 256, 1, 1, 4),
    ("norm_linear", 2048): Tile(4, 1024, 4, 2, 4),
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


@triton.jit
def gelu_new(x):
    """x / 2 * (1 + tanh(u)) = x * sigmoid(2 u), u = sqrt(2 / pi) * (x + 0.044715 x^3)."""
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def finish(
    acc, rows, cols, mask, N, third, out_ptr, bias_ptr, residual_ptr, k_cache_ptr, v_cache_ptr, lengths_ptr, starts_ptr,
    stride_kb, stride_kh, stride_kr, stride_vb, stride_vh, stride_vr, stride_om, T, R, D, GELU: tl.constexpr,
):  # fmt: skip
    """Bias, GELU, residual, and the way out: acc [n, m] float32 of weight rows `rows` [n, 1] and input rows `cols` [1, m].

    With a k_cache, `third` says whether these are rows of q, k or v; k and v go into the slots of their tokens.
    """
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + rows, mask=rows < N, other=0).to(tl.float32)
    if GELU:
        acc = gelu_new(acc)
    at = cols.to(tl.int64) * stride_om + rows
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + at, mask=mask, other=0).to(tl.float32)
    if k_cache_ptr is None or third == 0:
        tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        b, t = cols // T, cols % T
        token = tl.load(lengths_ptr + b, mask=mask, other=0) + t  # [n or 1, m]
        mask = mask & (t >= T - R)  # the newest R columns: a later one overwrites what is older
        if starts_ptr is not None:
            start = tl.load(starts_ptr + b, mask=mask, other=0)
            token -= start
            mask = mask & (t >= start)
        slot, h, d = (token % R).to(tl.int64), (rows // D).to(tl.int64), rows % D
        b = b.to(tl.int64)
        if third == 1:
            at = b * stride_kb + h * stride_kh + slot * stride_kr + d
            tl.store(k_cache_ptr + at, acc.to(k_cache_ptr.dtype.element_ty), mask=mask)
        else:
            at = b * stride_vb + h * stride_vh + slot * stride_vr + d
            tl.store(v_cache_ptr + at, acc.to(v_cache_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["programs", "zero", "R", "lengths_ptr", "starts_ptr"])
def gemv(
    x_ptr, gamma_ptr, beta_ptr, w_ptr, wk_ptr, wv_ptr, bias_ptr, residual_ptr, out_ptr, k_cache_ptr, v_cache_ptr,
    lengths_ptr, starts_ptr, K, N, programs, granules, zero, eps, stride_kb, stride_kh, stride_kr, stride_vb, stride_vh,
    stride_vr, R, D, GELU: tl.constexpr, ROWS: tl.constexpr, BK: tl.constexpr, CHUNKS: tl.constexpr, AHEAD: tl.constexpr,
    PACKED: tl.constexpr, EVEN_K: tl.constexpr, EVEN_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out = [residual +] [gelu](norm(x) @ w.T [+ bias]) for one row x [K]; w: [N, K].

    With a k_cache the weights are three and `programs` work on each; q goes to out, k and v to the slots of the token.
    AHEAD granules are in flight at a time. `zero` is 0, which the compiler does not know.
    """
    dtype: tl.constexpr = w_ptr.dtype.element_ty
    pid, third = tl.program_id(0), 0
    if k_cache_ptr is not None:
        third = pid // programs
        pid = pid % programs
        if third == 1:
            w_ptr = wk_ptr
        elif third == 2:
            w_ptr = wv_ptr
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

    xs = ()  # float32 [WIDTH], even and odd columns in turn where they are packed
    gate = tl.zeros([WIDTH], tl.int32)
    for c in tl.static_range(CHUNKS):
        offs = c * WIDTH + offs_k
        x = raw(x_ptr, offs, offs < words, PACKED, not EVEN_K, False)
        xs = xs + (low(x, dtype, PACKED),)
        if PACKED:
            xs = xs + (high(x, dtype),)
            gate |= x
    gate &= zero  # zero, but who computes with it has the whole row: else ptxas unpacks weights before it asks for the row
    if gamma_ptr is not None:
        total = tl.zeros([WIDTH], tl.float32)
        for i in tl.static_range(CHUNKS * PER):
            total += xs[i]
        mean = tl.sum(total, 0) / K
        total, squares = tl.zeros([WIDTH], tl.float32), tl.zeros([WIDTH], tl.float32)
        for i in tl.static_range(CHUNKS * PER):
            centred = xs[i] - mean
            if not EVEN_K:
                centred = tl.where((i // PER) * WIDTH + offs_k < words, centred, 0.0)
            total += centred
            squares += centred * centred
        rest = tl.sum(total, 0) / K  # what rounding left of the mean: it counts where |mean| >> std
        scale = 1 / tl.sqrt(tl.sum(squares, 0) / K - rest * rest + eps)
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
            w = ws[c] ^ gate[None] if PACKED and gamma_ptr is None else ws[c]
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
        now = (offs_n + g * ROWS)[:, None]
        finish(
            tl.sum(acc, 1)[:, None], now, tl.zeros([1, 1], tl.int32), now < N, N, third, out_ptr, bias_ptr, residual_ptr,
            k_cache_ptr, v_cache_ptr, lengths_ptr, starts_ptr, stride_kb, stride_kh, stride_kr, stride_vb, stride_vh,
            stride_vr, 0, 1, R, D, GELU,
        )  # fmt: skip


class Cache(NamedTuple):
    """Where k and v go: k_cache and v_cache [B, H, R, D], lengths int32 [B], starts int32 [B] or None; T columns a row."""

    k: Tensor
    v: Tensor
    lengths: Tensor
    starts: Tensor | None
    T: int

    @staticmethod
    def tensors(cache: Cache | None) -> tuple[Tensor | None, ...]:
        return cache[:4] if cache else (None,) * 4

    @staticmethod
    def strides(cache: Cache | None) -> tuple[int, ...]:
        return (*cache.k.stride()[:3], *cache.v.stride()[:3]) if cache else (0,) * 6

    @staticmethod
    def sizes(cache: Cache | None) -> tuple[int, int, int]:
        """T, R, D."""
        return (cache.T, cache.k.shape[2], cache.k.shape[3]) if cache else (1, 1, 1)


def run(
    kernel: str, x: Tensor, weights: tuple[Tensor, ...], out: Tensor, *, norm: tuple[Tensor, Tensor] | None = None,
    eps: float = 0.0, bias: Tensor | None = None, residual: Tensor | None = None, gelu: bool = False,
    cache: Cache | None = None,
) -> None:  # fmt: skip
    """One row through `gemv`.

    Args:
        kernel: whose row of the tile table: qkv, norm_linear, linear_add or lm_head.
        x: contiguous, K elements. weights: one contiguous [N, K], or q, k and v. out: N elements (of q).
        norm: gamma and beta [K]. bias: [N]. residual: contiguous, N elements.
        cache: takes k and v.
    """
    N, K = weights[0].shape
    t = tile(kernel, K, x.element_size())
    programs = launch.blocks(N, t.rows * t.granules)
    read = (x, *(norm or ()), *weights)
    packed = x.element_size() == 2 and all(y.storage_offset() % 2 == 0 for y in read) and K % 2 == 0
    gamma, beta = norm or (None, None)
    w = weights if len(weights) == 3 else (weights[0], None, None)
    launch.run(
        gemv, programs * len(weights), x,
        x, gamma, beta, *w, bias, residual, out, *Cache.tensors(cache), K, N, programs, t.granules, 0, eps,
        *Cache.strides(cache), *Cache.sizes(cache)[1:], GELU=gelu, ROWS=t.rows, BK=t.BK, CHUNKS=launch.blocks(K, t.BK),
        AHEAD=t.ahead, PACKED=packed, EVEN_K=K % t.BK == 0, EVEN_N=N % (t.rows * t.granules) == 0,
        num_warps=t.warps, **launch.chained(kernel, x),
    )  # fmt: skip
