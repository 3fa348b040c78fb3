"""FlaxGPTNeoPreTrainedModel, what the two classes share, and FlaxGPTNeoModel."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from ..checkpoint import save
from ..config import GELU_NEW, GPTNeoConfig, is_int
from ..config.rules import SHAPE
from ..errors import ConfigError, InputError, short
from ..generation.config import GenerationConfig
from ..generation.options import plain
from ..models import causal as heads
from . import network, weights
from .attention import Cache, empty_cache
from .inputs import as_key, checked_call
from .network import Spec, Traced
from .outputs import FlaxBaseModelOutputWithPast, FlaxOutput
from .weights import Tree

_SHAPING = (*sorted(SHAPE), "num_layers", "vocab_size", "max_position_embeddings", "tie_word_embeddings")
_STATIC = ("spec", "causal", "fresh", "want_hidden", "want_weights")


@partial(jax.jit, static_argnames=_STATIC)
def _forward(
    params: Tree, ids: Array, positions: Array, mask: Array | None, cache: Cache | None, key: Array | None, **static: Any
) -> tuple[Array, Traced]:
    """(logits or hidden states, what was traced)."""
    spec, causal = static.pop("spec"), static.pop("causal")
    traced = network.trunk(params, spec, ids, positions, mask, cache, dropout_key=key, **static)
    return network.head(params, spec, traced.last) if causal else traced.last, traced


class FlaxGPTNeoPreTrainedModel:
    """Base of the two classes: parameters, files, casts and the compiled forward pass.

    Args:
        config: of the model.
        input_shape: taken for the sake of transformers' callers; nothing depends on it.
        seed: of the fresh weights.
        dtype: of the computation, `jnp.float32`, `jnp.bfloat16` or `jnp.float16`; parameters keep theirs (see `to_bf16`).
        _do_init: False makes no parameters: pass `params=` in calls.

    Raises:
        InputError: the configuration or dtype is of another kind.
    """

    base_model_prefix: ClassVar[str] = "transformer"
    framework: ClassVar[str] = "flax"
    _causal: ClassVar[bool]
    _torch_class: ClassVar[Any]

    def __init__(
        self,
        config: GPTNeoConfig,
        input_shape: tuple[int, ...] = (1, 1),
        seed: int = 0,
        dtype: Any = jnp.float32,
        _do_init: bool = True,
    ) -> None:
        if not isinstance(config, GPTNeoConfig):
            raise InputError(f"config is a {type(config).__name__}; give a gptneo_fast.GPTNeoConfig")
        try:
            found: Any = jnp.dtype(dtype)
        except (TypeError, ValueError):
            found = None
        if found is None or not jnp.issubdtype(found, jnp.floating):
            raise InputError(
                f"dtype {short(dtype) if found is None else found} is not floating point; "
                "use jnp.float32, jnp.bfloat16 or jnp.float16"
            )
        if config.activation_function not in GELU_NEW:
            raise InputError(
                f"activation_function {config.activation_function!r} is not offered by the Flax classes, which compute "
                f"{GELU_NEW[0]}; use the torch class of the same name"
            )
        if not is_int(seed) or not 0 <= seed < 2**63:
            raise InputError(f"seed={short(seed)} is not an integer from 0 to 2**63 - 1")
        self.config, self.input_shape = config, input_shape
        self.dtype = dtype
        self.key = jax.random.PRNGKey(seed)
        self.generation_config = GenerationConfig.from_model_config(config) if self.can_generate() else None
        object.__setattr__(config, "in_use", True)
        self._built = {name: getattr(config, name) for name in _SHAPING}
        self._is_initialized = _do_init
        self._params: Tree | None = self.init_weights(self.key, input_shape) if _do_init else None

    @property
    def _spec(self) -> Spec:
        """Of the configuration as it is now.

        Raises:
            ConfigError: a field that shapes the parameters is no longer what the model was built with.
        """
        for name, was in self._built.items():
            if (now := getattr(self.config, name)) != was:
                raise ConfigError(
                    f"config.{name} is {short(now)} and the model was built with {short(was)}, which its parameters follow; "
                    f"set it back, or build another model of config.replace({name}=...)"
                )
        if len(self.config.attention_layers) != self.config.num_layers:
            self.config.check()
        return Spec.of(self.config, self.dtype)

    @property
    def params(self) -> Tree:
        """The parameter tree, nested dicts of arrays: `transformer/h/0/attn/attention/q_proj/kernel`, ...

        Raises:
            InputError: made with `_do_init=False`, or set to a tree that lacks a parameter.
        """
        if self._params is None:
            raise InputError("the model was made with _do_init=False and keeps no params; pass params= in calls")
        return self._params

    @params.setter
    def params(self, params: Any) -> None:
        if not self._is_initialized:
            raise InputError("the model was made with _do_init=False and keeps no params; pass params= in calls")
        self._params = weights.checked(params, self.config, self._causal)

    def _tree(self, params: Any) -> Tree:
        """The parameters of a call: those that are passed, or the model's own."""
        if params is None:
            return self.params
        trunk = params.get("transformer") if self._causal and isinstance(params, Mapping) else params
        if not isinstance(trunk, Mapping) or not {"wte", "wpe", "h", "ln_f"} <= set(trunk):
            raise InputError(f"params is {short(params)}; give a tree such as model.params")
        return params

    @property
    def params_shape_tree(self) -> Tree:
        """The tree with shapes and dtypes in place of arrays."""
        return jax.eval_shape(partial(weights.fresh, self.config, self._causal), self.key)

    @property
    def required_params(self) -> set[tuple[str, ...]]:
        """Paths of all parameters."""
        return {tuple(path.split("/")) for path in weights.shapes(self.config, self._causal)}

    @classmethod
    def can_generate(cls) -> bool:
        """Whether the class has `generate`."""
        return hasattr(cls, "generate")

    def num_parameters(self) -> int:
        """Number of parameters, tied ones counted once."""
        return sum(x.size for x in jax.tree_util.tree_leaves(self.params_shape_tree))

    def init_weights(self, rng: Array, input_shape: tuple[int, ...] = (1, 1), params: Any = None) -> Tree:
        """A tree of fresh weights; with `params`, a tree that lacks some, these complete it."""
        tree = weights.fresh(self.config, self._causal, rng)
        return tree if params is None else weights.checked(weights.merged(tree, params), self.config, self._causal)

    def init_cache(self, batch_size: int, max_length: int) -> Cache:
        """An empty cache for `past_key_values`; opaque, but a tree of arrays with the batch first.

        Local layers keep `window_size` slots whatever `max_length` is.

        Raises:
            InputError: a size below 1, or more columns than the model has positions.
        """
        limit = self.config.max_position_embeddings
        batch_size, max_length = plain(batch_size), plain(max_length)
        if not (is_int(batch_size) and is_int(max_length) and 1 <= batch_size < 2**31 and 1 <= max_length <= limit):
            raise InputError(
                f"init_cache({short(batch_size)}, {short(max_length)}): the batch is at least 1, the length from 1 to {limit}"
            )
        D = self.config.head_dim
        return empty_cache(batch_size, max_length, self._spec.windows, self._spec.heads, D, self._spec.dtype)

    def __call__(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        position_ids: Any = None,
        params: Any = None,
        past_key_values: Cache | None = None,
        dropout_rng: Array | None = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Logits (of the causal class) or hidden states of T new tokens; compiled for each shape of the input.

        Args:
            input_ids: integer [B, T], from 0 to V - 1.
            attention_mask: [B, T], zero for padding; with a cache [B, max_length], of its columns. None: no padding.
            position_ids: integer [B, T]; None counts columns from the past length on, whatever the mask says.
            params: tree to use instead of the model's own.
            past_key_values: of `init_cache` or an earlier output; the output has the one that follows.
            dropout_rng: key for dropout. train: apply dropout, where the configuration has any.
            output_attentions, output_hidden_states, return_dict: None takes the configuration's.

        Returns:
            FlaxCausalLMOutput or FlaxBaseModelOutputWithPast, or with `return_dict=False` the tuple of it.

        Raises:
            InputError, CacheError: what does not fit, with the limit. Under jax.jit values are not known and not checked.
        """
        config, spec = self.config, self._spec
        ids, mask, positions, fresh = checked_call(config, input_ids, attention_mask, position_ids, past_key_values)
        if train and dropout_rng is None and (spec.embed_dropout or spec.attention_dropout or spec.resid_dropout):
            raise InputError("train=True and the configuration has dropout: pass dropout_rng=jax.random.PRNGKey(...)")
        main, traced = _forward(
            self._tree(params),
            ids,
            positions,
            mask,
            past_key_values,
            as_key("dropout_rng", dropout_rng) if train and dropout_rng is not None else None,
            spec=spec,
            causal=self._causal,
            fresh=fresh,
            want_hidden=config.output_hidden_states if output_hidden_states is None else output_hidden_states,
            want_weights=config.output_attentions if output_attentions is None else output_attentions,
        )
        out = self._output(main, traced)
        return out if (config.return_dict if return_dict is None else return_dict) else out.to_tuple()

    def _output(self, main: Array, traced: Traced) -> FlaxOutput:
        raise NotImplementedError

    # Casts: new trees, as the parameters are not the model's alone

    def to_bf16(self, params: Any, mask: Any = None) -> Tree:
        """`params` with floating-point leaves in bfloat16; with `mask`, a tree of bools, only where it is True."""
        return weights.cast(params, jnp.bfloat16, mask)

    def to_fp16(self, params: Any, mask: Any = None) -> Tree:
        """The same in float16."""
        return weights.cast(params, jnp.float16, mask)

    def to_fp32(self, params: Any, mask: Any = None) -> Tree:
        """The same in float32."""
        return weights.cast(params, jnp.float32, mask)

    # Files

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        dtype: Any = jnp.float32,
        *,
        _do_init: bool = True,
        from_pt: bool = False,
        **options: Any,
    ) -> Any:
        """A model from a folder or hub id: safetensors, `pytorch_model.bin` or `flax_model.msgpack`, whole or in shards.

        Args:
            dtype: of the computation; the parameters keep the checkpoint's.
            _do_init: False returns (model, params) and the model keeps none.
            from_pt: accepted and not needed: what the files hold is seen.
            options: of GPTNeoForCausalLM.from_pretrained (config, revision, token, cache_dir, local_files_only, subfolder,
                from_flax, strict, ...), or fields of the configuration to override.

        Raises:
            ModelNotFoundError, CheckpointError, ConfigError, InputError: each says what to do.
        """
        torch_model = cls._torch_class.from_pretrained(pretrained_model_name_or_path, backend="reference", **options)
        model = cls(torch_model.config, dtype=dtype, _do_init=False)
        if model.can_generate():
            model.generation_config = torch_model.generation_config
        state = torch_model.state_dict()
        del torch_model
        params = weights.from_torch(state, model.config, cls._causal)
        if not _do_init:
            return model, params
        model._is_initialized, model._params = True, params
        return model

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        params: Any = None,
        *,
        max_shard_size: int | str = "10GB",
        safe_serialization: bool = False,
    ) -> None:
        """Write config.json, generation_config.json and flax_model.msgpack, which transformers 4.57 loads too.

        Args:
            params: tree to write instead of the model's own.
            safe_serialization: write safetensors in torch's layout instead, for the torch classes and transformers 5.

        Raises:
            CheckpointError: the folder cannot be written to, or the disk is full; what was there still is.
        """
        tree = weights.checked(self.params if params is None else params, self.config, self._causal)
        name = type(self).__name__.removeprefix("Flax")
        config = self.config.replace(architectures=[name], dtype=str(jax.tree_util.tree_leaves(tree)[0].dtype))
        texts = {"config.json": config.to_json_string()}
        if self.generation_config is not None:
            texts["generation_config.json"] = self.generation_config.file_text()
        if safe_serialization:
            save(weights.to_torch(tree), Path(save_directory), max_shard_size, texts)
        else:
            weights.save_msgpack(tree, Path(save_directory), max_shard_size, texts)


class FlaxGPTNeoModel(FlaxGPTNeoPreTrainedModel):
    """The trunk in JAX: token ids to hidden states."""

    _causal = False
    _torch_class = heads.GPTNeoModel

    def _output(self, main: Array, traced: Traced) -> FlaxOutput:
        return FlaxBaseModelOutputWithPast(main, traced.cache, traced.hidden_states, traced.attentions)
