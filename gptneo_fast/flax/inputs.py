"""Checks of what a caller passes, on the host, before anything runs; what jax is tracing has no values to look at."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from torch import Tensor

from ..config import GPTNeoConfig
from ..errors import CacheError, InputError, short
from .attention import Cache


def known(x: Any) -> bool:
    """Whether an array has values now."""
    return not isinstance(x, jax.core.Tracer)


def as_array(name: str, values: Any) -> Array:
    """Numbers as an array of jax.

    Raises:
        InputError: something that is none.
    """
    try:
        return jnp.asarray(np.asarray(values) if isinstance(values, Tensor) else values)
    except (OverflowError, TypeError, ValueError):
        raise InputError(f"{name} is {short(values)}; give an array of numbers") from None


def as_key(name: str, key: Any) -> Array:
    """A key of jax's random numbers, of either kind.

    Raises:
        InputError: something else.
    """
    found = as_array(name, key)
    raw = jnp.issubdtype(found.dtype, jnp.unsignedinteger) and found.shape == (2,)
    if not raw and not (jnp.issubdtype(found.dtype, jax.dtypes.prng_key) and found.shape == ()):
        raise InputError(f"{name} is {short(key)}; give jax.random.PRNGKey(...)")
    return found


def checked_ids(name: str, ids: Any, limit: int) -> Array:
    """Integer ids [B, T] as int32.

    Raises:
        InputError: another kind or shape, or a value that is not from 0 to limit - 1; names its place.
    """
    if isinstance(ids, (list, tuple, Tensor)):
        try:
            ids = np.asarray(ids)
        except (TypeError, ValueError):
            raise InputError(f"{name} is {short(ids)}; give rows of integers of one length") from None
    dtype = getattr(ids, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.integer):
        raise InputError(f"{name} is {f'of dtype {dtype}' if dtype is not None else type(ids).__name__}; give integers [B, T]")
    if len(ids.shape) != 2 or ids.shape[1] == 0 or ids.shape[0] == 0:
        raise InputError(f"{name} has shape {list(ids.shape)}; expected [B, T] with B and T of at least 1")
    if known(ids):
        values = np.asarray(ids)
        if bad := np.argwhere((values < 0) | (values >= limit)).tolist():
            row, column = bad[0]
            raise InputError(f"{name}[{row}, {column}] is {values[row, column]}; it must be from 0 to {limit - 1}")
    return jnp.asarray(ids, jnp.int32)


def checked_call(
    config: GPTNeoConfig, input_ids: Any, attention_mask: Any, position_ids: Any, cache: Cache | None
) -> tuple[Array, Array | None, Array, bool]:
    """(ids [B, T], mask or None, positions [B, T], whether the cache is known to be empty) of a forward call.

    Raises:
        InputError, CacheError: what does not fit, with the limit.
    """
    ids = checked_ids("input_ids", input_ids, config.vocab_size)
    (B, T), limit = ids.shape, config.max_position_embeddings
    past: Any = 0
    length = T
    if cache is not None:
        past, length = _room(config, cache, B, T)
    mask = None if attention_mask is None else as_array("attention_mask", attention_mask)
    if mask is not None and mask.shape != (B, length):
        about = f"[{B}, {length}], of all the cache's columns" if cache is not None else f"[{B}, {length}]"
        raise InputError(f"attention_mask has shape {list(mask.shape)}; expected {about}")
    if position_ids is None:
        if known(past) and int(past) + T > limit:
            raise InputError(f"{int(past)} cached + {T} new tokens exceed the model's {limit} positions")
        positions = jnp.broadcast_to(past + jnp.arange(T, dtype=jnp.int32), (B, T))
    else:
        positions = checked_ids("position_ids", position_ids, limit)
        if positions.shape[1] != T or positions.shape[0] not in (1, B):
            raise InputError(f"position_ids has shape {list(positions.shape)}; expected [{B}, {T}]")
        positions = jnp.broadcast_to(positions, (B, T))
    return ids, mask, positions, cache is not None and known(past) and int(past) == 0


def _room(config: GPTNeoConfig, cache: Cache, B: int, T: int) -> tuple[Any, int]:
    """(columns held, columns in all) of a cache that a call of [B, T] fits into."""
    if not isinstance(cache, dict) or set(cache) != {"index", "keys", "values"} or len(cache["keys"]) != config.num_layers:
        raise CacheError("past_key_values is not what init_cache or an earlier call of this model gave")
    shapes = [cache["keys"][str(layer)].shape for layer in range(config.num_layers)]
    if shapes[0][0] != B:
        raise CacheError(f"past_key_values has {shapes[0][0]} rows and input_ids {B}; make it with init_cache({B}, max_length)")
    rings = all(shape[2] == config.window(layer) for layer, shape in enumerate(shapes))
    length = config.max_position_embeddings if rings else max(shape[2] for shape in shapes)
    index = cache["index"]
    if known(index) and int(index) + T > length:
        raise CacheError(f"the cache has {length} columns: {int(index)} held + {T} new do not fit; init_cache with more")
    return index, length
