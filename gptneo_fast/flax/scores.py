"""What changes the scores between the model and the choice of a token, as functions that jax can compile.

Which of them act is static; their strengths are traced, so that another temperature compiles nothing anew.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

Processor = Callable[[Array, Array, Any], Array]  # (sequences [B, length], scores [B, V], columns filled) -> scores


class Rules(NamedTuple):
    """What acts, in this order; strengths stand in `Knobs`."""

    repetition_penalty: bool = False
    min_length: int = 0  # no end token before so many columns
    eos: tuple[int, ...] = ()
    forced_bos: int | None = None
    forced_eos: tuple[int, ...] = ()
    suppress: tuple[int, ...] = ()
    begin_suppress: tuple[int, ...] = ()
    begin: int = 0  # the column at which begin_suppress acts
    ngram: int = 0
    custom: tuple[Processor, ...] = ()
    temperature: bool = False  # from here on only when sampling
    top_k: int = 0
    top_p: bool = False
    min_p: bool = False


class Knobs(NamedTuple):
    """Strengths, as traced scalars."""

    repetition_penalty: Any = 1.0
    temperature: Any = 1.0
    top_p: Any = 1.0
    min_p: Any = 0.0
    length_penalty: Any = 1.0


def process(rules: Rules, knobs: Knobs, sequences: Array, scores: Array, filled: Any, length: int, held: Array | None) -> Array:
    """Scores after every rule but those of sampling.

    Args:
        sequences: int32 [B, length], of which `filled` columns count. scores: float32 [B, V].
        held: bool [B, length], False for padding, which the repetition penalty passes over; None for none.
    """
    V = scores.shape[1]

    def only(ids: tuple[int, ...]) -> Array:
        return jnp.full(V, -jnp.inf).at[jnp.array(ids)].set(0.0)

    def without(ids: tuple[int, ...], when: Any, scores: Array) -> Array:
        return jnp.where(when & jnp.zeros(V, bool).at[jnp.array(ids)].set(True), -jnp.inf, scores)

    if rules.repetition_penalty:
        seen = _seen(sequences, V, (jnp.arange(sequences.shape[1]) < filled) & (True if held is None else held))
        penalty = knobs.repetition_penalty
        scores = jnp.where(seen, jnp.where(scores < 0, scores * penalty, scores / penalty), scores)
    if rules.min_length and rules.eos:
        scores = without(rules.eos, filled < rules.min_length, scores)
    if rules.forced_bos is not None:
        scores = jnp.where(filled == 1, only((rules.forced_bos,)), scores)
    if rules.forced_eos:
        scores = jnp.where(filled == length - 1, only(rules.forced_eos), scores)
    if rules.suppress:
        scores = without(rules.suppress, True, scores)
    if rules.begin_suppress:
        scores = without(rules.begin_suppress, filled == rules.begin, scores)
    if rules.ngram:
        scores = jnp.where(_repeats(sequences, filled, rules.ngram, V), -jnp.inf, scores)
    for processor in rules.custom:
        scores = processor(sequences, scores, filled)
    return scores


def warp(rules: Rules, knobs: Knobs, scores: Array) -> Array:
    """Scores [B, V] to draw from: temperature, then top_k, top_p and min_p put the unlikely ones to -inf."""
    if rules.temperature:
        scores = scores / knobs.temperature
    V = scores.shape[1]
    if not (rules.top_k or rules.top_p or rules.min_p):
        return scores
    if rules.top_k:
        ranked = lax.top_k(scores, min(rules.top_k, V))[0]  # [B, k], falling
    else:
        ranked = -jnp.sort(-scores, axis=-1) if rules.top_p else scores.max(-1, keepdims=True)
    least = ranked[:, -1:] if rules.top_k else jnp.full_like(ranked[:, :1], -jnp.inf)
    if rules.top_p:
        before = jnp.cumsum(jax.nn.softmax(ranked, -1), -1)[:, :-1]  # probability of all that are likelier
        kept = 1 + (before < knobs.top_p).sum(-1, keepdims=True)
        least = jnp.maximum(least, jnp.take_along_axis(ranked, kept - 1, axis=-1))
    if rules.min_p:
        least = jnp.maximum(least, ranked[:, :1] + jnp.log(knobs.min_p))
    return jnp.where(scores < least, -jnp.inf, scores)


def is_end(tokens: Array, eos: tuple[int, ...]) -> Array:
    """Which tokens end a text; bool, of their shape."""
    return jnp.isin(tokens, jnp.array(eos, jnp.int32)) if eos else jnp.zeros(tokens.shape, bool)


def _seen(tokens: Array, V: int, counts: Array) -> Array:
    """Ids that stand among those `tokens` [B, n] that count (bool [B or 1, n]); bool [B, V]."""
    rows = jnp.arange(len(tokens))[:, None]
    return jnp.zeros((len(tokens), V), bool).at[rows, tokens].max(jnp.broadcast_to(counts, tokens.shape))


def _repeats(sequences: Array, filled: Any, n: int, V: int) -> Array:
    """Ids that would make a run of n tokens stand twice; bool [B, V]."""
    B, length = sequences.shape
    if length < n:
        return jnp.zeros((B, V), bool)
    begins = jnp.arange(length - n + 1)
    last = lax.dynamic_slice(sequences, (0, jnp.maximum(filled - n + 1, 0)), (B, n - 1))
    same = (begins + n - 1 < filled)[None] & jnp.ones((B, 1), bool)
    for j in range(n - 1):
        same &= sequences[:, begins + j] == last[:, j : j + 1]
    return _seen(sequences[:, begins + n - 1], V, same & (filled >= n - 1))
