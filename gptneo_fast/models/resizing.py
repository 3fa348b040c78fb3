"""Another vocabulary: rows of the embedding, and of the head, that come or go."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..config import LIMITS, is_int
from ..errors import InputError, short
from ..ops.quantized import QuantizedWeight
from .initialising import INITIALIZED


def resize(model: Any, new_num_tokens: int | None, pad_to_multiple_of: int | None, mean_resizing: bool) -> nn.Embedding:
    """As `resize_token_embeddings`."""
    old = model.base_model.wte.weight
    if isinstance(old, QuantizedWeight):
        raise InputError(f"the embedding is {old.how}, whose rows cannot change; resize first and quantise then")
    for name, value in (("new_num_tokens", new_num_tokens), ("pad_to_multiple_of", pad_to_multiple_of)):
        if value is not None and not (is_int(value) and 1 <= value <= LIMITS["vocab_size"]):
            raise InputError(f"{name} {short(value)} is not a positive integer of at most {LIMITS['vocab_size']}")
    size = old.shape[0] if new_num_tokens is None else new_num_tokens
    if pad_to_multiple_of:
        size = -(-size // pad_to_multiple_of) * pad_to_multiple_of
    if size == old.shape[0]:
        return model.base_model.wte
    head = model.get_output_embeddings()
    std = model.config.initializer_range
    wte = nn.Embedding(size, old.shape[1], device="meta")
    wte.weight = _resized(old, size, mean_resizing, std)
    if head is not None:
        head.out_features = size
        head.weight = wte.weight if head.weight is old else _resized(head.weight, size, mean_resizing, std)
    vars(wte)[INITIALIZED] = True
    model.base_model.wte = wte
    vars(model)["vocab_size"] = size  # as in transformers, and no attribute that counts as a touch
    object.__setattr__(model.config, "vocab_size", size)  # shared by trunk and head; nothing else is shaped by it
    return model.base_model.wte


def _resized(old: Tensor, size: int, mean: bool, std: float) -> nn.Parameter:
    new = old.new_empty(size, old.shape[1])
    kept = min(size, old.shape[0])
    with torch.no_grad():
        new[:kept] = old[:kept]
        if size > kept:
            new[kept:] = old.float().mean(0) if mean else torch.randn_like(new[kept:]) * std
    return nn.Parameter(new, requires_grad=old.requires_grad)
