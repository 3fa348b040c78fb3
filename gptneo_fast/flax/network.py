"""The forward pass in JAX: pure functions of a parameter tree with the names of transformers 4.57's Flax classes.

Kernels are [in, out]. Layers compute in `Spec.dtype`; what is added up between them has the wider dtype of
that and the embeddings.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import Array, lax

from ..config import GPTNeoConfig
from .attention import Cache, View, append, attend, attend_banded, visible

Params = Any  # nested dict of arrays
_FEW_ROWS = 32  # up to so many, the head on the CPU reads its weight once for each row


class Spec(NamedTuple):
    """What a forward pass needs to know of a configuration; hashable, as jit wants it."""

    windows: tuple[int, ...]  # keys that a query of each layer sees; 0 for all
    heads: int
    eps: float
    tied: bool
    embed_dropout: float
    attention_dropout: float
    resid_dropout: float
    dtype: Any  # of the computation

    @classmethod
    def of(cls, config: GPTNeoConfig, dtype: Any) -> Spec:
        """The part of a configuration that the computation follows from."""
        windows = tuple(config.window(layer) for layer in range(config.num_layers))
        rates = (config.embed_dropout, config.attention_dropout, config.resid_dropout)
        return cls(windows, config.num_heads, config.layer_norm_epsilon, config.tie_word_embeddings, *rates, jnp.dtype(dtype))


class Traced(NamedTuple):
    """What a pass gives: hidden states [B, T, C], and what was asked for beside them."""

    last: Array
    cache: Cache | None
    hidden_states: tuple[Array, ...] | None  # L + 1 of [B, T, C]
    attentions: tuple[Array, ...] | None  # L of [B, H, T, keys]


class _Dropout:
    """Drops elements with a new key at each use; without a key it drops nothing."""

    def __init__(self, key: Array | None) -> None:
        self.key = key

    def __call__(self, rate: float, x: Array) -> Array:
        if self.key is None or not rate:
            return x
        self.key, key = jax.random.split(self.key)
        return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0) if rate < 1 else jnp.zeros_like(x)


def trunk_of(params: Params) -> Params:
    """The base model's part of a tree."""
    return params.get("transformer", params)


def trunk(
    params: Params,
    spec: Spec,
    ids: Array,
    positions: Array,
    mask: Array | None = None,
    cache: Cache | None = None,
    *,
    fresh: bool = False,
    dropout_key: Array | None = None,
    want_hidden: bool = False,
    want_weights: bool = False,
) -> Traced:
    """Token ids to the hidden states after the final norm.

    Args:
        params: tree of the base model, or of a model around it.
        ids, positions: int [B, T], taken as they are: callers check them.
        mask: [B, S] of the cache's columns, [B, T] without a cache; nonzero for tokens.
        cache: what `empty_cache` or an earlier call gave; not changed.
        fresh: the cache is known to be empty, which spares attending to it.
        dropout_key: of the random generator, None for no dropout.
    """
    tree, drop, T = trunk_of(params), _Dropout(dropout_key), ids.shape[1]
    alone = fresh or cache is None
    held = None if mask is None else (mask[:, :T] if alone else mask) != 0
    views: dict[int, View] = {}
    for i, window in enumerate(spec.windows):
        slots = T if cache is None else cache["keys"][str(i)].shape[2]
        views[window] = View(window, T, 0 if cache is None or fresh else cache["index"], slots, alone, held)
    attention = None if dropout_key is None or not spec.attention_dropout else partial(drop, spec.attention_dropout)
    banded = {w: alone and not want_weights and attention is None and 0 < 2 * w < T for w in views}
    seen = {w: None if banded[w] else visible(view) for w, view in views.items()}
    wte, wpe = tree["wte"]["embedding"], tree["wpe"]["embedding"]
    wide = jnp.promote_types(wte.dtype, spec.dtype)
    x = drop(spec.embed_dropout, wte[ids].astype(wide) + wpe[positions].astype(wide))
    keys: dict[str, Array] = {}
    values: dict[str, Array] = {}
    hidden, weights = [x], []
    for i, window in enumerate(spec.windows):
        layer, name = tree["h"][str(i)], str(i)
        p = layer["attn"]["attention"]
        y = layer_norm(layer["ln_1"], x, spec)
        q, k, v = (_split(linear(p[f"{n}_proj"], y, spec), spec.heads) for n in "qkv")
        if cache is not None:
            keys[name], k = append(cache["keys"][name], k, views[window])
            values[name], v = append(cache["values"][name], v, views[window])
        if banded[window]:
            y = attend_banded(q, k, v, window, held)
        else:
            y, w = attend(q, k, v, cast(Array, seen[window]), attention)
            weights += [w] if want_weights else []
        x = x + drop(spec.resid_dropout, linear(p["out_proj"], _merge(y), spec))
        y = linear(layer["mlp"]["c_fc"], layer_norm(layer["ln_2"], x, spec), spec)
        y = linear(layer["mlp"]["c_proj"], jax.nn.gelu(y, approximate=True), spec)
        x = x + drop(spec.resid_dropout, y)
        hidden += [x] if want_hidden else []
    last = layer_norm(tree["ln_f"], x, spec)
    new = None if cache is None else {"index": cache["index"] + T, "keys": keys, "values": values}
    return Traced(last, new, (*hidden[:-1], last) if want_hidden else None, tuple(weights) if want_weights else None)


def head(params: Params, spec: Spec, hidden: Array) -> Array:
    """Logits [..., V] of hidden states [..., C], in the dtype of the computation."""
    x = hidden.astype(spec.dtype).reshape(-1, hidden.shape[-1])
    precision = _precision(spec)
    if not spec.tied:
        logits = jnp.matmul(x, params["lm_head"]["kernel"].astype(spec.dtype), precision=precision)
    else:
        wte = trunk_of(params)["wte"]["embedding"].astype(spec.dtype)  # [V, C]
        if 1 < len(x) <= _FEW_ROWS and jax.default_backend() == "cpu":
            # In a loop XLA's CPU compiler writes the whole embedding transposed at each step: 381 ms for 4 rows of the
            # 125m size, and 37 ms so.
            logits = lax.map(partial(jnp.matmul, wte, precision=precision), x)
        else:
            logits = lax.dot_general(x, wte, (((1,), (1,)), ((), ())), precision=precision)
    return logits.reshape(*hidden.shape[:-1], -1)


def layer_norm(p: Params, x: Array, spec: Spec) -> Array:
    """LayerNorm over the last axis with biased variance, in float32 inside, in two passes."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    centred = x - x.mean(-1, keepdims=True)
    scale = lax.rsqrt((centred * centred).mean(-1, keepdims=True) + spec.eps)
    return (centred * (scale * p["scale"]) + p["bias"]).astype(spec.dtype)


def linear(p: Params, x: Array, spec: Spec) -> Array:
    """x @ kernel + bias, where there is one."""
    y = jnp.matmul(x.astype(spec.dtype), p["kernel"].astype(spec.dtype), precision=_precision(spec))
    return y + p["bias"].astype(spec.dtype) if "bias" in p else y


def _precision(spec: Spec) -> Any:
    return lax.Precision.HIGHEST if spec.dtype == jnp.float32 else None


def _split(x: Array, heads: int) -> Array:
    """[B, T, C] to [B, H, T, D]."""
    return x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)


def _merge(x: Array) -> Array:
    """[B, H, T, D] to [B, T, C]."""
    return x.transpose(0, 2, 1, 3).reshape(x.shape[0], x.shape[2], -1)
