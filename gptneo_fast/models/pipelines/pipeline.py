"""The function that makes them."""

from __future__ import annotations

import os
from typing import Any

from ...config import is_int
from ...device import as_device
from ...errors import InputError, nearest, short
from ...tokenizer import GPT2Tokenizer
from ..load import load
from .classification import TextClassificationPipeline
from .generation import TextGenerationPipeline

_LOADING = ("dtype", "torch_dtype", "revision", "token", "cache_dir", "local_files_only", "force_download", "backend")
_TASKS: dict[str, type[TextGenerationPipeline] | type[TextClassificationPipeline]] = {
    "text-generation": TextGenerationPipeline,
    "text-classification": TextClassificationPipeline,
    "sentiment-analysis": TextClassificationPipeline,
}


def pipeline(
    task: str | None = None,
    model: Any = None,
    *,
    tokenizer: Any = None,
    device: Any = None,
    device_map: Any = None,
    model_kwargs: dict[str, Any] | None = None,
    **options: Any,
) -> TextGenerationPipeline | TextClassificationPipeline:
    """A callable from prompts to `[{"generated_text": ...}]`, or from texts to `[{"label": ..., "score": ...}]`.

    Args:
        task: "text-generation", or "text-classification" and its other name "sentiment-analysis"; None for what the model
            can do.
        model: a GPTNeoForCausalLM or GPTNeoForSequenceClassification, a folder, or a hub id.
        tokenizer: its tokenizer, or a folder or hub id of one; None for the one that comes with the model.
        device, device_map: where the model is put; -1 is the CPU, other integers number CUDA devices. None leaves a model
            where it is.
        model_kwargs: further options of `load`.
        options: of `load` (dtype, revision, token, ...), and of every call; assistant_model may be a folder or hub id, too.

    Raises:
        InputError: another task, or no model.
    """
    if task is not None and not (isinstance(task, str) and task in _TASKS):
        raise InputError(f"task {short(task)} is not offered{nearest(task, _TASKS)}; use one of {', '.join(_TASKS)}, or load()")
    if model is None:
        raise InputError("pipeline needs model=...: a model, a folder, or a hub id")
    if not isinstance(model_kwargs, (dict, type(None))):
        raise InputError(f"model_kwargs is {short(model_kwargs)}; give a dict of options of load()")
    given = {k: options.pop(k) for k in _LOADING if k in options} | (model_kwargs or {})
    place = device if device is not None else device_map
    if is_int(place) and place < 2**31:
        place = "cpu" if place < 0 else f"cuda:{place}"
    if isinstance(model, (str, os.PathLike)):
        if "torch_dtype" in given:
            given["dtype"] = given.pop("torch_dtype")
        kind = "causal-lm" if task in (None, "text-generation") else "sequence-classification"
        model = load(model, kind, device=place, **given)
    elif not hasattr(model, "can_generate"):
        raise InputError(f"model is {short(model)}; give a model, a folder, or a hub id")
    elif device not in (None, -1):
        model.to(as_device(place))
    if isinstance(drafting := options.get("assistant_model"), (str, os.PathLike)):
        options["assistant_model"] = load(drafting, dtype=model.dtype, device=model.device)
    if isinstance(tokenizer, (str, os.PathLike)):
        tokenizer = GPT2Tokenizer.from_pretrained(tokenizer)
    if tokenizer is not None:
        if not callable(tokenizer):
            raise InputError(f"tokenizer is {short(tokenizer)}; give a tokenizer, or a folder or hub id of one")
        model.tokenizer = tokenizer
    wanted = _TASKS[task] if task else TextGenerationPipeline if model.can_generate() else TextClassificationPipeline
    if not isinstance(model, wanted.serves):
        raise InputError(f"task {task!r} needs a {wanted.serves.__name__}, and the model is a {type(model).__name__}")
    return wanted(model, **options)
