"""The next token from logits [B, V]: warpers in transformers' order, then the likeliest token or one that is drawn."""

from __future__ import annotations

import torch
from torch import Tensor

from .config import GenerationConfig


def warp(scores: Tensor, options: GenerationConfig) -> Tensor:
    """Scores [B, V] float32 under temperature, top_k and top_p, in this order; removed tokens get -inf."""
    if options.temperature is not None and options.temperature != 1:
        scores = scores / options.temperature
    k = min(50 if options.top_k is None else options.top_k, scores.shape[-1])
    if k:
        scores = scores.masked_fill(scores < scores.topk(k).values[:, -1:], float("-inf"))
    if options.top_p is not None and options.top_p < 1:
        rising, order = scores.sort()
        outside = rising.softmax(-1).cumsum(-1) <= 1 - options.top_p
        outside[:, -1] = False  # the likeliest token always stays
        scores = scores.masked_fill(outside.scatter(1, order, outside), float("-inf"))
    return scores


def next_token(logits: Tensor, options: GenerationConfig, generator: torch.Generator | None) -> Tensor:
    """Token ids [B] int64 from logits [B, V] of any floating dtype; sampling is one multinomial over the softmax."""
    scores = logits.float()
    if not options.samples:
        return scores.argmax(-1)
    return torch.multinomial(warp(scores, options).softmax(-1), 1, generator=generator).squeeze(1)
