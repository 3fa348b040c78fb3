"""`pipeline("text-generation", model=...)`, as model cards call it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from ..errors import InputError, nearest
from ..generation import GenerationConfig
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
) -> TextGenerationPipeline:
    """A callable from prompts to `[{"generated_text": ...}]`.

    Args:
        task: "text-generation", the only one offered.
        model: a GPTNeoForCausalLM, a folder, or a hub id.
        tokenizer: its tokenizer; None for the one that comes with the model.
        device, device_map: where a folder or hub id is loaded; -1 is the CPU, other integers number CUDA devices.
        options: of `load` (dtype, revision, token, ...), and of `generate` for every call.

    Raises:
        InputError: another task, or no model.
    """
    if task not in ("text-generation", None):
        raise InputError(f"task {task!r} is not offered{nearest(task, ['text-generation'])}; use 'text-generation' or load()")
    if model is None:
        raise InputError("pipeline needs model=...: a GPTNeoForCausalLM, a folder, or a hub id")
    given = {k: options.pop(k) for k in _LOADING if k in options}
    options = options | options.pop("model_kwargs", {})
    if isinstance(model, (str, os.PathLike)):
        if "torch_dtype" in given:
            given["dtype"] = given.pop("torch_dtype")
        place = device if device is not None else device_map
        if isinstance(place, int):
            place = "cpu" if place < 0 else f"cuda:{place}"
        model = load(model, device=place, **given)
    if tokenizer is not None and not isinstance(tokenizer, (str, os.PathLike)):
        model.tokenizer = tokenizer
    return TextGenerationPipeline(model, **options)


class TextGenerationPipeline:
    """Prompts to texts; see `pipeline`. `model` and `tokenizer` are attributes."""

    task = "text-generation"

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
        sequences = self.model.generate(ids if P else None, **own | options)
        if tensors:
            return [{"generated_token_ids": row.tolist()} for row in sequences]
        begins = self.tokenizer.decode(sequences[0, : max(P, 1)], skip_special_tokens=True)
        texts = [self.tokenizer.decode(row, skip_special_tokens=True)[len(begins) :] for row in sequences]
        return [{"generated_text": (prompt if full else "") + text} for text in texts]
