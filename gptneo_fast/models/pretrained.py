"""GPTNeoPreTrainedModel: what the five classes share beside their forward pass: files, dtype, embeddings, checkpointing."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar, cast

import torch
from torch import Tensor, nn

from .. import checkpoint
from ..config import GPTNeoConfig
from ..device import as_device, as_dtype
from ..errors import InputError, UnknownOptionError, warn_once
from ..files.hub import Source
from ..generation.config import GenerationConfig
from ..kinship import make_kin
from ..network import decoding
from ..network.cache import cache_bytes
from ..ops import backends
from . import loading, quantizing, resizing, saving
from .initialising import INITIALIZED, Initialising
from .quantizing import Quantizing
from .training import Training

if TYPE_CHECKING:
    from .model import GPTNeoModel

Forward = TypeVar("Forward", bound=Callable[..., Any])


def returns_output(forward: Forward) -> Forward:
    """Serve `return_dict`: the output of a class's `forward`, or its tuple where the call or the configuration wants that; and
    `cache`, which transformers 5.24 calls `past_key_values`.

    Raises:
        InputError: both of those two.
    """
    names = list(inspect.signature(forward).parameters)
    place = names.index("return_dict") - 1

    @functools.wraps(forward)
    def call(self: Any, *args: Any, **keywords: Any) -> Any:
        if "cache" in keywords and "past_key_values" in names:
            if keywords.get("past_key_values") is not None:
                raise InputError("cache and past_key_values are two names of one argument; give one")
            keywords["past_key_values"] = keywords.pop("cache")
        asked = args[place] if len(args) > place else keywords.get("return_dict")
        out = forward(self, *args, **keywords)
        return out if (self.config.return_dict if asked is None else asked) else out.to_tuple()

    return cast(Forward, call)


class GPTNeoPreTrainedModel(Training, Quantizing, Initialising):
    """Base of the five classes."""

    base_model_prefix: ClassVar[str] = "transformer"
    config_class: ClassVar[type[GPTNeoConfig]] = GPTNeoConfig
    main_input_name: ClassVar[str] = "input_ids"
    input_modalities: ClassVar[tuple[str, ...]] = ("text",)
    framework: ClassVar[str] = "pt"
    supports_gradient_checkpointing: ClassVar[bool] = True
    is_parallelizable: ClassVar[bool] = False
    accepts_loss_kwargs: ClassVar[bool] = False  # whether `forward` divides a loss by num_items_in_batch
    _no_split_modules: ClassVar[list[str]] = ["GPTNeoBlock"]  # names that accelerate, FSDP and peft ask for
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _keep_in_fp32_modules: ClassVar[list[str]] = []
    _keys_to_ignore_on_save: ClassVar[list[str] | None] = None
    config: GPTNeoConfig
    tokenizer: Any = None  # attached by `load`

    def __init__(self, config: GPTNeoConfig, *, backend: str = "auto", attn_implementation: str | None = None) -> None:
        super().__init__()
        loading.check_attention(attn_implementation)
        config = GPTNeoConfig.like(config)
        backends.check(backend)  # an impossible request fails here, not in the first call
        config.check()
        object.__setattr__(config, "in_use", True)
        self.config = config

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        decoding.forget(self.base_model)  # torch may swap parameters, and that only where nothing else holds them
        return super()._apply(fn, recurse)

    def load_state_dict(self, *args: Any, **keywords: Any) -> Any:
        """As torch's."""
        decoding.forget(self.base_model)
        return super().load_state_dict(*args, **keywords)

    @property
    def base_model(self) -> GPTNeoModel:
        """The trunk: self for GPTNeoModel, `self.transformer` for the others."""
        found: Any = getattr(self, self.base_model_prefix, self)
        return found

    @property
    def device(self) -> torch.device:
        """Device of the parameters; of those that accelerate keeps elsewhere until they are needed, where they compute."""
        found = next(self.parameters()).device
        return found if found.type != "meta" else self._execution_device(found)

    def _execution_device(self, otherwise: torch.device) -> torch.device:
        """Where the first module that has one of accelerate's hooks computes."""
        for module in self.modules():
            hook = vars(module).get("_hf_hook")
            for each in getattr(hook, "hooks", (hook,)):
                if (place := getattr(each, "execution_device", None)) is not None:
                    return torch.device(place)
        return otherwise

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
        asked = getattr(self.base_model, "requested_backend", "auto")  # of a trunk in somebody's wrapper, which says nothing
        return backends.choose(asked, self.device, self.dtype)

    def cache_bytes(self, batch: int, length: int) -> int:
        """Bytes of the key-value cache for `batch` rows of `length` tokens."""
        return cache_bytes(self.config, batch, length, self.dtype)

    @classmethod
    def can_generate(cls) -> bool:
        """Whether the class has `generate`."""
        return hasattr(cls, "generate")

    @property
    def name_or_path(self) -> str:
        """What the model was loaded from."""
        return self.config.name_or_path

    def warn_if_padding_and_no_attention_mask(self, input_ids: Tensor, attention_mask: Tensor | None) -> None:
        """Warn of ids that begin or end with the pad token where no mask hides it."""
        pad = self.config.pad_token_id
        if attention_mask is None and pad is not None and pad in input_ids[:, [0, -1]]:
            warn_once("input_ids are padded and no attention_mask hides that; pass one")

    # Embeddings

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding `wte`."""
        return self.base_model.wte

    def get_decoder(self) -> GPTNeoModel:
        """The trunk."""
        return self.base_model

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Use another token embedding: any module that takes ids. A head stays tied to the weight that it has."""
        self.base_model.wte = cast(nn.Embedding, value)

    def get_position_embeddings(self) -> nn.Embedding:
        """The position embedding `wpe`."""
        return self.base_model.wpe

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Use another language-model head.

        Raises:
            InputError: the class has none.
        """
        if self.get_output_embeddings() is None:
            raise InputError(f"{type(self).__name__} has no language-model head")
        self.lm_head = new_embeddings

    def get_output_embeddings(self) -> nn.Linear | None:
        """The language-model head, where the class has one."""
        return getattr(self, "lm_head", None)

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
        return resizing.resize(self, new_num_tokens, pad_to_multiple_of, mean_resizing)

    def set_attn_implementation(self, attn_implementation: str | dict[str, str], allow_all_kernels: bool = False) -> None:
        """Accept "eager", and "sdpa" with a warning: `backend` chooses either way.

        Raises:
            InputError: other kernels, which are not offered.
        """
        loading.check_attention(attn_implementation, live=True)

    # Files

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | Source | None,
        *,
        config: GPTNeoConfig | None = None,
        state_dict: Mapping[str, Tensor] | None = None,
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
        quantize: str | None = None,
        **others: Any,
    ) -> Any:
        """A model from a folder or hub id, in eval mode; behaves as in transformers.

        Args:
            pretrained_model_name_or_path: None for the weights of `state_dict`, which are copied; needs a config.
            dtype: torch dtype, its name, or "auto" (the default): the configuration's, else that of the weights.
            device_map: one device ("cpu", "cuda:1", "auto", {"": device}); None for the CPU.
            backend: "auto": kernels on CUDA devices of capability 8.0 and up, plain torch elsewhere and for gradients;
                "triton" and "reference": that or an error. `model.backend` says what it came to.
            use_safetensors: True for safetensors only, False for `pytorch_model.bin` only.
            allow_pickle: False refuses a checkpoint that has `pytorch_model.bin` only; no code in one is run either way.
            from_flax: read `flax_model.msgpack`, which is read anyhow where nothing else is there; needs no jax.
            check_finite: refuse NaN, infinities and values that dtype cannot hold.
            strict: refuse surplus tensors and an lm_head unlike the embedding it is tied to.
            ignore_mismatched_sizes: start what has another size afresh, such as a head; a warning names it.
            output_loading_info: return (model, info) with sets of the keys missing, unexpected and mismatched, as transformers.
            attn_implementation: "eager" or None; other kernels are chosen by `backend`.
            quantize: "int8" or "int4", see `quantize_`, each layer as soon as it is read; a checkpoint saved so needs no word.
            others: fields of the configuration to override (num_labels=3, pad_token_id=50256, ...); generation_config, in the
                place of the folder's.

        Raises:
            ModelNotFoundError, CheckpointError, ConfigError, InputError, SetupError: each says what to do.
        """
        generation = others.pop("generation_config", None)
        own = loading.own_arguments(cls, others)
        overrides = loading.screen(others, attn_implementation, cls.from_pretrained)
        source, config = loading.origin(
            pretrained_model_name_or_path,
            config,
            state_dict,
            overrides,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
            subfolder=subfolder,
        )
        wanted = dtype if dtype is not None else torch_dtype
        chosen = as_dtype("auto" if wanted is None else wanted) or as_dtype(config.dtype or "auto")
        said, rounding = quantizing.asked(config, quantize)
        device = as_device(device_map)
        with loading.opened(source, state_dict, use_safetensors, allow_pickle, from_flax) as tensors:
            chosen = chosen or checkpoint.dtype_of(tensors)
            model = loading.built(cls, config, backend, chosen, own)
            if said is not None:
                quantizing.prepare(model, said)
            report = checkpoint.load_into(
                model,
                tensors,
                device=device,
                where="state_dict" if source is None else source.name,
                strict=strict,
                ignore_mismatched_sizes=ignore_mismatched_sizes,
                check_finite=check_finite,
                quantize=rounding,
            )
        if rounding is not None:
            config.quantization_config = quantizing.described(rounding)
        model._init_missing(report.missing_keys)
        for module in model.modules():
            vars(module)[INITIALIZED] = True
        config.dtype = str(chosen or model.dtype).removeprefix("torch.")
        if model.can_generate() and source is not None:
            setattr(model, "generation_config", generation or GenerationConfig.from_source(source, config))  # noqa: B010 (not of every class)
        model.eval()
        assert model.backend  # a request that this device cannot fulfil fails here, not in the first call
        return (model, report.as_info()) if output_loading_info else model

    @classmethod
    def from_config(
        cls,
        config: GPTNeoConfig,
        *,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        attn_implementation: str | None = None,
        trust_remote_code: bool | None = None,
        **options: Any,
    ) -> Self:
        """A freshly initialised model; the keywords mean what they do to `from_pretrained`, options go to the class."""
        loading.check_attention(attn_implementation)
        wanted = dtype if dtype is not None else torch_dtype
        chosen = as_dtype(wanted if wanted is not None else config.dtype or "auto")
        with loading.default_dtype(chosen):
            model = cls(config, **options)
        model.config.dtype = str(chosen or model.dtype).removeprefix("torch.")
        return model

    _from_config = from_config

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        save_function: Callable[..., Any] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "50GB",
        variant: str | None = None,
        safe_serialization: bool = True,
        **others: Any,
    ) -> None:
        """Write config.json, generation_config.json and safetensors that gptneo_fast and transformers load.

        Args:
            is_main_process: False, in the other processes of a run, writes nothing.
            state_dict: what to write instead of the model's own, as of a wrapped model.
            save_function: has no say: safetensors are written.
            max_shard_size: bytes, or such as "5GB", of a file.

        Raises:
            CheckpointError: `safe_serialization=False`, as pickles are read but not written; or the folder cannot be written
                to, and what was there still is.
            UnknownOptionError: another keyword, or push_to_hub and variant, which are not offered.
        """
        saving.save(
            self,
            Path(save_directory),
            others | {"push_to_hub": push_to_hub, "variant": variant, "safe_serialization": safe_serialization},
            is_main_process=is_main_process,
            state_dict=state_dict,
            max_shard_size=max_shard_size,
        )

    def to_transformers(self) -> Any:
        """The same model as transformers' class of the same name, sharing the weights: for what asks for a PreTrainedModel.

        Raises:
            SetupError: transformers is not installed.
            InputError: a class of one's own, or layers that were replaced. Hooks stay behind, with a warning.
        """
        return saving.as_transformers(self)

    def push_to_hub(self, repo_id: str, **options: Any) -> None:
        """Not offered.

        Raises:
            UnknownOptionError: save to a folder, then upload it with huggingface_hub.
        """
        raise UnknownOptionError("push_to_hub is not offered; save_pretrained(folder), then huggingface_hub.upload_folder")


make_kin(GPTNeoPreTrainedModel, "transformers.modeling_utils", "PreTrainedModel", "PeftAdapterMixin")
