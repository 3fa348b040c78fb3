"""A causal model as a graph with keys and values going in and out, for torch.export, ONNX and what reads them.

step = Step(model)
torch.onnx.export(step, step.example(), "model.onnx", dynamo=True, dynamic_shapes=step.dynamic_shapes(), **step.names())

The cache that a model makes by itself drops keys past the window, which depends on lengths; a graph for all lengths keeps them,
and its mask hides them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..models.causal import GPTNeoForCausalLM


class Step(nn.Module):
    """Tokens to logits, for prompts and for one token after the other alike.

    Args:
        model: its modules are used, not copied.
    """

    def __init__(self, model: GPTNeoForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        """(logits [B, T, V], then for each layer all keys and all values [B, H, S + T, D]).

        Args:
            input_ids: int64 [B, T].
            past: for each layer keys and values [B, H, S, D] of the tokens before; S may be 0.
        """
        cache: Any = _Growing(list(past))
        out = self.model(input_ids=input_ids, past_key_values=cache, use_cache=True, return_dict=True)
        return out.logits, *cache.held

    def empty(self, batch_size: int, tokens: int = 0) -> tuple[Tensor, ...]:
        """Keys and values of so many tokens, all zero: [B, H, tokens, D]."""
        config = self.model.config
        shape = batch_size, config.num_heads, tokens, config.head_dim
        return tuple(torch.zeros(shape, dtype=self.model.dtype, device=self.model.device) for _ in range(2 * config.num_layers))

    def example(self) -> tuple[Tensor, ...]:
        """Arguments to trace with."""
        return torch.zeros(2, 3, dtype=torch.int64, device=self.model.device), *self.empty(2, 5)

    def dynamic_shapes(self) -> tuple[Any, ...]:
        """Of these what may be of any size: batch, tokens, and tokens before."""
        B, T, S = (torch.export.Dim.DYNAMIC for _ in range(3))
        return {0: B, 1: T}, tuple({0: B, 2: S} for _ in range(2 * self.model.config.num_layers))

    def names(self) -> dict[str, list[str]]:
        """`input_names` and `output_names` of torch.onnx.export."""
        layers = [f"{what}_{i}" for i in range(self.model.config.num_layers) for what in ("key", "value")]
        past, present = ([f"{when}_{name}" for name in layers] for when in ("past", "present"))
        return {"input_names": ["input_ids", *past], "output_names": ["logits", *present]}


class _Growing:
    """Keys and values of every layer, of all tokens."""

    is_compileable = False

    def __init__(self, held: list[Tensor]) -> None:
        self.held, self.before = held, held[0].shape[2]

    def get_seq_length(self, layer_idx: int | None = None) -> int:
        """Tokens before this call."""
        return self.before

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any) -> tuple[Tensor, Tensor]:
        """Those of a layer with the new ones behind."""
        pair = slice(2 * layer_idx, 2 * layer_idx + 2)
        self.held[pair] = [torch.cat([old, new], 2) for old, new in zip(self.held[pair], (keys, values), strict=True)]
        found, others = self.held[pair]
        return found, others
