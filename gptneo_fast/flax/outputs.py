"""Output classes: trees of arrays for jax, fields by attribute, key and index for callers; names of transformers 4.57."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import jax
from jax import Array

from ..network.outputs import ModelOutput

Kind = TypeVar("Kind", bound=type)


def _tree(cls: Kind) -> Kind:
    """Make jax look into a dataclass."""
    jax.tree_util.register_dataclass(cls, [f.name for f in dataclasses.fields(cls)], [])
    return cls


class FlaxOutput(ModelOutput):
    """What the outputs have in common."""

    def replace(self, **changes: Any) -> Self:
        """A copy with other values in some fields."""
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]


@_tree
@dataclass(eq=False)
class FlaxBaseModelOutputWithPast(FlaxOutput):
    """last_hidden_state [B, T, C]; hidden_states L + 1 of [B, T, C]; attentions L of [B, H, T, keys]."""

    last_hidden_state: Array | None = None
    past_key_values: Any = None
    hidden_states: tuple[Array, ...] | None = None
    attentions: tuple[Array, ...] | None = None


@_tree
@dataclass(eq=False)
class FlaxCausalLMOutput(FlaxOutput):
    """logits [B, T, V]; the rest as in FlaxBaseModelOutputWithPast."""

    logits: Array | None = None
    past_key_values: Any = None
    hidden_states: tuple[Array, ...] | None = None
    attentions: tuple[Array, ...] | None = None


@_tree
@dataclass(eq=False)
class FlaxGreedySearchOutput(FlaxOutput):
    """sequences int32 [B, length], prompt and continuation, filled with the padding id."""

    sequences: Array | None = None


@_tree
@dataclass(eq=False)
class FlaxSampleOutput(FlaxOutput):
    """sequences int32 [B, length], prompt and continuation, filled with the padding id."""

    sequences: Array | None = None


@_tree
@dataclass(eq=False)
class FlaxBeamSearchOutput(FlaxOutput):
    """sequences int32 [B, length], the best first; scores float32 [B].

    A score is the summed log-probability / length ** length_penalty, or the sum alone where no beam of the prompt ended.
    """

    sequences: Array | None = None
    scores: Array | None = None
