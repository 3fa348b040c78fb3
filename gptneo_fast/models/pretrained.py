"""GPTNeoPreTrainedModel: what the five classes share beside their forward pass: files, dtype, embeddings, checkpointing."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar, cast

import torch
from torch import Tensor, nn

from .. import checkpoint
from ..config import GPTNeoConfig
from ..device import as_device, as_dtype
from ..errors import CheckpointError, InputError, UnknownOptionError, nearest
from ..files.hub import Source
from ..generation.config import GenerationConfig
from ..network.cache import cache_bytes
from ..network.touch import Watched
from ..ops import backends

if TYPE_CHECKING:
    from .model import GPTNeoModel

Forward = TypeVar("Forward", bound=Callable[..., Any])
_QUANTISED = ("load_in_8bit", "load_in_4bit", "quantization_config")


def returns_output(forward: Forward) -> Forward:
    """Serve `return_dict`: the output of a class's `forward`, or its tuple where the call or the configuration wants that."""
    place = list(inspect.signature(forward).parameters).index("return_dict") - 1

    @functools.wraps(forward)
    def call(self: Any, *args: Any, **keywords: Any) -> Any:
        asked = args[place] if len(args) > place else keywords.get("return_dict")
        out = forward(self, *args, **keywords)
        return out if (self.config.return_dict if asked is None else asked) else out.to_tuple()

    return cast(Forward, call)


class GPTNeoPreTrainedModel(Watched):
    """Base of the five classes."""

    base_model_prefix: ClassVar[str] = "transformer"
    config: GPTNeoConfig
    tokenizer: Any = None  # attached by `load`

    def __init__(self, config: GPTNeoConfig, *, backend: str = "auto") -> None:
        super().__init__()
        if not isinstance(config, GPTNeoConfig):
            raise InputError(f"config is a {type(config).__name__}; give a gptneo_fast.GPTNeoConfig")
        backends.check(backend)  # an impossible request fails here, not in the first call
        self.config = config

    @property
    def base_model(self) -> GPTNeoModel:
        """The trunk: self for GPTNeoModel, `self.transformer` for the others."""
        found: Any = getattr(self, self.base_model_prefix, self)
        return found

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parameters."""
        return next(self.parameters()).dtype

    @property
    def backend(self) -> backends.Choice:
        """What computes a call without gradients on the present device and dtype, and why.

        Raises:
            SetupError: backend="triton" was asked for and cannot be had there.
        """
        return backends.choose(self.base_model.requested_backend, self.device, self.dtype)

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Number of parameters, tied ones counted once."""
        embeddings = {id(self.base_model.wte.weight), id(self.base_model.wpe.weight)} if exclude_embeddings else set()
        return sum(p.numel() for p in self.parameters() if (p.requires_grad or not only_trainable) and id(p) not in embeddings)

    def cache_bytes(self, batch: int, length: int) -> int:
        """Bytes of the key-value cache for `batch` rows of `length` tokens."""
        return cache_bytes(self.config, batch, length, self.dtype)

    def can_generate(self) -> bool:
        """Whether the class has `generate`."""
        return hasattr(self, "generate")

    # Embeddings

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding `wte`."""
        return self.base_model.wte

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Use another token embedding."""
        self.base_model.wte = value
        self.tie_weights()

    def get_output_embeddings(self) -> nn.Linear | None:
        """The language-model head, where the class has one."""
        return getattr(self, "lm_head", None)

    def tie_weights(self) -> None:
        """Make the head share the embedding's weight where the configuration ties them."""
        head = self.get_output_embeddings()
        if head is not None and self.config.tie_word_embeddings:
            head.weight = self.base_model.wte.weight

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Grow or shrink the vocabulary; the rows that stay keep their values.

        Args:
            new_num_tokens: rows; None for as many as there are.
            pad_to_multiple_of: round that up.
            mean_resizing: new rows start as the mean of the old ones, so that they change no other probability much;
                False draws them as a fresh model does.
        """
        old = self.base_model.wte.weight
        size = old.shape[0] if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of:
            size = -(-size // pad_to_multiple_of) * pad_to_multiple_of
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise InputError(f"new_num_tokens {new_num_tokens!r} is not a positive integer")
        if size == old.shape[0]:
            return self.base_model.wte
        head = self.get_output_embeddings()
        std = self.config.initializer_range
        wte = nn.Embedding(size, old.shape[1], device="meta")
        wte.weight = _resized(old, size, mean_resizing, std)
        if head is not None:
            head.out_features = size
            head.weight = wte.weight if head.weight is old else _resized(head.weight, size, mean_resizing, std)
        self.base_model.wte = wte
        object.__setattr__(self.config, "vocab_size", size)  # shared by trunk and head; nothing else is shaped by it
        return self.base_model.wte

    # Training

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether blocks are recomputed in the backward pass."""
        return self.base_model.gradient_checkpointing

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Recompute blocks in the backward pass instead of keeping their activations (non-reentrant)."""
        if (gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            raise InputError("use_reentrant=True is not offered; leave it out")
        self.base_model.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations."""
        self.base_model.gradient_checkpointing = False

    def _init_weights(self, module: nn.Module) -> None:
        """The initialisation of transformers: normal weights, zero biases, ones for norms."""
        if isinstance(module, (nn.Linear, nn.Embedding)) and not module.weight.is_meta:
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    # Files

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | Source,
        *,
        config: GPTNeoConfig | None = None,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device_map: Any = None,
        backend: str = "auto",
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        subfolder: str = "",
        use_safetensors: bool | None = None,
        allow_pickle: bool = True,
        from_flax: bool = False,
        check_finite: bool = True,
        strict: bool = True,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        attn_implementation: str | None = None,
        **others: Any,
    ) -> Any:
        """A model from a folder or hub id, in eval mode; behaves as in transformers.

        Args:
            dtype: torch dtype, its name, or "auto" (the default): the configuration's, else that of the weights.
            device_map: one device ("cpu", "cuda:1", "auto", {"": device}); None for the CPU.
            backend: "auto": kernels on CUDA devices of capability 8.0 and up, plain torch elsewhere and for gradients;
                "triton" and "reference": that or an error. `model.backend` says what it came to.
            use_safetensors: True for safetensors only, False for `pytorch_model.bin` only.
            allow_pickle: False refuses a checkpoint that has `pytorch_model.bin` only; no code in one is run either way.
            from_flax: read `flax_model.msgpack`, which is read anyhow where nothing else is there; needs no jax.
            check_finite: refuse NaN, infinities and values that dtype cannot hold.
            strict: refuse surplus tensors and an lm_head unlike the embedding it is tied to.
            ignore_mismatched_sizes: start a head of another size afresh.
            output_loading_info: return (model, info) with the keys missing, unexpected and mismatched.
            attn_implementation: "eager" or None; other kernels are chosen by `backend`.
            others: fields of the configuration to override (num_labels=3, pad_token_id=50256, ...).

        Raises:
            ModelNotFoundError, CheckpointError, ConfigError, InputError, SetupError: each says what to do.
        """
        overrides = _screen(others, attn_implementation)
        source = Source.of(
            pretrained_model_name_or_path,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
            subfolder=subfolder,
        )
        config = GPTNeoConfig.from_source(source, **overrides) if config is None else config.replace(**overrides)
        wanted = dtype if dtype is not None else torch_dtype
        chosen = as_dtype("auto" if wanted is None else wanted) or as_dtype(config.dtype or "auto")
        with torch.device("meta"):
            model = cls(config, backend=backend)
        device = as_device(device_map)
        with source.reading(), checkpoint.find(source, use_safetensors, allow_pickle, from_flax).open() as tensors:
            report = checkpoint.load_into(
                model,
                tensors,
                dtype=chosen,
                device=device,
                where=source.name,
                strict=strict,
                ignore_mismatched_sizes=ignore_mismatched_sizes,
                check_finite=check_finite,
            )
        for key in report.missing_keys:
            model._init_weights(model.get_submodule(key.rpartition(".")[0]))
        config.dtype = str(model.dtype).removeprefix("torch.")
        if model.can_generate():
            setattr(model, "generation_config", GenerationConfig.from_source(source, config))  # noqa: B010 (not of every class)
        model.eval()
        assert model.backend  # a request that this device cannot fulfil fails here, not in the first call
        return (model, vars(report)) if output_loading_info else model

    @classmethod
    def from_config(cls, config: GPTNeoConfig, **options: Any) -> Self:
        """A freshly initialised model."""
        return cls(config, **options)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        max_shard_size: int | str = "50GB",
        state_dict: dict[str, Tensor] | None = None,
        safe_serialization: bool = True,
    ) -> None:
        """Write config.json, generation_config.json and safetensors that gptneo_fast and transformers load.

        Raises:
            CheckpointError: `safe_serialization=False`, as pickles are read but not written; or the folder cannot be written
                to, and what was there still is.
        """
        if not safe_serialization:
            raise CheckpointError("safe_serialization=False would write a pickle; safetensors are all that is written")
        tensors = dict(state_dict if state_dict is not None else self.state_dict())
        if self.config.tie_word_embeddings:
            tensors.pop("lm_head.weight", None)
        config = self.config.replace(architectures=[type(self).__name__], dtype=str(self.dtype))
        texts = {"config.json": config.to_json_string()}
        if isinstance(generation := getattr(self, "generation_config", None), GenerationConfig):
            texts["generation_config.json"] = generation.to_json_string()
        checkpoint.save(tensors, Path(save_directory), max_shard_size, texts)


def _screen(others: dict[str, Any], attn_implementation: str | None) -> dict[str, Any]:
    """Config overrides among the keywords of `from_pretrained`; what means nothing here is dropped or refused."""
    if attn_implementation not in (None, "eager"):
        raise InputError(
            f"attn_implementation {attn_implementation!r} is not offered: gptneo_fast brings its own kernels, exact past "
            "the window; leave it out and choose with backend='auto', 'triton' or 'reference'"
        )
    if asked := [k for k in _QUANTISED if others.get(k)]:
        raise InputError(f"{asked[0]} is not offered; use dtype=torch.bfloat16 or torch.float16")
    for harmless in ("low_cpu_mem_usage", "trust_remote_code", "proxies", *_QUANTISED):
        others.pop(harmless, None)
    fields = {*GPTNeoConfig.__dataclass_fields__, *GPTNeoConfig.aliases, "num_labels"}
    options = inspect.signature(GPTNeoPreTrainedModel.from_pretrained).parameters
    for name in others:
        if name not in fields:
            raise UnknownOptionError(f"from_pretrained has no option {name!r}{nearest(name, {*fields, *options})}")
    return others


def _resized(old: Tensor, size: int, mean: bool, std: float) -> nn.Parameter:
    new = old.new_empty(size, old.shape[1])
    kept = min(size, old.shape[0])
    with torch.no_grad():
        new[:kept] = old[:kept]
        if size > kept:
            new[kept:] = old.float().mean(0) if mean else torch.randn_like(new[kept:]) * std
    return nn.Parameter(new, requires_grad=old.requires_grad)
