"""Choosing the next token of every row where the logits are: the specification of the `sample` op.

A token is drawn by the Gumbel-max trick: the largest of score / temperature + noise over the tokens that top_k, top_p and
min_p keep. The noise of a token is -log(E), E exponential, from Philox 4x32-10 (Salmon et al. 2011) with the row's seed as key
and (token, how many were drawn before) as counter. So what a row draws depends neither on its batch mates nor on which
tokens were cut away.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .constants import BROKEN, COUNT, END, FINISHED, FREE, GREEDY, NOT_FIRST, PLACE, STATUS, SUPPRESSED, TOKEN


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
    """Draw the next token of each row that has not finished, and advance the row; finished rows stay as they are.

    A row whose logits are not all finite finishes as broken, without a token.

    Args:
        logits: [B, V] floating point.
        rates: float32 [4]: temperature, top_p (1: off), min_p (0: off), repetition_penalty (1: off).
        counts: int32 [3]: top_k (0: off; in method FEW from 1 to 64), tokens before which no END may come, tokens at most.
        flags: uint8 [V], bits of each token: END, SUPPRESSED, NOT_FIRST.
        seeds: int64 [B], key of each row's random numbers.
        seen: uint8 [B, V], 1 for tokens that repetition_penalty touches, or None for no penalty; changed.
        state: int64 [5, B]: newest token, its position, tokens drawn, status bits, a ticket of the kernel's; changed.
        out: int32 [B, N] of any strides, the tokens drawn; changed.
        lengths: int32 [B], tokens that the cache holds of each row, without the newest; changed.
        method: GREEDY, FREE, FEW or ALL.
    """
    x = logits.float()
    drawn, live = state[COUNT], (state[STATUS] & FINISHED) == 0
    broken = live & ~x.isfinite().all(-1)
    if seen is not None:
        penalty = rates[3]
        x = torch.where(seen != 0, torch.where(x < 0, x * penalty, x / penalty), x)
    barred = (flags & SUPPRESSED) != 0
    barred = barred | (((flags & END) != 0) & (drawn < counts[1])[:, None])
    barred = barred | (((flags & NOT_FIRST) != 0) & (drawn == 0)[:, None])
    x = x.masked_fill(barred, float("-inf"))
    if method != GREEDY:
        x = x / rates[0]
        x = x.masked_fill(~_kept(x, rates, counts), float("-inf")) if method != FREE else x
        x = x - exponential(seeds, drawn, x.shape[-1]).log()
    token = x.argmax(-1)

    goes_on = live & ~broken
    rows = torch.arange(len(x), device=x.device)
    at = drawn.clamp(max=out.shape[1] - 1)
    out[rows, at] = torch.where(goes_on, token.to(out.dtype), out[rows, at])
    if seen is not None:
        seen[rows, token] |= goes_on.to(seen.dtype)
    ended = ((flags[token] & END) != 0) | (drawn + 1 >= counts[2])
    state[STATUS] |= torch.where(broken, FINISHED | BROKEN, torch.where(goes_on & ended, FINISHED, 0))
    state[TOKEN] = torch.where(goes_on, token, state[TOKEN])
    state[PLACE] += goes_on
    state[COUNT] += goes_on
    lengths += goes_on


def _kept(x: Tensor, rates: Tensor, counts: Tensor) -> Tensor:
    """Boolean [B, V]: tokens that top_k, then top_p, then min_p keep; of equal scores at rank top_k the lowest ids."""
    order = x.argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(x.shape[1], device=x.device).expand_as(order))
    kept = rank < torch.where(counts[0] > 0, counts[0], x.shape[1])
    mass = (x - x.amax(-1, keepdim=True)).exp().masked_fill(~kept, 0)  # [B, V]
    ordered = mass.gather(1, order)
    before = ordered.cumsum(-1) - ordered  # mass of the likelier ones
    last = ((before < rates[1] * ordered.sum(-1, keepdim=True)) | (rates[1] >= 1)).sum(-1, keepdim=True) - 1
    lowest = x.gather(1, order.gather(1, last.clamp(min=0)))
    return kept & (x >= lowest) & (mass >= rates[2])


def exponential(seeds: Tensor, drawn: Tensor, vocabulary: int) -> Tensor:
    """Standard exponential numbers float32 [B, V]: -log(1 - u), u = (r + 1/2) / 2^32 of Philox's first word r.

    Args:
        seeds: int64 [B]. drawn: int64 [B].
    """
    token = torch.arange(vocabulary, device=seeds.device)[None].expand(len(seeds), -1)
    r = _philox(token, drawn[:, None].expand_as(token), seeds[:, None])
    u = (r.float() + 0.5) * 2.0**-32
    return torch.where(u < 2.0**-10, u + 0.5 * u * u, -(1 - u).clamp(min=2.0**-24).log())  # the logarithm loses small u


def _philox(c0: Tensor, c1: Tensor, key: Tensor, third: int = 0, fourth: int = 0) -> Tensor:
    """First word, as int64, of Philox 4x32-10 for four counters of 32 bits and a key of 64. Tensors are int64 [B, V]."""
    word = 0xFFFFFFFF
    c2, c3 = torch.full_like(c0, third), torch.full_like(c0, fourth)
    k0, k1 = key & word, (key >> 32) & word
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # the 64 bits of a product, whatever its sign
        c0, c1, c2, c3 = ((b >> 32) & word) ^ c1 ^ k0, b & word, ((a >> 32) & word) ^ c3 ^ k1, a & word
        k0, k1 = (k0 + 0x9E3779B9) & word, (k1 + 0xBB67AE85) & word
    return c0
