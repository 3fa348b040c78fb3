"""`pipeline("text-generation", model=...)` and "text-classification", as model cards call them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..config import is_int
from ..errors import InputError, nearest
from ..generation import GenerationConfig
from .causal import GPTNeoForCausalLM
from .classifiers import GPTNeoForSequenceClassification
from .load import load

_DEFAULTS: dict[str, Any] = {"max_new_tokens": 256, "do_sample": True, "temperature": 0.7}  # of transformers' pipeline
_LOADING = ("dtype", "torch_dtype", "revision", "token", "cache_dir", "local_files_only", "force_download", "backend")


def pipeline(
    task: str | None = None,
    model: Any = None,
    *,
    tokenizer: Any = None,
    device: Any = None,
    device_map: Any = None,
    **options: Any,
) -> TextGenerationPipeline | TextClassificationPipeline:
    """A callable from prompts to `[{"generated_text": ...}]`, or from texts to `[{"label": ..., "score": ...}]`.

    Args:
        task: "text-generation", or "text-classification" and its other name "sentiment-analysis"; None for what the model
            can do.
        model: a GPTNeoForCausalLM or GPTNeoForSequenceClassification, a folder, or a hub id.
        tokenizer: its tokenizer; None for the one that comes with the model.
        device, device_map: where a folder or hub id is loaded; -1 is the CPU, other integers number CUDA devices.
        options: of `load` (dtype, revision, token, ...), and of `generate` for every call.

    Raises:
        InputError: another task, or no model.
    """
    if task is not None and task not in _TASKS:
        raise InputError(f"task {task!r} is not offered{nearest(task, _TASKS)}; use one of {', '.join(_TASKS)}, or load()")
    if model is None:
        raise InputError("pipeline needs model=...: a model, a folder, or a hub id")
    given = {k: options.pop(k) for k in _LOADING if k in options}
    options = options | options.pop("model_kwargs", {})
    if isinstance(model, (str, os.PathLike)):
        if "torch_dtype" in given:
            given["dtype"] = given.pop("torch_dtype")
        place = device if device is not None else device_map
        if isinstance(place, int):
            place = "cpu" if place < 0 else f"cuda:{place}"
        kind = "causal-lm" if task in (None, "text-generation") else "sequence-classification"
        model = load(model, kind, device=place, **given)
    if tokenizer is not None and not isinstance(tokenizer, (str, os.PathLike)):
        model.tokenizer = tokenizer
    wanted = _TASKS[task] if task else TextGenerationPipeline if model.can_generate() else TextClassificationPipeline
    if not isinstance(model, wanted.serves):
        raise InputError(f"task {task!r} needs a {wanted.serves.__name__}, and the model is a {type(model).__name__}")
    return wanted(model, **options)


class TextClassificationPipeline:
    """Texts to labels; see `pipeline`. `model` and `tokenizer` are attributes."""

    task = "text-classification"
    serves = GPTNeoForSequenceClassification

    def __init__(self, model: Any, **options: Any) -> None:
        self.model, self.options = model, options

    @property
    def tokenizer(self) -> Any:
        """The model's."""
        return self.model.tokenizer

    def __call__(self, inputs: str | Sequence[str], **options: Any) -> list[Any]:
        """The likeliest label of each text with its score, a list of them for a text, too.

        Args:
            options: top_k: so many labels in a list for each text, None for all. function_to_apply: "softmax", "sigmoid" or
                "none", instead of what the model's problem type says. Others are the tokenizer's, such as truncation.

        Raises:
            InputError: an option out of range.
        """
        settings = {"top_k": 1, "function_to_apply": None} | self.options | options
        top_k, function = settings.pop("top_k"), settings.pop("function_to_apply")
        settings.pop("batch_size", None)  # texts run one by one, as transformers does by default
        if top_k is not None and not (is_int(top_k) and top_k > 0):
            raise InputError(f"top_k={top_k!r} is not an integer from 1, or None")
        if function not in (None, *_SCORES):
            raise InputError(f"function_to_apply={function!r} is not one of {', '.join(_SCORES)}")
        single = isinstance(inputs, str)
        texts = [str(inputs)] if single else inputs
        found = [self._labels(text, function or self._usual(), settings)[:top_k] for text in texts]
        if "top_k" not in self.options | options:
            return [labels[0] for labels in found]
        return found[0] if single else found

    def _usual(self) -> str:
        """What makes scores of this model's logits."""
        config = self.model.config
        if config.problem_type == "regression":
            return "none"
        return "sigmoid" if config.problem_type == "multi_label_classification" or config.num_labels == 1 else "softmax"

    @torch.no_grad()
    def _labels(self, text: str, function: str, settings: dict[str, Any]) -> list[dict[str, Any]]:
        """All labels of a text, the likeliest first."""
        batch = self.tokenizer(text, return_tensors="pt", **settings).to(self.model.device)
        scores = _SCORES[function](self.model(**batch).logits[0].float()).tolist()
        names = self.model.config.id2label
        labels = [{"label": names[i], "score": score} for i, score in enumerate(scores)]
        return sorted(labels, key=lambda entry: entry["score"], reverse=True)


class TextGenerationPipeline:
    """Prompts to texts; see `pipeline`. `model` and `tokenizer` are attributes."""

    task = "text-generation"
    serves = GPTNeoForCausalLM

    def __init__(self, model: Any, **options: Any) -> None:
        self.model, self.options = model, options

    @property
    def tokenizer(self) -> Any:
        """The model's."""
        return self.model.tokenizer

    def __call__(
        self,
        text_inputs: str | Sequence[str],
        *,
        return_full_text: bool = True,
        return_tensors: bool = False,
        batch_size: int = 1,
        **options: Any,
    ) -> list[Any]:
        """Texts with their continuations: a list of dicts for a prompt, a list of such lists for a list of prompts.

        Args:
            return_full_text: False for the continuation only.
            return_tensors: give "generated_token_ids" (a list with the prompt's) instead of "generated_text".
            batch_size: accepted; prompts run one by one, as transformers does by default.
            options: of `generate`, over those given to `pipeline`, over max_new_tokens=256, do_sample=True and
                temperature=0.7 where the model's generation_config does not say otherwise.
        """
        single = isinstance(text_inputs, str)
        prompts = [text_inputs] if single else list(text_inputs)
        results = [self._continue(str(p), return_full_text, return_tensors, self.options | options) for p in prompts]
        return results[0] if single else results

    def _continue(self, prompt: str, full: bool, tensors: bool, options: dict[str, Any]) -> list[dict[str, Any]]:
        settings = GenerationConfig(**_DEFAULTS).under(self.model.generation_config)
        own = {k: v for k, v in settings.to_dict().items() if k not in options}
        if options.get("max_length") is not None and "max_new_tokens" not in options:
            own.pop("max_new_tokens", None)
        ids = self.tokenizer(prompt, return_tensors="pt").input_ids.to(self.model.device)
        P = ids.shape[1]
        sequences = self.model.generate(ids if P else None, **own | options | {"return_dict_in_generate": False})
        if tensors:
            return [{"generated_token_ids": row.tolist()} for row in sequences]
        begins = self.tokenizer.decode(sequences[0, : max(P, 1)], skip_special_tokens=True)
        texts = [self.tokenizer.decode(row, skip_special_tokens=True)[len(begins) :] for row in sequences]
        return [{"generated_text": (prompt if full else "") + text} for text in texts]


_SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": lambda logits: logits.sigmoid(),
    "none": lambda logits: logits,
}
_TASKS: dict[str, type[TextGenerationPipeline] | type[TextClassificationPipeline]] = {
    "text-generation": TextGenerationPipeline,
    "text-classification": TextClassificationPipeline,
    "sentiment-analysis": TextClassificationPipeline,
}
