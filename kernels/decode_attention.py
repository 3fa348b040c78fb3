"""Attention of a few new tokens to a cache that holds them already: split along the keys, merged by the last program.

The unit of work is a tile of BT queries of one head. Its visible keys are the tokens [lo, hi), at most window + BT - 1 of
them in a local layer, and are dealt out in splits of SPLIT tokens: a number that knows nothing of the batch, so that a row
gives the same bits in any company. Where a window is one split there is nothing to merge, and no ticket. Lengths come from
device memory; programs beyond the last split end at once. Token t is read from slot t mod R.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .blocks import exp
from .tickets import arrives_last, tickets


class Tile(NamedTuple):
    """Queries of a tile, keys of a load, loads of a split, warps, pipeline stages."""

    BT: int
    BS: int
    steps: int
    warps: int
    stages: int


# One query, by bytes of the dtype, for head dims up to 64; wider ones have twice the warps. A split is 256 keys, all that a
# local layer of the released models sees, so that these merge nothing. Between what one row wants (short splits: more programs)
# and 64 do (32 keys of 512 take 5.5 ms of a step of 1.3B where this takes 6.3): one tile must do for all, see above.
ONE = {2: Tile(1, 64, 4, 4, 1), 4: Tile(1, 32, 8, 4, 1)}


def tile(T: int, D: int, itemsize: int) -> Tile:
    """One query works on CUDA cores; more take the tensor cores. The batch has no say, see above."""
    wide = D > 64
    if T == 1:
        found = ONE[itemsize]
        return found._replace(warps=found.warps * (2 if wide else 1))
    if itemsize == 4:
        return Tile(16, 32, 8, 8 if wide else 4, 1)
    return Tile(16, 64, 4, 4, 2) if T <= 16 else Tile(64, 64, 8, 8 if wide else 4, 2)


@triton.jit
def _absorb(
    q, m, total, acc, k_ptr, v_ptr, token, hi, query, window, R, D, stride_kr, stride_vr, offs_d,
    BT: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr, WHOLE_D: tl.constexpr,
):  # fmt: skip
    """Online softmax over the keys `token` [BS]: m and total [BT] running maximum and sum, acc [BT, BD] weighted values."""
    slot = (token % R).to(tl.int64)[:, None]
    mask = (token < hi)[:, None] if WHOLE_D else (token < hi)[:, None] & (offs_d < D)[None]
    k = tl.load(k_ptr + slot * stride_kr + offs_d[None], mask=mask, other=0)  # [BS, BD]
    v = tl.load(v_ptr + slot * stride_vr + offs_d[None], mask=mask, other=0)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    visible = (token[None] <= query[:, None]) & (token < hi)[None]
    if window > 0:
        visible = visible & (token[None] > query[:, None] - window)
    scores = tl.where(visible, scores, float("-inf"))
    top = tl.maximum(m, tl.max(scores, 1))
    base = tl.where(top == float("-inf"), 0.0, top)  # a row that has seen nothing yet
    p = tl.exp2((scores - base[:, None]) * 1.4426950408889634)
    fade = tl.exp2((m - base) * 1.4426950408889634)
    total = total * fade + tl.sum(p, 1)
    return top, total, acc * fade[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")


@triton.jit
def _rows(ptr, at, end, R, D, stride, BD: tl.constexpr, BS: tl.constexpr, WHOLE_D: tl.constexpr):
    """Keys or values of the BS tokens from `at` on, of those before `end`, [BS, BD], as they stand in memory."""
    lane, offs_d = tl.arange(0, BS), tl.arange(0, BD)
    slot = at % R + lane  # below 2 R where it counts: no more than R tokens are held
    slot = tl.where(slot >= R, slot - R, slot).to(tl.int64)
    mask = (at + lane < end)[:, None] if WHOLE_D else (at + lane < end)[:, None] & (offs_d < D)[None]
    return tl.load(ptr + slot[:, None] * stride + offs_d[None], mask=mask, other=0)


@triton.jit
def _one(q, k_ptr, v_ptr, begin, end, R, D, stride_kr, stride_vr, BD: tl.constexpr, BS: tl.constexpr, WHOLE_D: tl.constexpr):
    """One query q [BD] and the keys from `begin` to `end`, all of which it sees: maximum [1], sum [1], weighted values [1, BD].

    Each of BS lanes of keys has a softmax of its own, so that no step waits for threads to exchange anything; the next keys
    and values are on their way meanwhile.
    """
    EXACT: tl.constexpr = k_ptr.dtype.element_ty == tl.float32
    lane = tl.arange(0, BS)
    m, total = tl.full([BS], float("-inf"), tl.float32), tl.zeros([BS], tl.float32)
    acc = tl.zeros([BS, BD], tl.float32)
    q = q.to(tl.float32)[None]
    next_k = _rows(k_ptr, begin, end, R, D, stride_kr, BD, BS, WHOLE_D)
    next_v = _rows(v_ptr, begin, end, R, D, stride_vr, BD, BS, WHOLE_D)
    for at in tl.range(begin, end, BS, loop_unroll_factor=1):
        k, v = next_k, next_v
        next_k = _rows(k_ptr, at + BS, end, R, D, stride_kr, BD, BS, WHOLE_D)
        next_v = _rows(v_ptr, at + BS, end, R, D, stride_vr, BD, BS, WHOLE_D)
        scores = tl.where(at + lane < end, tl.sum(k.to(tl.float32) * q, 1), float("-inf"))
        top = tl.maximum(m, scores)
        base = tl.where(top == float("-inf"), 0.0, top)  # a lane that has seen nothing
        p, fade = exp(scores - base, EXACT), exp(m - base, EXACT)
        m, total = top, total * fade + p
        acc = acc * fade[:, None] + v.to(tl.float32) * p[:, None]
    top = tl.max(m, 0)
    weight = exp(m - tl.where(top == float("-inf"), 0.0, top), EXACT)
    total, acc = tl.sum(total * weight, 0), tl.sum(acc * weight[:, None], 0)
    return tl.full([1], top, tl.float32), tl.full([1], total, tl.float32), acc[None]


@triton.jit
def _merge(part_ptr, stat_ptr, splits, BT: tl.constexpr, BD: tl.constexpr, AT_ONCE: tl.constexpr, EXACT: tl.constexpr):
    """The sum of all parts of a tile, in the order of the splits whoever arrived first. Returns total [BT] and acc [BT, BD]."""
    offs_t, offs_d, offs_s = tl.arange(0, BT), tl.arange(0, BD), tl.arange(0, AT_ONCE)
    m, total = tl.full([BT], float("-inf"), tl.float32), tl.zeros([BT], tl.float32)
    acc = tl.zeros([BT, BD], tl.float32)
    for s in range(0, splits, AT_ONCE):
        row = (s + offs_s)[:, None] * BT + offs_t[None]  # [AT_ONCE, BT]
        held = (s + offs_s < splits)[:, None]
        stat = stat_ptr + (s + offs_s)[:, None] * (2 * BT) + offs_t[None]
        m_s = tl.load(stat, mask=held, other=float("-inf"), cache_modifier=".cg")
        l_s = tl.load(stat + BT, mask=held, other=0, cache_modifier=".cg")
        part = tl.load(
            part_ptr + row[:, :, None] * BD + offs_d[None, None], mask=held[:, :, None], other=0, cache_modifier=".cg"
        )
        top = tl.maximum(m, tl.max(m_s, 0))
        base = tl.where(top == float("-inf"), 0.0, top)
        fade, weight = exp(m - base, EXACT), exp(m_s - base[None], EXACT)
        m, total = top, total * fade + tl.sum(l_s * weight, 0)
        acc = acc * fade[:, None] + tl.sum(part * weight[:, :, None], 0)
    return total, acc


@triton.jit(do_not_specialize=["H", "T", "R", "window", "most", "lengths_ptr", "starts_ptr"])
def attend(
    q_ptr, k_ptr, v_ptr, strides, lengths_ptr, starts_ptr, out_ptr, part_ptr, stat_ptr, ticket_ptr, H, T, R, D, window, most,
    BT: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr,
    WHOLE_D: tl.constexpr, AT_ONCE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A split of the keys of one tile of queries; grid: B * H * tiles of T tiles, each of `most` splits.

    strides: of batch, head and column or slot, of q, k and v.
    """
    strides_q, strides_k, strides_v = strides
    tiles_t = tl.cdiv(T, BT)
    item, split = tl.program_id(0) // most, tl.program_id(0) % most
    b, h, c = item // tiles_t // H, item // tiles_t % H, item % tiles_t * BT
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    first = tl.load(lengths_ptr + b)  # token of column 0
    if starts_ptr is not None:
        first -= tl.load(starts_ptr + b)
    hi = first + tl.minimum(c + BT, T)
    lo = tl.maximum(first + T - R, 0)  # what the cache still holds
    if window > 0:
        lo = tl.maximum(lo, first + c - window + 1)
    SPLIT: tl.constexpr = BS * STEPS
    splits = tl.maximum(tl.cdiv(hi - lo, SPLIT), 1)
    if split >= splits:
        return

    offs_t, offs_d = c + tl.arange(0, BT), tl.arange(0, BD)
    b64, h64 = b.to(tl.int64), h.to(tl.int64)
    q_at = q_ptr + b64 * strides_q[0] + h64 * strides_q[1] + offs_t.to(tl.int64)[:, None] * strides_q[2] + offs_d[None]
    q = tl.load(q_at, mask=(offs_t < T)[:, None] & (offs_d < D)[None], other=0)  # [BT, BD]
    k_ptr += b64 * strides_k[0] + h64 * strides_k[1]
    v_ptr += b64 * strides_v[0] + h64 * strides_v[1]
    lo += split * SPLIT
    end = tl.minimum(lo + SPLIT, hi)
    if BT == 1:
        m, total, acc = _one(
            tl.reshape(q, [BD]), k_ptr, v_ptr, lo, end, R, D, strides_k[2], strides_v[2], BD, BS, WHOLE_D,
        )  # fmt: skip
    else:
        m, total = tl.full([BT], float("-inf"), tl.float32), tl.zeros([BT], tl.float32)
        acc = tl.zeros([BT, BD], tl.float32)
        for token in tl.range(lo, end, BS, num_stages=STAGES):
            m, total, acc = _absorb(
                q, m, total, acc, k_ptr, v_ptr, token + tl.arange(0, BS), hi, first + offs_t, window, R, D, strides_k[2],
                strides_v[2], offs_d, BT, BD, BS, WHOLE_D,
            )  # fmt: skip

    part_ptr += item.to(tl.int64) * most * BT * BD
    stat_ptr += item.to(tl.int64) * most * (2 * BT)
    mine = True
    if splits > 1:
        rows = tl.arange(0, BT)
        tl.store(part_ptr + (split * BT + rows)[:, None] * BD + offs_d[None], acc)
        tl.store(stat_ptr + split * (2 * BT) + rows, m)
        tl.store(stat_ptr + split * (2 * BT) + BT + rows, total)
        mine = arrives_last(ticket_ptr + item, splits)
        if mine:
            total, acc = _merge(part_ptr, stat_ptr, splits, BT, BD, AT_ONCE, q_ptr.dtype.element_ty == tl.float32)
    if mine:
        out = tl.div_rn(acc, tl.where(total == 0, 1.0, total)[:, None])
        at = (b64 * T + offs_t)[:, None] * (H * D) + h * D + offs_d[None]
        tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=(offs_t < T)[:, None] & (offs_d < D)[None])


def decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, window: int, starts: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention of T new tokens that the cache already holds, without the 1/sqrt(D) factor, scores in float32.

    Args:
        q: [B, H, T, D].
        k_cache, v_cache: [B, H, R, D]; a view of the first slots will do while the cache has not wrapped.
        lengths: int32 [B], tokens held before the T new ones.
        window: keys a query sees; 0 for all.
        starts: int32 [B], columns of left padding; None for none.

    Returns:
        [B, T, H * D]

    Raises:
        InputError, SetupError: see `launch.check`.
    """
    launch.check("decode_attention", q, k_cache=k_cache, v_cache=v_cache)
    B, H, T, D = q.shape
    R = k_cache.shape[2]
    t = tile(T, D, q.element_size())
    out = launch.empty((B, T, H * D), q)
    tiles = B * H * launch.blocks(T, t.BT)
    visible = min(R, window + min(T, t.BT) - 1) if window else R  # the most keys that a tile sees
    splits = launch.blocks(visible, t.BS * t.steps)
    BD = launch.power_of_2(D) if t.BT == 1 else max(16, launch.power_of_2(D))
    parts, stats = (launch.empty((tiles * splits if splits > 1 else 0, t.BT, n), q, torch.float32) for n in (BD, 2))
    launch.run(
        attend, tiles * splits, q,
        q, k_cache, v_cache, (q.stride()[:3], k_cache.stride()[:3], v_cache.stride()[:3]), lengths, starts, out, parts, stats,
        tickets(tiles, q.device), H, T, R, D, window, splits, BT=t.BT, BD=BD, BS=t.BS, STEPS=t.steps, STAGES=t.stages,
        WHOLE_D=BD == D, AT_ONCE=8 if t.BT == 1 else 1, num_warps=t.warps, num_stages=t.stages,
        **launch.chained("decode_attention", q),
    )  # fmt: skip
    return out
