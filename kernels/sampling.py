"""sample: the next token of every row from its logits, penalties to state update, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptneo_fast.ops import constants

from . import launch
from .selection import first_k, nucleus, ordered

SLICE = 2048  # tokens of one program where a row is split

# Triton's compiler knows no other globals than constexprs.
GREEDY, FREE, FEW, ALL = map(tl.constexpr, constants.METHODS)
TOKEN, PLACE, COUNT, STATUS, TICKET = map(tl.constexpr, constants.STATE)
FINISHED, BROKEN = map(tl.constexpr, constants.STATUS_BITS)
END, SUPPRESSED, NOT_FIRST = map(tl.constexpr, constants.FLAGS)


@triton.jit
def _noise(seed, ids, drawn):
    """-log(E), E exponential; see gptneo_fast/ops/sampling.py. float32, shaped as ids."""
    zero = ids * 0
    r, _, _, _ = tl.philox(seed, ids, zero + drawn, zero, zero)
    u = (r.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    e = tl.where(u < 0.0009765625, u + 0.5 * u * u, -tl.log(tl.maximum(1.0 - u, 5.960464477539063e-08)))
    return -tl.log(e)


@triton.jit
def _likeliest(x, ids):
    """(largest x, the lowest id that has it)."""
    best = tl.max(x)
    return best, tl.min(tl.where(x == best, ids, 2147483647))


@triton.jit
def _scores(row, ids, inside, GREEDY: tl.constexpr):
    """(scores / temperature after penalties, whether some logit is not finite).

    row: logits and `seen` (or None) of the row, flags, rates, V, tokens drawn, tokens before which none may end it.
    """
    logits_ptr, seen_ptr, flags_ptr, rates_ptr, _, drawn, least = row
    x = tl.load(logits_ptr + ids, mask=inside, other=0.0).to(tl.float32)
    broken = tl.max((~(tl.abs(x) < float("inf"))).to(tl.int32))
    if seen_ptr is not None:
        seen = tl.load(seen_ptr + ids, mask=inside, other=0)
        penalty = tl.load(rates_ptr + 3).to(tl.float32)
        x = tl.where(seen != 0, tl.where(x < 0, x * penalty, x / penalty), x)
    flags = tl.load(flags_ptr + ids, mask=inside, other=SUPPRESSED)
    barred = ((flags & SUPPRESSED) != 0) | (((flags & END) != 0) & (drawn < least))
    barred = barred | (((flags & NOT_FIRST) != 0) & (drawn == 0))
    x = tl.where(barred, float("-inf"), x)
    if not GREEDY:
        x = x / tl.load(rates_ptr).to(tl.float32)
    return x, broken


@triton.jit
def _advance(
    row, token, broken, drawn, limit, flags_ptr, seen_ptr, state_ptr, B, out_ptr, stride_ob, stride_on, lengths_ptr,
):  # fmt: skip
    """What the row's last program does: store the token, count it, tell whether the row has ended. seen_ptr: of the row."""
    if broken:
        tl.store(state_ptr + STATUS * B + row, FINISHED | BROKEN)
    else:
        tl.store(out_ptr + row * stride_ob + drawn * stride_on, token)
        if seen_ptr is not None:
            tl.store(seen_ptr + token, 1)
        ended = ((tl.load(flags_ptr + token) & END) != 0) | (drawn + 1 >= limit)
        tl.store(state_ptr + TOKEN * B + row, token.to(tl.int64))
        tl.store(state_ptr + PLACE * B + row, tl.load(state_ptr + PLACE * B + row) + 1)
        tl.store(state_ptr + COUNT * B + row, drawn + 1)
        tl.store(state_ptr + STATUS * B + row, ended.to(tl.int64) * FINISHED)
        tl.store(lengths_ptr + row, tl.load(lengths_ptr + row) + 1)


@triton.jit
def _draw(value, ids, top_k, top_p, min_p, whole, left, seed, drawn):
    """(the token drawn from the candidates, whether what is none of them can be drawn neither).

    value, ids: scores and tokens, ids below 0 where there is none. whole: mass of the row, in units of the largest score's;
    counts where top_k is 0. left: the largest score that is no candidate.
    """
    there, key, largest = ids >= 0, ordered(value), tl.max(value)
    mass = tl.where(there, tl.exp(value - largest), 0.0)
    above = there & (key > ordered(left))  # of those no token is missing
    if top_k > 0:
        kept = first_k(key, ids, there, top_k)
        whole = tl.sum(tl.where(kept, mass, 0.0))
        enough = tl.sum(above.to(tl.int32)) >= top_k
    else:
        kept = there
        enough = (top_p < 1.0) & (tl.sum(tl.where(above, mass, 0.0)) >= top_p * whole)
        enough = enough | (tl.exp(left - largest) < min_p)
    if top_p < 1.0:
        kept = kept & (key >= nucleus(key, tl.where(kept, mass, 0.0), top_p * whole))
    kept = kept & (mass >= min_p)
    value = tl.where(kept, value + _noise(seed, ids, drawn), float("-inf"))
    _, token = _likeliest(value, tl.where(there, ids, 2147483647))
    return token, enough | (left == float("-inf"))


@triton.jit
def _reach(row, largest, low, step, tied, last_tied, MASS: tl.constexpr, BLOCK: tl.constexpr):
    """For the 7 thresholds low + step ... low + 7 step: how many scores reach each; with MASS, the mass above each.

    With MASS, of the scores whose key is `tied` those after the id `last_tied`, and all with a lower key, count for nothing.
    """
    V, offs = row[4], tl.arange(0, BLOCK)
    total = tl.zeros([8, BLOCK], tl.float32)
    thresholds = low + step * tl.arange(0, 8)[:, None].to(tl.int64)  # of the row 0, nothing is asked
    thresholds = tl.maximum(tl.minimum(thresholds, 2147483647), -2147483648).to(tl.int32)
    for first in tl.range(0, V, BLOCK, num_stages=4):  # asked for early: a pass is as long as its loads
        ids = first + offs
        x, _ = _scores(row, ids, ids < V, False)
        key = ordered(x)
        if MASS:
            kept = (ids < V) & ((key > tied) | ((key == tied) & (ids <= last_tied)))
            mass = tl.where(kept, tl.exp(x - largest), 0.0)
            total += tl.where(key[None, :] > thresholds, mass[None, :], 0.0)
        else:
            total += ((key[None, :] >= thresholds) & (ids < V)[None, :]).to(tl.float32)
    return tl.sum(total, 1)  # [8]; counts are exact below 2^24


@triton.jit
def walk(row, largest, top_k, top_p, min_p, seed, BLOCK: tl.constexpr):
    """The token drawn from all of a row. Thresholds are found 3 bits a pass over the row, which the cache holds."""
    V, drawn, places, offs = row[4], row[5], tl.arange(0, 8), tl.arange(0, BLOCK)
    tied = tl.full((), -2147483648, tl.int64)  # the key of rank top_k
    last_tied = tl.full((), 2147483647, tl.int32)  # the last id of that key that is kept
    if top_k > 0:
        for bits in range(11):
            step = tl.full((), 1, tl.int64) << (30 - 3 * bits)
            reach = _reach(row, largest, tied, step, tied, last_tied, False, BLOCK)
            tied += step * tl.sum(((places > 0) & (reach >= top_k)).to(tl.int64))
        above = 0
        for first in range(0, V, BLOCK):
            ids = first + offs
            x, _ = _scores(row, ids, ids < V, False)
            above += tl.sum(((ordered(x) > tied) & (ids < V)).to(tl.int32))
        room, last_tied = top_k - above, last_tied * 0 - 1
        for first in range(0, V, BLOCK):
            ids = first + offs
            x, _ = _scores(row, ids, ids < V, False)
            same = ((ordered(x) == tied) & (ids < V)).to(tl.int32)
            last_tied = tl.maximum(last_tied, tl.max(tl.where((same != 0) & (tl.cumsum(same) <= room), ids, -1)))
            room -= tl.sum(same)
    lowest = tl.full((), -2147483648, tl.int64)  # top_p keeps the keys from here on
    if top_p < 1.0:
        bound = 0.0
        for bits in range(-1, 11):  # first, with thresholds that are all the lowest, the mass of the row
            step = tl.full((), 1, tl.int64) << (30 - 3 * tl.maximum(bits, 0))
            step = tl.where(bits < 0, 0, step)
            reach = _reach(row, largest, lowest - 1, step, tied, last_tied, True, BLOCK)
            if bits < 0:
                bound = top_p * tl.max(reach)
            lowest += step * tl.sum(((places > 0) & (reach >= bound)).to(tl.int64))

    best, token = float("-inf"), 2147483647
    for first in range(0, V, BLOCK):
        ids = first + offs
        x, _ = _scores(row, ids, ids < V, False)
        key = ordered(x)
        kept = (ids < V) & ((key > tied) | ((key == tied) & (ids <= last_tied))) & (key >= lowest)
        kept = kept & (tl.exp(x - largest) >= min_p)
        value, chosen = _likeliest(tl.where(kept, x + _noise(seed, ids, drawn), float("-inf")), ids)
        token = tl.where(value > best, chosen, token)
        best = tl.maximum(best, value)
    return token


@triton.jit(do_not_specialize=["stride_ob", "stride_on", "B"])  # which change with the batch
def sample_kernel(
    logits_ptr, stride_lb, rates_ptr, counts_ptr, flags_ptr, seeds_ptr, seen_ptr, stride_sb,
    state_ptr, out_ptr, stride_ob, stride_on, lengths_ptr, scratch_ptrs, B, V,
    METHOD: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr, KEEP: tl.constexpr, MERGE: tl.constexpr,
):  # fmt: skip
    """Programs [B * SPLITS]; each takes BLOCK tokens of a row, the last of a row to arrive merges what they hand on.

    scratch_ptrs: scores and ids of candidates [B, SPLITS, KEEP], what a slice tells of itself [B, SPLITS, 3].
    """
    value_ptr, id_ptr, slice_ptr = scratch_ptrs
    row = (tl.program_id(0) // SPLITS).to(tl.int64)
    part = tl.program_id(0) % SPLITS
    if tl.load(state_ptr + STATUS * B + row) != 0:
        return
    drawn = tl.load(state_ptr + COUNT * B + row).to(tl.int32)
    top_k, least, limit = tl.load(counts_ptr), tl.load(counts_ptr + 1), tl.load(counts_ptr + 2)
    seed = tl.load(seeds_ptr + row)
    logits_ptr += row * stride_lb
    if seen_ptr is not None:
        seen_ptr += row * stride_sb
    of_row = (logits_ptr, seen_ptr, flags_ptr, rates_ptr, V, drawn, least)

    offs = tl.arange(0, BLOCK)
    ids = (offs // 32 * SPLITS + part) * 32 + offs % 32  # dealt out, for the likely ones have neighbouring ids
    inside = ids < V
    x, broken = _scores(of_row, ids, inside, METHOD == GREEDY)
    scratch = (row * SPLITS + part) * KEEP
    if METHOD >= FEW:
        kept = first_k(ordered(x), ids, inside, KEEP if METHOD == ALL else top_k)
        place = tl.cumsum(kept.to(tl.int32)) - 1
        tl.store(value_ptr + scratch + place, x, mask=kept)
        tl.store(id_ptr + scratch + place, ids, mask=kept)
        rest = tl.arange(0, KEEP)
        unused = rest >= tl.sum(kept.to(tl.int32))
        tl.store(id_ptr + scratch + rest, rest * 0 - 1, mask=unused)
        if METHOD == ALL:
            peak = tl.maximum(tl.max(x), -3e38)  # so that barred tokens have no mass where all are
            of_slice = slice_ptr + (row * SPLITS + part) * 3
            tl.store(of_slice, peak)
            tl.store(of_slice + 1, tl.sum(tl.exp(x - peak)))
            tl.store(of_slice + 2, tl.max(tl.where(kept, float("-inf"), x)))
    else:
        if METHOD == FREE:
            x = x + _noise(seed, ids, drawn)
        best, first = _likeliest(x, ids)
        tl.store(value_ptr + scratch, best)
        tl.store(id_ptr + scratch, first)
    if broken != 0:  # told through the first id, which finite logits never make -2
        tl.debug_barrier()
        tl.store(id_ptr + scratch, -2)

    tl.debug_barrier()  # every store of this program before its ticket
    if tl.atomic_add(state_ptr + TICKET * B + row, 1, sem="acq_rel") == SPLITS - 1:
        tl.store(state_ptr + TICKET * B + row, 0)
        at = tl.arange(0, MERGE)
        base = row * SPLITS * KEEP + at
        found = tl.load(id_ptr + base, mask=at < SPLITS * KEEP, other=-1)
        value = tl.load(value_ptr + base, mask=found >= 0, other=float("-inf"))
        ruined = tl.min(found) == -2
        if METHOD >= FEW:
            top_p, min_p = tl.load(rates_ptr + 1).to(tl.float32), tl.load(rates_ptr + 2).to(tl.float32)
            whole, left = 0.0, tl.full((), float("-inf"), tl.float32)
            if METHOD == ALL:
                slices = tl.arange(0, MERGE // KEEP)
                of_slices = slice_ptr + (row * SPLITS + slices) * 3
                peaks = tl.load(of_slices, mask=slices < SPLITS, other=float("-inf"))
                shares = tl.load(of_slices + 1, mask=slices < SPLITS, other=0.0)
                left = tl.max(tl.load(of_slices + 2, mask=slices < SPLITS, other=float("-inf")))
                largest = tl.max(peaks)
                whole = tl.sum(shares * tl.exp(peaks - largest))
            token, enough = _draw(value, found, top_k, top_p, min_p, whole, left, seed, drawn)
            if METHOD == ALL:  # noqa: SIM102  (as one condition it would be none of the compiler's)
                if (enough | ruined) == 0:
                    token = walk(of_row, largest, top_k, top_p, min_p, seed, 512 if BLOCK > 512 else BLOCK)
        else:
            _, token = _likeliest(value, tl.where(found >= 0, found, 2147483647))
        _advance(
            row, token, ruined, drawn, limit, flags_ptr, seen_ptr, state_ptr, B, out_ptr, stride_ob, stride_on, lengths_ptr,
        )  # fmt: skip


def sample(
    logits: Tensor,
    rates: Tensor,
    counts: Tensor,
    flags: Tensor,
    seeds: Tensor,
    seen: Tensor | None,
    state: Tensor,
    out: Tensor,
    lengths: Tensor,
    method: int,
) -> None:
    """As `gptneo_fast.ops.sampling.sample`; rows of logits may have any stride. One launch.

    With method ALL a slice hands on its 64 likeliest tokens and its mass. Where top_k, top_p and min_p may keep others, which
    the row's last program sees, it walks the whole row, up to some twenty-six times.
    """
    B, V = logits.shape
    splits, keep = launch.blocks(V, SLICE), constants.KEEP if method >= constants.FEW else 1
    values = launch.empty((B, splits, keep), logits, torch.float32)
    ids = launch.empty((B, splits, keep), logits, torch.int32)
    slices = launch.empty((B, splits, 3), logits, torch.float32) if method == constants.ALL else values
    launch.run(
        sample_kernel, B * splits, logits,
        logits, logits.stride(0), rates, counts, flags, seeds, seen, 0 if seen is None else seen.stride(0), state,
        out, *out.stride(), lengths, (values, ids, slices), B, V, METHOD=method, SPLITS=splits,
        BLOCK=min(SLICE, launch.power_of_2(V)), KEEP=keep, MERGE=launch.power_of_2(splits * keep), num_warps=8,
        maxnreg=128 if keep > 1 else None,  # two programs to an SM; without a limit ptxas saves registers and spills
    )  # fmt: skip
