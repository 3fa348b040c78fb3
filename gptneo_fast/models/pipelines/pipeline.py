"""The function that makes them."""

from __future__ import annotations

import os
from typing import Any

from ...config import is_int
from ...device import as_device
from ...errors import InputError, SetupError, nearest, short
from ...tokenizer import GPT2Tokenizer
from ..classifiers import GPTNeoForTokenClassification
from ..load import load
from .classification import TextClassificationPipeline
from .features import FeatureExtractionPipeline
from .generation import TextGenerationPipeline
from .inputs import IGNORED
from .questions import QuestionAnsweringPipeline

_LOADING = ("dtype", "torch_dtype", "revision", "token", "cache_dir", "local_files_only", "force_download", "backend")
_OURS: dict[str, Any] = {
    "text-generation": TextGenerationPipeline,
    "text-classification": TextClassificationPipeline,
    "question-answering": QuestionAnsweringPipeline,
    "feature-extraction": FeatureExtractionPipeline,  # of any model: the last that one may be for
}
_TASKS = {task: task for task in (*_OURS, "token-classification")}
_TASKS |= {"sentiment-analysis": "text-classification", "ner": "token-classification"}  # other names
_CLASSES = {"text-generation": "causal-lm", "text-classification": "sequence-classification", "feature-extraction": "base"}


def pipeline(
    task: str | None = None,
    model: Any = None,
    *,
    tokenizer: Any = None,
    device: Any = None,
    device_map: Any = None,
    model_kwargs: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """A callable from prompts to `[{"generated_text": ...}]`, from texts to `[{"label": ..., "score": ...}]`, and the like.

    Args:
        task: "text-generation", "text-classification" or "sentiment-analysis", "token-classification" or "ner" (for which
            transformers must be installed: it is its pipeline over our model), "question-answering", or
            "feature-extraction"; None for what the model can do.
        model: a model of the class that the task needs, a folder, or a hub id.
        tokenizer: its tokenizer, or a folder or hub id of one; None for the one that comes with the model.
        device, device_map: where the model is put; -1 is the CPU, other integers number CUDA devices. None leaves a model
            where it is.
        model_kwargs: further options of `load`.
        options: of `load` (dtype, revision, token, ...), and of every call; assistant_model may be a folder or hub id, too.

    Raises:
        InputError: another task, or no model. SetupError: transformers is wanted and not installed.
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
        wanted = _TASKS[task or "text-generation"]
        model = load(model, _CLASSES.get(wanted, wanted), device=place, **given)
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
    named = _TASKS[task] if task else _what_it_does(model)
    if named == "token-classification":
        return _of_transformers(model, options)
    wanted_class = _OURS[named]
    if not isinstance(model, wanted_class.serves):
        raise InputError(f"task {task!r} needs a {wanted_class.serves.__name__}, and the model is a {type(model).__name__}")
    return wanted_class(model, **options)


def _what_it_does(model: Any) -> str:
    """The task of a model's class."""
    kinds = {GPTNeoForTokenClassification: "token-classification"} | {kind.serves: task for task, kind in _OURS.items()}
    found = [task for kind, task in kinds.items() if isinstance(model, kind)]
    return found[0] if found else "text-generation"


def _of_transformers(model: Any, options: dict[str, Any]) -> Any:
    """transformers' pipeline of entities over our model."""
    if not isinstance(model, GPTNeoForTokenClassification):
        raise InputError(
            f"token-classification needs a GPTNeoForTokenClassification, and the model is a {type(model).__name__}"
        )
    if model.tokenizer is None:
        raise SetupError("the model has no tokenizer: use pipeline(..., tokenizer=...), or set model.tokenizer")
    try:
        from transformers import TokenClassificationPipeline
    except ImportError as missing:
        raise SetupError("token-classification groups entities by transformers' code; pip install transformers") from missing
    options = {name: value for name, value in options.items() if name not in IGNORED}
    tokenizer = model.tokenizer.to_transformers() if isinstance(model.tokenizer, GPT2Tokenizer) else model.tokenizer
    return TokenClassificationPipeline(model=model, tokenizer=tokenizer, device=model.device, **options)
