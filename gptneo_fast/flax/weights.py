"""Parameter trees: their names and shapes, from torch and back, initialisation, casts, and files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import serialization
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from ..checkpoint.files import FLAX
from ..checkpoint.msgpack import torch_name
from ..config import GPTNeoConfig
from ..errors import CheckpointError, InputError
from ..files.atomic import appearing, write_into

Tree = dict[str, Any]
_OURS = r"flax_model(-\d{5}-of-\d{5})?\.msgpack(\.index\.json)?"


def shapes(config: GPTNeoConfig, causal: bool) -> dict[str, tuple[int, ...]]:
    """Path of every parameter, such as `h/0/ln_1/scale`, and its shape."""
    C, F, V, P = config.hidden_size, config.ffn_size, config.vocab_size, config.max_position_embeddings
    norm: dict[str, tuple[int, ...]] = {"scale": (C,), "bias": (C,)}
    block: dict[str, dict[str, tuple[int, ...]]] = {"ln_1": norm, "ln_2": norm}
    block |= {f"attn/attention/{name}": {"kernel": (C, C)} for name in ("q_proj", "k_proj", "v_proj")}
    block["attn/attention/out_proj"] = {"kernel": (C, C), "bias": (C,)}
    block |= {"mlp/c_fc": {"kernel": (C, F), "bias": (F,)}, "mlp/c_proj": {"kernel": (F, C), "bias": (C,)}}
    modules: dict[str, dict[str, tuple[int, ...]]] = {"wte": {"embedding": (V, C)}, "wpe": {"embedding": (P, C)}, "ln_f": norm}
    modules |= {f"h/{i}/{name}": leaves for i in range(config.num_layers) for name, leaves in block.items()}
    if causal:
        modules = {f"transformer/{name}": leaves for name, leaves in modules.items()}
        modules |= {} if config.tie_word_embeddings else {"lm_head": {"kernel": (C, V)}}
    return {f"{name}/{leaf}": shape for name, leaves in modules.items() for leaf, shape in leaves.items()}


def fresh(config: GPTNeoConfig, causal: bool, key: Array) -> Tree:
    """A tree as a new model has it, float32: normal weights, zero biases, ones for norms."""
    wanted = shapes(config, causal)
    flat = {}
    for path, one in zip(wanted, jax.random.split(key, len(wanted)), strict=True):
        leaf, shape = path.rpartition("/")[2], wanted[path]
        if leaf in ("scale", "bias"):
            flat[path] = jnp.full(shape, 1.0 if leaf == "scale" else 0.0, jnp.float32)
        else:
            flat[path] = config.initializer_range * jax.random.normal(one, shape, jnp.float32)
    return unflatten_dict(flat, sep="/")


def from_torch(state: dict[str, torch.Tensor], config: GPTNeoConfig, causal: bool) -> Tree:
    """The tree of a torch model's parameters, which are taken out of `state` one by one."""
    flat = {}
    for path in shapes(config, causal):
        value = _as_numpy(state.pop(torch_name(path)).detach())
        flat[path] = jnp.array(value.T if path.endswith("/kernel") else value)
    return unflatten_dict(flat, sep="/")


def to_torch(tree: Tree) -> dict[str, torch.Tensor]:
    """Parameters under torch's names, [out, in], on the CPU."""
    flat = flatten_dict(tree, sep="/")
    return {torch_name(path): _as_tensor(x.T if path.endswith("/kernel") else x) for path, x in flat.items()}


def checked(params: Any, config: GPTNeoConfig, causal: bool) -> Tree:
    """A caller's tree as nested dicts, with every parameter there and of its shape.

    Raises:
        InputError: a parameter is missing or of another shape; names it.
    """
    if not isinstance(params, Mapping):
        raise InputError(f"params is a {type(params).__name__}; give the tree of model.params")
    has = {"/".join(map(str, path)): jnp.shape(x) for path, x in flatten_dict(_unfrozen(params)).items()}
    for path, shape in shapes(config, causal).items():
        if path not in has:
            raise InputError(f"params has no {path!r}; give the tree of model.params, without an outer 'params'")
        if has[path] != shape:
            raise InputError(f"params has {path!r} of shape {list(has[path])}; the configuration asks for {list(shape)}")
    return _unfrozen(params)


def merged(tree: Tree, params: Any) -> Tree:
    """`params`, with what it lacks taken from `tree`."""
    return unflatten_dict(flatten_dict(tree) | flatten_dict(_unfrozen(params)))


def cast(params: Any, dtype: Any, mask: Any = None) -> Tree:
    """A new tree whose floating-point leaves are of `dtype`; where `mask`, a tree of bools, is False they stay."""

    def one(x: Any, chosen: bool = True) -> Any:
        return x.astype(dtype) if chosen and jnp.issubdtype(jnp.asarray(x).dtype, jnp.floating) else x

    tree = _unfrozen(params)
    return jax.tree_util.tree_map(one, tree) if mask is None else jax.tree_util.tree_map(one, tree, _unfrozen(mask))


def save_msgpack(tree: Tree, folder: Path, max_shard_size: int | str, texts: dict[str, str]) -> None:
    """Write `flax_model.msgpack`, in shards with an index where it exceeds `max_shard_size`; all files appear, or none.

    Args:
        texts: other files of the checkpoint, name -> contents.

    Raises:
        CheckpointError: the folder cannot be written to; what was there still is.
    """
    from huggingface_hub.serialization import split_state_dict_into_shards_factory

    flat = flatten_dict(tree, sep="/")
    plan = split_state_dict_into_shards_factory(
        flat,
        get_storage_size=lambda x: x.size * x.dtype.itemsize,
        filename_pattern=FLAX.replace(".msgpack", "{suffix}.msgpack"),
        max_shard_size=max_shard_size,
    )
    with appearing(folder, CheckpointError, stale=_OURS) as part:
        for name, paths in plan.filename_to_tensors.items():
            shard = unflatten_dict({path: np.asarray(flat[path]) for path in paths}, sep="/")
            (part / name).write_bytes(serialization.msgpack_serialize(shard, in_place=True))
        if plan.is_sharded:
            texts = texts | {
                f"{FLAX}.index.json": json.dumps({"metadata": plan.metadata, "weight_map": plan.tensor_to_filename})
            }
        write_into(part, texts)


def _unfrozen(tree: Any) -> Tree:
    return {str(k): _unfrozen(v) if isinstance(v, Mapping) else v for k, v in tree.items()}


def _as_numpy(x: torch.Tensor) -> Any:
    return x.view(torch.int16).numpy().view(jnp.bfloat16) if x.dtype == torch.bfloat16 else x.numpy()


def _as_tensor(x: Array) -> torch.Tensor:
    value = np.ascontiguousarray(x)
    if value.dtype == jnp.bfloat16:
        return torch.from_numpy(value.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(value.copy())
