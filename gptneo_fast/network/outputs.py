"""Output classes of the five models: fields by attribute, key, index and slice, as in transformers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.utils import _pytree as pytree

from ..kinship import make_kin
from .cache import KVCache


class ModelOutput(OrderedDict[str, Any]):
    """A dataclass that is also a dict of those of its fields that are not None, and reads like a tuple of them.

    Libraries that take it apart and build it anew know it as a pytree, or call its class with a mapping.
    """

    fields: ClassVar[tuple[str, ...]] = ()  # in order; a tuple, which tracers read

    def __init_subclass__(cls) -> None:
        cls.fields = tuple(vars(cls).get("__annotations__", ()))
        pytree.register_pytree_node(
            cls,
            lambda out: (list(out.values()), tuple(out)),
            lambda values, names: cls(**dict(zip(names, values, strict=True))),
            serialized_type_name=f"{cls.__module__}.{cls.__name__}",
            flatten_with_keys_fn=lambda out: ([(pytree.MappingKey(k), v) for k, v in out.items()], tuple(out)),
        )

    def __post_init__(self) -> None:
        names = self.fields
        first = getattr(self, names[0])
        if isinstance(first, Mapping) and tuple(self) == names[:1]:
            del self[names[0]]
            for name, value in first.items():
                self[name] = value

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are not None, in order."""
        return tuple(self[name] for name in self.fields if name in self)

    def beside(self, *names: str) -> dict[str, Any]:
        """The fields other than these, for an output that has them too."""
        return {name: getattr(self, name) for name in self.fields if name not in names}

    @property
    def cache(self) -> Any:
        """`past_key_values`, under the name that it has from transformers 5.24 on."""
        return vars(self).get("past_key_values")

    def __getitem__(self, key: Any) -> Any:
        if key == "cache":
            key = "past_key_values"
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def __setitem__(self, key: str, value: Any) -> None:
        key = "past_key_values" if key == "cache" else key
        if key not in self.fields:
            raise KeyError(f"{type(self).__name__} has no field {key!r}")
        object.__setattr__(self, key, value)
        if value is not None:
            super().__setitem__(key, value)
        elif key in self:
            super().__delitem__(key)

    def __delitem__(self, key: str) -> None:
        self[key] = None

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.fields or name == "cache":
            self[name] = value
        else:  # somebody's own, beside the fields
            object.__setattr__(self, name, value)

    def __reduce__(self) -> Any:
        return _rebuilt, (type(self), dict(self))


make_kin(ModelOutput, "transformers.utils.generic", "ModelOutput")


def _rebuilt(kind: type[ModelOutput], values: dict[str, Any]) -> ModelOutput:
    return kind(**values)


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


@dataclass
class Trace:
    """What a caller may ask to see of a forward pass: L + 1 hidden states [B, T, C], L weights [B, H, T, S]."""

    hidden_states: list[Tensor] | None = None
    attentions: list[Tensor | None] | None = None
