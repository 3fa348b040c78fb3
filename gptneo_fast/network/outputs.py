"""Output classes of the five models: fields by attribute, key, index and slice, as in transformers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .cache import KVCache


@dataclass(eq=False)
class ModelOutput(Mapping[str, Any]):
    """A dataclass that also reads like a mapping and a tuple of those of its fields that are not None."""

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are not None, in order."""
        return tuple(self[k] for k in self)

    def beside(self, *names: str) -> dict[str, Any]:
        """The fields other than these, for an output that has them too."""
        return {name: getattr(self, name) for name in self._names() if name not in names}

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            value = getattr(self, key, None) if key in self._names() else None
            if value is None:
                raise KeyError(key)
            return value
        return self.to_tuple()[key]

    def __setitem__(self, key: str, value: Any) -> None:
        if key not in self._names():
            raise KeyError(f"{type(self).__name__} has no field {key!r}")
        setattr(self, key, value)

    def __iter__(self) -> Iterator[str]:
        return (k for k in self._names() if getattr(self, k) is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _names(self) -> list[str]:
        return [f.name for f in dataclasses.fields(self)]


@dataclass(eq=False)
class BaseModelOutputWithPast(ModelOutput):
    """last_hidden_state [B, T, C]; hidden_states L + 1 of [B, T, C]; attentions L of [B, H, T, S]."""

    last_hidden_state: Tensor | None = None
    past_key_values: KVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass(eq=False)
class CausalLMOutputWithPast(ModelOutput):
    """loss scalar; logits [B, T or logits_to_keep, V]; the rest as in BaseModelOutputWithPast."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: KVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass(eq=False)
class SequenceClassifierOutputWithPast(ModelOutput):
    """loss scalar; logits [B, num_labels]; the rest as in BaseModelOutputWithPast."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: KVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass(eq=False)
class TokenClassifierOutput(ModelOutput):
    """loss scalar; logits [B, T, num_labels]; the rest as in BaseModelOutputWithPast."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass(eq=False)
class QuestionAnsweringModelOutput(ModelOutput):
    """loss scalar; start_logits and end_logits [B, T]; the rest as in BaseModelOutputWithPast."""

    loss: Tensor | None = None
    start_logits: Tensor | None = None
    end_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass(eq=False)
class GenerateDecoderOnlyOutput(ModelOutput):
    """What `generate(return_dict_in_generate=True)` gives; tuples have an entry for each new token.

    sequences int64 [B, T]; scores (processed) and logits (raw) of float32 [B, V]; attentions and hidden_states as of each
    forward pass.
    """

    sequences: Tensor | None = None
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None
    attentions: tuple[Any, ...] | None = None
    hidden_states: tuple[Any, ...] | None = None
    past_key_values: KVCache | None = None


@dataclass(eq=False)
class GenerateBeamDecoderOnlyOutput(ModelOutput):
    """The same of a beam search, whose scores and logits have a row for each beam.

    sequences_scores float32 [B], summed log-probability / length ** length_penalty; beam_indices int32 [B, new], the row of
    `scores` that each token was chosen from, -1 past the end.
    """

    sequences: Tensor | None = None
    sequences_scores: Tensor | None = None
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None
    beam_indices: Tensor | None = None
    attentions: tuple[Any, ...] | None = None
    hidden_states: tuple[Any, ...] | None = None
    past_key_values: KVCache | None = None
