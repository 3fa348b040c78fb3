"""The loops of `generate` in JAX: prompt, then one token at a time, in one compiled program."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from . import network, scores
from .attention import Cache, empty_cache, reorder
from .network import Spec
from .scores import Knobs, Rules
from .weights import Tree

_NEVER = np.float32(-1e7)  # the score of what may not win; log-probabilities stay far above


class Plan(NamedTuple):
    """What the compiled program depends on."""

    length: int  # columns of prompt and continuation
    pad: int
    rules: Rules
    sample: bool = False
    beams: int = 1
    returned: int = 1  # sequences of each prompt, of the beams
    early_stopping: bool | Literal["never"] = False


class _State(NamedTuple):
    filled: Any  # columns that hold tokens
    sequences: Array  # int32 [B, length]
    finished: Array  # bool [B]
    positions: Array  # int32 [B, 1], of the newest token
    logits: Array  # float32 [B, V], of the next token
    key: Array
    cache: Cache


class _Beams(NamedTuple):
    filled: Any
    running: Array  # int32 [B, K, length]
    running_scores: Array  # [B, K], summed log-probabilities
    done: Array  # int32 [B, K, length], the best that ended
    done_scores: Array  # [B, K], divided by the length penalty
    ended: Array  # bool [B, K], which of them did end
    positions: Array  # int32 [B * K, 1]
    logits: Array  # float32 [B * K, V]
    cache: Cache


@partial(jax.jit, static_argnames=("spec", "plan"))
def search(params: Tree, ids: Array, mask: Array | None, key: Array, knobs: Knobs, *, spec: Spec, plan: Plan) -> Array:
    """The likeliest token at each step, or one drawn; int32 [B, length].

    A step draws with the first half of its key and hands on the second, as transformers' Flax classes do.
    """
    B, prompt = ids.shape
    held = _held(mask, plan.length)
    sequences = jnp.full((B, plan.length), plan.pad, jnp.int32).at[:, :prompt].set(ids)
    positions, logits, cache = _read(params, spec, ids, mask, plan.length)

    def go_on(state: _State) -> Array:
        return (state.filled < plan.length) & ~state.finished.all()

    def choose(state: _State) -> tuple[_State, Array]:
        now, following = jax.random.split(state.key)
        points = scores.process(plan.rules, knobs, state.sequences, state.logits, state.filled, plan.length, held)
        token = jax.random.categorical(now, scores.warp(plan.rules, knobs, points)) if plan.sample else points.argmax(-1)
        token = jnp.where(state.finished, plan.pad, token).astype(jnp.int32)
        grown = lax.dynamic_update_slice(state.sequences, token[:, None], (0, state.filled))
        finished = state.finished | scores.is_end(token, plan.rules.eos)
        return state._replace(filled=state.filled + 1, sequences=grown, finished=finished, key=following), token

    def step(state: _State) -> _State:
        """Reads the newest token, then chooses the next."""
        token = lax.dynamic_slice(state.sequences, (0, state.filled - 1), (B, 1))
        logits, cache = _next(params, spec, token, state.positions + 1, held, state.cache)
        return choose(state._replace(logits=logits, cache=cache, positions=state.positions + 1))[0]

    filled = jnp.array(prompt, jnp.int32)
    first = _State(filled, sequences, jnp.zeros(B, bool), positions, logits, key, cache)
    return lax.while_loop(go_on, step, choose(first)[0]).sequences


@partial(jax.jit, static_argnames=("spec", "plan"))
def beam_search(params: Tree, ids: Array, mask: Array | None, knobs: Knobs, *, spec: Spec, plan: Plan) -> tuple[Array, Array]:
    """The K = `plan.beams` likeliest continuations, as transformers' Flax classes search for them.

    Returns:
        int32 [B * returned, length], the best first, and their scores float32 [B * returned].
    """
    (B, prompt), K = ids.shape, plan.beams
    every = jnp.repeat(jnp.arange(B), K)  # the row of each beam's prompt
    positions, logits, cache = _read(params, spec, ids, mask, plan.length)
    held = None if mask is None else _held(mask[every], plan.length)
    sequences = jnp.full((B, K, plan.length), plan.pad, jnp.int32)
    first = _Beams(
        filled=jnp.array(prompt, jnp.int32),
        running=sequences.at[:, :, :prompt].set(ids[:, None]),
        running_scores=jnp.full((B, K), _NEVER).at[:, 0].set(0.0),  # all beams begin alike: one may go on
        done=sequences,
        done_scores=jnp.full((B, K), _NEVER),
        ended=jnp.zeros((B, K), bool),
        positions=positions[every],
        logits=logits[every],
        cache=reorder(cache, every),
    )

    def go_on(state: _Beams) -> Array:
        hopeful = (plan.early_stopping == "never") & (knobs.length_penalty > 0)  # a longer text may yet score higher
        ahead = jnp.where(hopeful, plan.length, state.filled) - prompt
        best = state.running_scores[:, :1] / ahead.astype(jnp.float32) ** knobs.length_penalty
        worst = jnp.where(state.ended, state.done_scores.min(1, keepdims=True), _NEVER)
        full = state.ended.all() & (plan.early_stopping is True)
        return (state.filled < plan.length) & ~full & (best > worst).any()

    def step(state: _Beams) -> _Beams:
        """Reads the newest token of each beam, then ranks what may follow."""
        newest = lax.dynamic_slice(state.running, (0, 0, state.filled - 1), (B, K, 1)).reshape(B * K, 1)
        logits, cache = _next(params, spec, newest, state.positions + 1, held, state.cache)
        return _rank(state._replace(logits=logits, cache=cache, positions=state.positions + 1), plan, knobs, prompt, held)

    last = lax.while_loop(go_on, step, _rank(first, plan, knobs, prompt, held))
    some = last.ended.any(1)
    best = jnp.where(some[:, None, None], last.done, last.running)[:, : plan.returned]
    points = jnp.where(some[:, None], last.done_scores, last.running_scores)[:, : plan.returned]
    return best.reshape(-1, plan.length), points.reshape(-1)


def _rank(state: _Beams, plan: Plan, knobs: Knobs, prompt: int, held: Array | None) -> _Beams:
    """The 2K best continuations of K beams: those that end compete with the ended ones, the K best others go on."""
    B, K, length = state.running.shape
    log_probs = jax.nn.log_softmax(state.logits)
    log_probs = scores.process(
        plan.rules, knobs, state.running.reshape(B * K, length), log_probs, state.filled, plan.length, held
    )
    V = log_probs.shape[-1]
    totals = (log_probs.reshape(B, K, V) + state.running_scores[:, :, None]).reshape(B, K * V)
    top, places = lax.top_k(totals, 2 * K)
    beams, tokens = places // V, (places % V).astype(jnp.int32)
    grown = lax.dynamic_update_slice(_take(state.running, beams), tokens[:, :, None], (0, 0, state.filled))
    ends = scores.is_end(tokens, plan.rules.eos)

    going = lax.top_k(top + ends * _NEVER, K)[1]
    running, running_scores = _take(grown, going), _take(top + ends * _NEVER, going)

    points = top / (state.filled + 1 - prompt).astype(jnp.float32) ** knobs.length_penalty
    full = state.ended.all(1, keepdims=True) & (plan.early_stopping is True)
    points = points + (~ends | full) * _NEVER
    all_points = jnp.concatenate([state.done_scores, points], 1)
    kept = lax.top_k(all_points, K)[1]
    done = _take(jnp.concatenate([state.done, grown], 1), kept)
    ended = _take(jnp.concatenate([state.ended, ends], 1), kept)

    rows = (jnp.arange(B)[:, None] * K + _take(beams, going)).reshape(-1)
    return state._replace(
        filled=state.filled + 1,
        running=running,
        running_scores=running_scores,
        done=done,
        done_scores=_take(all_points, kept),
        ended=ended,
        positions=state.positions[rows],
        cache=reorder(state.cache, rows),
    )


def _take(x: Array, places: Array) -> Array:
    """x[b, places[b, i], ...]."""
    return x[jnp.arange(len(x))[:, None], places]


def _held(mask: Array | None, length: int) -> Array | None:
    """The prompt's mask [B, T] as bool [B, length]: what is generated is no padding."""
    return None if mask is None else jnp.pad(mask != 0, ((0, 0), (0, length - mask.shape[1])), constant_values=True)


def _read(params: Tree, spec: Spec, ids: Array, mask: Array | None, length: int) -> tuple[Array, Array, Cache]:
    """The prompt: positions [B, 1] and logits float32 [B, V] of its last token, and the cache."""
    B, T = ids.shape
    positions = jnp.broadcast_to(jnp.arange(T), (B, T)) if mask is None else jnp.maximum((mask != 0).cumsum(1) - 1, 0)
    positions = positions.astype(jnp.int32)
    head_dim = params["transformer"]["wte"]["embedding"].shape[1] // spec.heads
    cache = empty_cache(B, length, spec.windows, spec.heads, head_dim, spec.dtype)
    traced = network.trunk(params, spec, ids, positions, mask, cache, fresh=True)
    logits = network.head(params, spec, traced.last[:, -1]).astype(jnp.float32)
    return positions[:, -1:], logits, traced.cache or cache


def _next(params: Tree, spec: Spec, token: Array, positions: Array, held: Array | None, cache: Cache) -> tuple[Array, Cache]:
    """Logits float32 [B, V] after one more token [B, 1], and the cache with it."""
    traced = network.trunk(params, spec, token, positions, held, cache)
    return network.head(params, spec, traced.last[:, -1]).astype(jnp.float32), traced.cache or cache
