"""`load`: a name to a model that is ready to use; and the Auto names that transformers scripts import."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any, ClassVar

import torch

from ..config import GPTNeoConfig
from ..device import as_device, as_dtype
from ..errors import InputError, NoTokenizerError, nearest, short
from ..files.hub import Source
from ..tokenizer import GPT2Tokenizer
from .causal import GPTNeoForCausalLM, GPTNeoModel
from .classifiers import GPTNeoForQuestionAnswering, GPTNeoForSequenceClassification, GPTNeoForTokenClassification

TASKS: dict[str, Any] = {
    "causal-lm": GPTNeoForCausalLM,
    "sequence-classification": GPTNeoForSequenceClassification,
    "token-classification": GPTNeoForTokenClassification,
    "question-answering": GPTNeoForQuestionAnswering,
    "base": GPTNeoModel,
}


def load(
    name_or_path: str | os.PathLike[str],
    task: str = "causal-lm",
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    backend: str = "auto",
    from_flax: bool = False,
    **options: Any,
) -> Any:
    """A model in eval mode with `model.tokenizer` attached (None where the checkpoint has no tokenizer).

    Args:
        name_or_path: a folder, or a hub id such as "EleutherAI/gpt-neo-1.3B"; only the files needed are downloaded.
        task: "causal-lm", "sequence-classification", "token-classification", "question-answering" or "base".
        dtype: a floating-point dtype, its name, or "auto": bfloat16 on CUDA (float16 before capability 8.0), and
            elsewhere the checkpoint's own.
        device: None for CUDA where there is a device, else the CPU.
        revision: branch, tag or commit of the repository. token: of the hub. cache_dir: where downloads are kept.
        local_files_only: use the cache and no network. force_download: fetch again what the cache holds.
        backend: "auto", "triton" or "reference".
        from_flax: read `flax_model.msgpack`, which is read anyhow where no other weights are there; needs no jax.
        options: other keywords of `from_pretrained`: quantize, check_finite, allow_pickle, strict, subfolder, num_labels, ...

    Raises:
        InputError, ModelNotFoundError, CheckpointError, ConfigError, DeviceError, SetupError: each says what to do.
    """
    if not isinstance(task, str) or task not in TASKS:
        raise InputError(f"task {short(task)} is unknown{nearest(task, TASKS)}; use one of {', '.join(TASKS)}")
    place = as_device("auto" if device is None else device)
    wanted = as_dtype(dtype)
    if wanted is None and place.type == "cuda":
        wanted = torch.bfloat16 if torch.cuda.get_device_capability(place) >= (8, 0) else torch.float16
    source = Source.of(
        name_or_path,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        force_download=force_download,
        subfolder=options.pop("subfolder", ""),
    )
    model = TASKS[task].from_pretrained(
        source, dtype="auto" if wanted is None else wanted, device_map=place, backend=backend, from_flax=from_flax, **options
    )
    with suppress(NoTokenizerError):
        model.tokenizer = GPT2Tokenizer.from_pretrained(source)
    return model


class _Auto:
    """A name that stands for one class here, since GPT-Neo is the only architecture."""

    _stands_for: ClassVar[Any]

    def __init__(self) -> None:
        raise InputError(f"{type(self).__name__} is used through from_pretrained(...)")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], *args: Any, **options: Any) -> Any:
        """What the class of GPT-Neo gives; `trust_remote_code` is accepted, no code is ever loaded.

        Raises:
            ConfigError: the checkpoint is of another architecture; gptneo_fast runs GPT-Neo only.
        """
        options.pop("trust_remote_code", None)
        return cls._stands_for.from_pretrained(pretrained_model_name_or_path, *args, **options)


class _AutoModel(_Auto):
    @classmethod
    def from_config(cls, config: GPTNeoConfig, **options: Any) -> Any:
        """A model with fresh weights."""
        return cls._stands_for.from_config(config, **options)


class AutoModel(_AutoModel):
    """GPTNeoModel."""

    _stands_for = GPTNeoModel


class AutoModelForCausalLM(_AutoModel):
    """GPTNeoForCausalLM."""

    _stands_for = GPTNeoForCausalLM


class AutoModelForSequenceClassification(_AutoModel):
    """GPTNeoForSequenceClassification."""

    _stands_for = GPTNeoForSequenceClassification


class AutoModelForTokenClassification(_AutoModel):
    """GPTNeoForTokenClassification."""

    _stands_for = GPTNeoForTokenClassification


class AutoModelForQuestionAnswering(_AutoModel):
    """GPTNeoForQuestionAnswering."""

    _stands_for = GPTNeoForQuestionAnswering


class AutoConfig(_Auto):
    """GPTNeoConfig."""

    _stands_for = GPTNeoConfig

    @classmethod
    def for_model(cls, model_type: str, **values: Any) -> GPTNeoConfig:
        """A new configuration."""
        return GPTNeoConfig(model_type=model_type, **values)


class AutoTokenizer(_Auto):
    """GPT2Tokenizer."""

    _stands_for = GPT2Tokenizer


def set_seed(seed: int) -> None:
    """Seed the generators of Python, numpy and torch (every device)."""
    import random

    import numpy as np

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
