"""Causal attention of many new tokens, whole or in a sliding window, to a cache and to themselves.

Keys have one coordinate: the column j of a new key, and for the cached token t the column j = t - length + start that it
would have had. Then query column i sees key column j where i - window < j <= i, whichever memory the key lies in.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from gptneo_fast.errors import InputError

from . import launch


class Tile(NamedTuple):
    """Queries and keys of a block, warps, pipeline stages."""

    M: int
    N: int
    warps: int
    stages: int


# By (bytes of the dtype, padded head dim); set from ahead-of-time compiles, not from timings yet: no spills up to head dim
# 128 on sm_80 and sm_90. float32 multiplies on the plain cores, from registers, and so has small tiles.
TILES = {
    (2, 16): Tile(64, 64, 4, 3),
    (2, 32): Tile(64, 64, 4, 3),
    (2, 64): Tile(64, 64, 4, 3),  # 128 rows take 143 registers for 8 warps: one program an SM, and 192 of them at 125m
    (2, 128): Tile(128, 64, 8, 3),
    (2, 256): Tile(64, 32, 8, 2),
    (4, 16): Tile(16, 32, 4, 2),
    (4, 32): Tile(16, 32, 4, 2),
    (4, 64): Tile(16, 32, 8, 2),
    (4, 128): Tile(16, 32, 8, 2),
    (4, 256): Tile(16, 16, 8, 1),
}
MOST_HEAD_DIM = 256


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    starts: Tensor | None = None,
    ends: Tensor | None = None,
    k_cache: Tensor | None = None,
    v_cache: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """`reference.attention` in one kernel: online softmax over blocks of keys (Milakov and Gimelshein 2018; Dao 2023).

    A block of keys that no query of a program sees is never loaded; one that all of them see wholly is not masked. Scores
    and softmax are float32, without the 1/sqrt(D) factor; a query that sees nothing gives zeros.

    Args:
        q, k, v: [B, H, T, D], D of at most 256, neighbours in memory along D.
        window: keys a query sees, itself included; 0 for all.
        starts, ends: int32 [B], columns of left padding and one past the last key column; None for 0 and T.
        k_cache, v_cache: [B, H, R, D], token t in slot t mod R; given together with `lengths`, int32 [B], or None.

    Returns:
        [B, T, H * D], heads merged.

    Raises:
        InputError, SetupError: see `launch.check`; a head dim above 256.
    """
    past = k_cache is not None and v_cache is not None and lengths is not None
    if not past and (k_cache is not None or v_cache is not None or lengths is not None):
        raise InputError("attention: k_cache, v_cache and lengths belong together; give all three or none")
    launch.check("attention", q, q=q, k=k, v=v, **({"k_cache": k_cache, "v_cache": v_cache} if past else {}))
    B, H, T, D = q.shape
    launch.expect("attention", like=q, k=(k, (B, H, T, D)), v=(v, (B, H, T, D)))
    launch.expect("attention", like=q, starts=(starts, (B,)), ends=(ends, (B,)), lengths=(lengths, (B,)))
    if k_cache is not None:
        slots = (B, H, k_cache.shape[2], D)
        launch.expect("attention", like=q, k_cache=(k_cache, slots), v_cache=(v_cache, slots))
    if D > MOST_HEAD_DIM:
        raise InputError(f"attention: head dim {D} exceeds {MOST_HEAD_DIM}; use backend='reference'")
    y = launch.empty((B, T, H * D), q)
    BLOCK_D = max(16, launch.power_of_2(D))
    t = TILES[q.element_size(), BLOCK_D]
    blocks = launch.blocks(T, t.M)
    cache, R = None, 1
    if k_cache is not None:
        cache, R = (k_cache, v_cache, k_cache.stride()[:3], v_cache.stride()[:3]), k_cache.shape[2]
    launch.run(
        _attention_kernel, B * H * blocks, q,
        q, k, v, y, (q.stride()[:3], k.stride()[:3], v.stride()[:3]), cache, starts, ends, lengths, H, T, R, blocks,
        D=D, WINDOW=window, BLOCK_M=t.M, BLOCK_N=t.N, BLOCK_D=BLOCK_D, num_warps=t.warps, num_stages=t.stages,
    )  # fmt: skip
    return y


@triton.jit(do_not_specialize=["H", "T", "R", "blocks", "starts_ptr", "ends_ptr", "lengths_ptr"])
def _attention_kernel(
    q_ptr, k_ptr, v_ptr, y_ptr, strides, cache, starts_ptr, ends_ptr, lengths_ptr, H, T, R, blocks,
    D: tl.constexpr, WINDOW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """strides: of batch, head and column, of q, k and v. cache: k_cache, v_cache, strides of batch, head and slot of each."""
    strides_q, strides_k, strides_v = strides
    pid = tl.program_id(0)
    heads = tl.num_programs(0) // blocks  # B * H
    first = (blocks - 1 - pid // heads) * BLOCK_M  # the last queries see most: they go first
    b, h = (pid % heads // H).to(tl.int64), (pid % heads % H).to(tl.int64)
    start = 0
    end = T
    if starts_ptr is not None:
        start = tl.load(starts_ptr + b).to(tl.int32)
    if ends_ptr is not None:
        end = tl.minimum(tl.load(ends_ptr + b).to(tl.int32), T)
    offs_m, offs_d = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    q_ptrs = q_ptr + b * strides_q[0] + h * strides_q[1] + tl.minimum(offs_m, T - 1).to(tl.int64)[:, None] * strides_q[2]
    q = tl.load(q_ptrs + offs_d[None, :], mask=mask_d[None, :], other=0.0)  # [M, D]

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)  # of a row's scores so far
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if cache is not None:
        k_cache_ptr, v_cache_ptr, strides_kc, strides_vc = cache
        length = tl.load(lengths_ptr + b).to(tl.int32)
        k_ptrs = k_cache_ptr + b * strides_kc[0] + h * strides_kc[1] + offs_d[None, :]
        v_ptrs = v_cache_ptr + b * strides_vc[0] + h * strides_vc[1] + offs_d[None, :]
        acc, total, top = _over_keys(
            acc, total, top, q, k_ptrs, v_ptrs, strides_kc[2], strides_vc[2], offs_m, mask_d,
            first, start - tl.minimum(length, R), start, length - start, R, WINDOW, True, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    k_ptrs = k_ptr + b * strides_k[0] + h * strides_k[1] + offs_d[None, :]
    v_ptrs = v_ptr + b * strides_v[0] + h * strides_v[1] + offs_d[None, :]
    acc, total, top = _over_keys(
        acc, total, top, q, k_ptrs, v_ptrs, strides_k[2], strides_v[2], offs_m, mask_d,
        first, start, end, 0, R, WINDOW, False, BLOCK_M, BLOCK_N,
    )  # fmt: skip

    y = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    y_ptrs = y_ptr + ((b * T + offs_m) * H + h)[:, None] * D + offs_d[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=(offs_m < T)[:, None] & mask_d[None, :])


@triton.jit
def _over_keys(
    acc, total, top, q, k_ptrs, v_ptrs, stride_k, stride_v, offs_m, mask_d,
    first, begin, end, shift, R,
    WINDOW: tl.constexpr, RING: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Attend to the key columns begin ... end - 1 as far as the queries first ... first + BLOCK_M - 1 see them.

    Column j lies at index j, or (RING) in slot (j + shift) mod R. Blocks come in three runs: those that the window's edge
    may cut, those that every query sees whole, those that the diagonal or the end may cut.
    """
    end = tl.minimum(end, first + BLOCK_M)  # the last query sees its own column
    whole = begin  # from here on no window's edge
    if WINDOW > 0:
        begin = tl.maximum(begin, first - WINDOW + 1)
        whole = begin + tl.cdiv(tl.maximum(first + BLOCK_M - WINDOW - begin, 0), BLOCK_N) * BLOCK_N
    cut = whole + tl.maximum(tl.minimum(end, first + 1) - whole, 0) // BLOCK_N * BLOCK_N  # from here on the diagonal
    if WINDOW > 0:
        for j in range(begin, tl.minimum(whole, end), BLOCK_N):
            acc, total, top = over_block(
                acc, total, top, q, k_ptrs, v_ptrs, stride_k, stride_v, offs_m, mask_d,
                j, end, shift, R, WINDOW, RING, True, BLOCK_N,
            )  # fmt: skip
    for j in range(whole, cut, BLOCK_N):
        acc, total, top = over_block(
            acc, total, top, q, k_ptrs, v_ptrs, stride_k, stride_v, offs_m, mask_d,
            j, end, shift, R, WINDOW, RING, False, BLOCK_N,
        )  # fmt: skip
    for j in range(cut, end, BLOCK_N):
        acc, total, top = over_block(
            acc, total, top, q, k_ptrs, v_ptrs, stride_k, stride_v, offs_m, mask_d,
            j, end, shift, R, WINDOW, RING, True, BLOCK_N,
        )  # fmt: skip
    return acc, total, top


@triton.jit
def over_block(
    acc, total, top, q, k_ptrs, v_ptrs, stride_k, stride_v, offs_m, mask_d,
    j, end, shift, R,
    WINDOW: tl.constexpr, RING: tl.constexpr, MASKED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One step of online softmax, over the key columns j ... j + BLOCK_N - 1."""
    LOG2E: tl.constexpr = 1.4426950408889634
    offs_n = j + tl.arange(0, BLOCK_N)
    at = (offs_n + shift) % R if RING else offs_n  # never below zero: shift is the row's length less its start
    at = at.to(tl.int64)[:, None]
    mask = mask_d[None, :]
    if MASKED:
        mask = mask & (offs_n < end)[:, None]
    k = tl.load(k_ptrs + at * stride_k, mask=mask, other=0.0)  # [N, D]
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # [M, N]
    if MASKED:
        seen = (offs_n[None, :] <= offs_m[:, None]) & (offs_n < end)[None, :]
        if WINDOW > 0:
            seen = seen & (offs_n[None, :] > offs_m[:, None] - WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    base = new_top
    if MASKED:
        base = tl.where(new_top == float("-inf"), 0.0, new_top)  # a row that has seen nothing yet
    # Subtract, then go to base 2: in one multiply-add, large scores would lose digits and the winner's weight not be 1.
    weights = tl.exp2((scores - base[:, None]) * LOG2E)
    decay = tl.exp2((top - base) * LOG2E)
    total = total * decay + tl.sum(weights, 1)
    v = tl.load(v_ptrs + at * stride_v, mask=mask, other=0.0)
    acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return acc, total, new_top
