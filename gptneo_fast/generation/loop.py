"""The decoding loop: one prefill, then one token a step against the bounded cache."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

import torch
from torch import Tensor

from ..cache import KVCache
from ..masks import Rows
from .config import GenerationConfig
from .sampling import next_token

Steps = Generator[Tensor, Tensor, None]  # logits out, the token that was chosen in


@torch.no_grad()
def decode(model: Any, ids: Tensor, mask: Tensor | None, total: int, options: GenerationConfig) -> Iterator[Tensor]:
    """Tokens [B] int64 of each step, until every row has ended or `total` columns are reached.

    Args:
        model: a GPTNeoForCausalLM.
        ids: int64 [B, T], checked. mask: [B, T], zero for padding, or None.
        total: columns of prompt and continuation together.
        options: resolved.
    """
    generator = None
    if options.seed is not None:
        generator = torch.Generator(ids.device).manual_seed(options.seed)
    eos = torch.tensor(options.eos_ids, device=ids.device)
    running = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    steps = _cached(model, ids, mask, total) if options.use_cache is not False else _uncached(model, ids, mask)
    logits = next(steps)
    for column in range(ids.shape[1], total):
        token = next_token(logits, options, generator)
        if options.eos_ids and options.pad_id is not None:
            token = torch.where(running, token, options.pad_id)
            running = running & ~torch.isin(token, eos)
        yield token
        if column + 1 < total and bool(running.any()):
            logits = steps.send(token)
        else:
            return


def _cached(model: Any, ids: Tensor, mask: Tensor | None, total: int) -> Steps:
    """Logits [B, V] of the last column; each token sent back is appended to the cache."""
    B, T = ids.shape
    cache = KVCache(model.config, B, dtype=model.dtype, device=ids.device, max_length=max(T, total - 1))
    position = _positions(mask, T, ids.device)
    out = model(
        ids,
        past_key_values=cache,
        attention_mask=mask,
        position_ids=position,
        logits_to_keep=1,
        use_cache=True,
        return_dict=True,
    )
    position = position[:, -1:]
    logits = out.logits[:, -1]
    # Left padding was not stored, so that nothing need hide it; other padding was, and stays masked.
    masked = mask is not None and not torch.equal(cache.lengths, mask.sum(1, dtype=torch.int32))
    while True:
        token = yield logits
        position, rows = position + 1, Rows()
        if masked and mask is not None:
            mask = torch.cat([mask, mask.new_ones(B, 1)], 1)
            rows = Rows(mask=(mask != 0)[:, None, None])
        hidden = model.transformer.run(token[:, None], position, None, rows, cache)
        logits = model.lm_head(hidden)[:, -1]


def _uncached(model: Any, ids: Tensor, mask: Tensor | None) -> Steps:
    """The same without a cache: every step computes all columns again."""
    while True:
        position = _positions(mask, ids.shape[1], ids.device)
        out = model(ids, attention_mask=mask, position_ids=position, logits_to_keep=1, use_cache=False, return_dict=True)
        token = yield out.logits[:, -1]
        ids = torch.cat([ids, token[:, None]], 1)
        mask = mask if mask is None else torch.cat([mask, mask.new_ones(len(mask), 1)], 1)


def _positions(mask: Tensor | None, T: int, device: torch.device) -> Tensor:
    """Positions [B or 1, T]: tokens are counted, padding gets 0."""
    if mask is None:
        return torch.arange(T, device=device)[None]
    return (mask.long().cumsum(-1) - 1).clamp(min=0)
