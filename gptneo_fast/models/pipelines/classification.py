"""`pipeline("text-classification")`: texts to labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ...config import is_int
from ...errors import InputError, short
from ...generation.options import plain
from ..classifiers import GPTNeoForSequenceClassification
from .inputs import Pipeline, batches, items

_SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": lambda logits: logits.sigmoid(),
    "none": lambda logits: logits,
}


class TextClassificationPipeline(Pipeline):
    """Texts to labels; see `pipeline`. `model` and `tokenizer` are attributes."""

    task = "text-classification"
    serves = GPTNeoForSequenceClassification

    def __call__(self, inputs: Any, **options: Any) -> Any:
        """The likeliest label of each text with its score, a list of them for a text, too.

        Args:
            inputs: a text, or a pair as {"text": ..., "text_pair": ...}; a list of them, or an iterator, whose labels come one
                by one.
            options: top_k: so many labels in a list for each text, None for all. function_to_apply: "softmax", "sigmoid" or
                "none", instead of what the model's problem type says. batch_size: texts that run together, where tokenizer
                and model have the same padding token [1]. Others are the tokenizer's, such as truncation.

        Raises:
            InputError: an option out of range, or something that is no text.
        """
        settings, size = self._settings(options)
        settings.pop("return_tensors", None)
        ranked = "top_k" in settings
        top_k, function = plain(settings.pop("top_k", 1)), settings.pop("function_to_apply", None)
        if top_k is not None and not (is_int(top_k) and top_k > 0):
            raise InputError(f"top_k={short(top_k)} is not an integer from 1, or None")
        named = str(getattr(function, "value", function)).lower()
        if function is not None and named not in _SCORES:
            raise InputError(f"function_to_apply={short(function)} is not one of {', '.join(_SCORES)}")
        name = self._usual() if function is None else named
        pad = self._present_tokenizer().pad_token_id
        size = size if pad is not None and pad == self.model.config.pad_token_id else 1
        single = isinstance(inputs, (str, Mapping))
        texts = [inputs] if single else items("inputs", inputs)
        rows = batches((_text_and_pair(text, i) for i, text in enumerate(texts)), size)
        each = (labels for batch in rows for labels in self._labels(batch, name, settings))
        found = (labels[:top_k] if ranked else labels[0] for labels in each)
        if isinstance(inputs, Iterator):
            return found
        if single and not (isinstance(inputs, str) and "top_k" not in options):
            return next(found)
        return list(found)

    def _usual(self) -> str:
        """What makes scores of this model's logits."""
        config = self.model.config
        if config.problem_type == "regression":
            return "none"
        return "sigmoid" if config.problem_type == "multi_label_classification" or config.num_labels == 1 else "softmax"

    @torch.no_grad()
    def _labels(self, batch: list[dict[str, Any]], function: str, settings: dict[str, Any]) -> list[list[dict[str, Any]]]:
        """All labels of each text, the likeliest first."""
        rows = [self.tokenizer(**item, **settings) for item in batch]
        given = self.tokenizer.pad([dict(row) for row in rows], padding=len(rows) > 1, return_tensors="pt")
        logits = self.model(**given.to(self.model.device)).logits.float()
        names = self.model.config.id2label
        labels = [
            [{"label": names[i], "score": score} for i, score in enumerate(row)] for row in _SCORES[function](logits).tolist()
        ]
        return [sorted(row, key=lambda entry: entry["score"], reverse=True) for row in labels]


def _text_and_pair(item: Any, i: int) -> dict[str, Any]:
    """Keywords of the tokenizer for a text or a pair."""
    if isinstance(item, list) and len(item) == 1 and isinstance(item[0], list) and len(item[0]) == 2:
        return dict(zip(("text", "text_pair"), item[0], strict=True))  # a pair as old scripts write it
    if isinstance(item, Mapping) and "text" in item and not set(item) - {"text", "text_pair"}:
        return dict(item)
    if not isinstance(item, str):
        raise InputError(f"inputs {i} is {short(item)}; give a string, or {{'text': ..., 'text_pair': ...}} for a pair")
    return {"text": item}
