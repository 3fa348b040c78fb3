"""Blocks that several kernels are made of: LayerNorm's statistics, gelu_new, what follows a product."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def moments(xs, held, count, AXIS: tl.constexpr):
    """Of `count` numbers along AXIS: mean, sum of squares about it, and the mean of what rounding left of the mean.

    E[x^2] - E[x]^2 would lose digits where |mean| >> std.

    xs: float32 pieces of one shape. held: which of their elements count, one mask a piece, or None for all.
    """
    total = xs[0]
    for i in tl.static_range(1, len(xs)):
        total += xs[i]
    mean = tl.sum(total, AXIS) / count
    rest, squares = tl.zeros_like(total), tl.zeros_like(total)
    for i in tl.static_range(len(xs)):
        centred = xs[i] - tl.expand_dims(mean, AXIS)
        if held is not None:
            centred = tl.where(held[i], centred, 0.0)
        rest += centred
        squares += centred * centred
    return mean, tl.sum(squares, AXIS), tl.sum(rest, AXIS) / count


@triton.jit
def prefetch(ptrs):
    """Ask L2 for the lines of these addresses; no register waits for them."""
    asm: tl.constexpr = "prefetch.global.L2 [$1]; mov.b32 $0, 0;"
    tl.inline_asm_elementwise(asm, "=r,l", [ptrs], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def statistics(x_ptr, rows, mask, K, eps, BK: tl.constexpr):
    """LayerNorm's of rows [m] of K elements in memory: (base, mean - base, 1 / sqrt(variance + eps)).

    Chan's merge of chunks; about the mean of the first chunk, so that the merges round small numbers. A chunk is asked for
    while the one before it is summed up.
    """
    offs_k = tl.arange(0, BK)
    x_ptrs, mask = x_ptr + rows[:, None] * K + offs_k[None], mask[:, None]
    later = tl.load(x_ptrs, mask=mask & (offs_k < K)[None], other=0)
    base = tl.sum(later.to(tl.float32), 1) / tl.minimum(K, BK)
    mean, squares = tl.zeros_like(base), tl.zeros_like(base)
    for k in range(0, K, BK):
        held, x = (offs_k < K - k)[None], later.to(tl.float32)
        later = tl.load(x_ptrs + k + BK, mask=mask & (offs_k < K - k - BK)[None], other=0)
        count = tl.minimum(K - k, BK).to(tl.float32)
        centre, about, _ = moments((tl.where(held, x - base[:, None], 0.0),), (held,), count, 1)
        delta = centre - mean
        share = count / (k + count)
        mean += delta * share
        squares += about + delta * delta * (k * share)
    return base, mean, 1 / tl.sqrt(squares / K + eps)


@triton.jit
def exp(x, EXACT: tl.constexpr):
    """e to the power of x <= 0, by the GPU's approximate power of 2; EXACT: by its series, to an ulp. NaN stays NaN.

    2^n e^r, where n is whole and |r| <= ln(2) / 2, which two parts of ln(2) leave without an error.
    """
    if not EXACT:
        return tl.exp2(x * 1.4426950408889634)
    x = tl.where(x < -87.0, -87.0, x)  # less is no normal number; a maximum would hide NaN
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    r = tl.fma(n, 2.12194440e-4, tl.fma(n, -0.693359375, x))
    p = tl.fma(r, 1.0 / 5040, 1.0 / 720)
    p = tl.fma(r, p, 1.0 / 120)
    p = tl.fma(r, p, 1.0 / 24)
    p = tl.fma(r, p, 1.0 / 6)
    p = tl.fma(r, p, 0.5)
    p = tl.fma(r * r, p, r) + 1.0
    power = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where(x <= -87.0, 0.0, p * power)


@triton.jit
def gelu_new(x):
    """x / 2 * (1 + tanh(u)) = x * sigmoid(2 u), u = sqrt(2 / pi) * (x + 0.044715 x^3)."""
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def finish(acc, m, n, mask, N, out_ptr, stride_om, bias_ptr, residual_ptr, GELU: tl.constexpr):
    """Bias, GELU, residual and the store of sums: float32, of rows m and columns n of the result, in any order of axes."""
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0).to(tl.float32)
    if GELU:
        acc = gelu_new(acc)
    at = m.to(tl.int64) * stride_om + n
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + at, mask=mask, other=0).to(tl.float32)
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=mask)
