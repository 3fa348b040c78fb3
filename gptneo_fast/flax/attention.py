"""Attention in JAX: what a query may see, the softmax, and the cache, whose local layers are a ring of the window.

Columns of a call's rows are numbered from 0, padding included; a cache of S columns keeps column c of a global layer in
slot c, and of a local one in slot c mod window. Shape letters: see `gptneo_fast.ops.reference`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

Cache = dict[str, Any]  # {"index": int32 scalar, "keys": {"0": [B, H, slots, D], ...}, "values": the same}


class View(NamedTuple):
    """How the layers of one window stand to the columns of a call.

    window: keys that a query sees; 0 for all.
    T: columns of the call. index: columns that the cache holds before it, 0 without one.
    slots: of the layer's cache.
    fresh: known to begin at column 0, so that new keys are all there are.
    mask: bool [B, columns], False for padding; None where there is none.
    """

    window: int
    T: int
    index: Any
    slots: int
    fresh: bool
    mask: Array | None

    @property
    def ring(self) -> bool:
        """Whether slots are used again."""
        return self.slots == self.window


def empty_cache(batch: int, length: int, windows: tuple[int, ...], heads: int, head_dim: int, dtype: Any) -> Cache:
    """A cache that holds nothing yet: min(length, window) slots in local layers, `length` in global ones."""

    def slots() -> dict[str, Array]:
        shapes = [(batch, heads, min(length, window or length), head_dim) for window in windows]
        return {str(i): jnp.zeros(shape, dtype) for i, shape in enumerate(shapes)}

    return {"index": jnp.zeros((), jnp.int32), "keys": slots(), "values": slots()}


def key_columns(view: View) -> Array:
    """Column of each key that a layer attends to, int32 [keys]; negative for a slot that was never filled."""
    if view.fresh:
        return jnp.arange(view.T)
    if not view.ring:
        return jnp.arange(view.slots)
    if view.T > 1:
        return view.index - view.slots + jnp.arange(view.slots + view.T)
    return view.index - (view.index - jnp.arange(view.slots)) % view.slots


def visible(view: View) -> Array:
    """Which keys a query sees, bool [B or 1, 1, T, keys]."""
    keys, queries = key_columns(view), view.index + jnp.arange(view.T)[:, None]
    seen = (keys <= queries) & (keys >= 0)
    if view.window:
        seen &= keys > queries - view.window
    if view.mask is None:
        return seen[None, None]
    return seen[None, None] & jnp.take(view.mask, keys, axis=1, mode="clip")[:, None, None]


def attend(q: Array, k: Array, v: Array, seen: Array, dropout: Any = None) -> tuple[Array, Array]:
    """softmax(q k^T) v without the 1/sqrt(D) factor, in float32; a query that sees nothing gives zeros.

    Args:
        q: [B, H, T, D]. k, v: [B, H, S, D]. seen: bool [B or 1, 1, T, S].
        dropout: of the weights, a function; None for none.

    Returns:
        [B, H, T, D] and the weights [B, H, T, S], both in the dtype of v.
    """
    exact = lax.Precision.HIGHEST  # TPUs and TF32 round the factors otherwise
    scores = jnp.einsum("bhtd,bhsd->bhts", q.astype(jnp.float32), k.astype(jnp.float32), precision=exact)
    scores = jnp.where(seen, scores, -jnp.inf)
    top = lax.stop_gradient(jnp.maximum(scores.max(-1, keepdims=True), jnp.finfo(jnp.float32).min))
    raised = jnp.exp(scores - top)
    total = raised.sum(-1, keepdims=True)
    weights = (raised / jnp.where(total == 0, 1, total)).astype(v.dtype)
    used = weights if dropout is None else dropout(weights)
    precision = exact if v.dtype == jnp.float32 else None
    return jnp.einsum("bhts,bhsd->bhtd", used, v, precision=precision), weights


def attend_banded(q: Array, k: Array, v: Array, window: int, mask: Array | None) -> Array:
    """Attention of a local layer from column 0 on, in blocks of `window` queries that see two blocks of keys.

    Args:
        q, k, v: [B, H, T, D]. mask: bool [B, T] or None.

    Returns:
        [B, H, T, D]
    """
    B, H, T, D = q.shape
    blocks = -(-T // window)
    held = jnp.ones((1, T), bool) if mask is None else mask
    q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, blocks * window - T), (0, 0))) for x in (q, k, v))
    held = jnp.pad(held, ((0, 0), (0, blocks * window - T))).reshape(len(held), blocks, window)

    def with_previous(x: Array, axis: int) -> Array:  # [..., blocks, window, ...] to [..., blocks, 2 * window, ...]
        begin = lax.slice_in_dim(x, 0, blocks - 1, axis=axis)
        before = jnp.concatenate([jnp.zeros_like(lax.slice_in_dim(x, 0, 1, axis=axis)), begin], axis)
        return jnp.concatenate([before, x], axis + 1)

    q, k, v = (x.reshape(B, H, blocks, window, D) for x in (q, k, v))
    k, v = with_previous(k, 2), with_previous(v, 2)
    column, row = jnp.arange(2 * window), window + jnp.arange(window)[:, None]
    seen = ((column <= row) & (column > row - window))[None, None] & with_previous(held, 1)[:, :, None]  # [B, blocks, ...]
    fold = (0, 2, 1, 3, 4)  # blocks become rows of the batch
    q, k, v = (x.transpose(fold).reshape(B * blocks, H, -1, D) for x in (q, k, v))
    seen = jnp.broadcast_to(seen, (B, *seen.shape[1:])).reshape(B * blocks, 1, window, 2 * window)
    out, _ = attend(q, k, v, seen)
    return out.reshape(B, blocks, H, window, D).transpose(fold).reshape(B, H, blocks * window, D)[:, :, :T]


def append(slots: Array, new: Array, view: View) -> tuple[Array, Array]:
    """(the layer's slots with the new columns in them, what the queries of the call attend to).

    Args:
        slots: [B, H, R, D]. new: [B, H, T, D].

    Returns:
        [B, H, R, D], and [B, H, keys, D] in the order of `key_columns`.
    """
    new, T = new.astype(slots.dtype), view.T
    if not view.ring or T == 1:
        place = view.index % view.slots if view.ring else view.index
        slots = lax.dynamic_update_slice(slots, new, (0, 0, place, 0))
        return slots, new if view.fresh else slots
    past = (view.index + jnp.arange(view.slots)) % view.slots  # from the oldest to the newest
    keys = new if view.fresh else jnp.concatenate([jnp.take(slots, past, axis=2), new], 2)
    kept = min(T, view.slots)
    places = (view.index + T - kept + jnp.arange(kept)) % view.slots
    return slots.at[:, :, places].set(new[:, :, T - kept :]), keys


def reorder(cache: Cache, rows: Array) -> Cache:
    """The cache with these rows in this order. rows: int [B']."""
    return jax.tree_util.tree_map(lambda x: x if x.ndim == 0 else x[rows], cache)
