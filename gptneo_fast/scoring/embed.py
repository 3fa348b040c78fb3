"""EmbeddingMixin: one vector a text, of the trunk's last hidden states."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, cast

import torch
from torch import Tensor

from ..errors import InputError, short
from ..progress import of_batches
from .batches import Text, batches, budget_of, ids_of, texts_of

Pooling = Literal["mean", "weighted-mean", "last"]


class EmbeddingMixin:
    """What GPTNeoModel and GPTNeoForCausalLM offer to people who compare texts. Strings need `tokenizer`."""

    tokenizer: Any

    @torch.no_grad()
    def embed(
        self, texts: Text | Iterable[Text], pooling: Pooling = "mean", normalize: bool = False, *, progress: bool | None = None
    ) -> Tensor:
        """A vector float32 [C] of a text, or [n, C] of n texts of any lengths, on the CPU.

        Args:
            texts: a string or token ids, or several; none of them empty.
            pooling: of the hidden states after ln_f: "mean"; "weighted-mean", the state of token i weighing i + 1 (SGPT,
                Muennighoff 2022, equation 2); or "last".
            normalize: divide by the Euclidean norm.
            progress: show a bar on standard error; None for where that is a terminal and there are several batches.

        Raises:
            InputError: neither text nor ids, an empty text, too long a one, or another pooling.
            SetupError: text, and the model has no tokenizer.
        """
        if pooling not in ("mean", "weighted-mean", "last"):
            raise InputError(f"pooling={short(pooling)} is unknown; use 'mean', 'weighted-mean' or 'last'")
        model = cast(Any, self)
        given, single = texts_of(texts)
        rows = [ids_of(self.tokenizer, text, model.config.vocab_size, f"text {i}") for i, text in enumerate(given)]
        limit = model.config.max_position_embeddings
        for i, row in enumerate(rows):
            if not 0 < len(row) <= limit:
                raise InputError(f"text {i} has {len(row)} tokens; give from 1 to {limit}, the model's positions")
        trunk = model.base_model
        out = torch.empty(len(rows), trunk.config.hidden_size)
        for batch in of_batches(batches([len(row) for row in rows], budget_of(model.device)), "text", progress):
            T = len(rows[batch[0]])
            ids = torch.tensor([rows[i] + [0] * (T - len(rows[i])) for i in batch], device=model.device)
            lengths = torch.tensor([len(rows[i]) for i in batch], device=model.device)
            mask = (torch.arange(T, device=model.device) < lengths[:, None]).long()
            hidden = trunk(input_ids=ids, attention_mask=mask, use_cache=False, return_dict=True).last_hidden_state
            out[batch] = _pooled(hidden.float(), lengths, pooling).cpu()
        out = torch.nn.functional.normalize(out, dim=-1) if normalize else out
        return out[0] if single else out


def _pooled(hidden: Tensor, lengths: Tensor, pooling: Pooling) -> Tensor:
    """[B, C] of hidden states [B, T, C] of which the first `lengths` [B] are a text's."""
    B, T, _ = hidden.shape
    places = torch.arange(T, device=hidden.device)
    if pooling == "last":
        return hidden[torch.arange(B, device=hidden.device), lengths - 1]
    inside = places < lengths[:, None]
    weights = torch.where(inside, places + 1 if pooling == "weighted-mean" else 1, 0).float()  # [B, T]
    kept = hidden.masked_fill(~inside[..., None], 0)  # padding may hold anything
    return (weights[:, None] @ kept)[:, 0] / weights.sum(1, keepdim=True)
