"""`pipeline("feature-extraction")`: texts to the hidden states of their tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ...errors import InputError, short
from ..pretrained import GPTNeoPreTrainedModel
from .inputs import Pipeline, items


class FeatureExtractionPipeline(Pipeline):
    """Texts to hidden states; see `pipeline`. For one vector a text there is `model.embed`."""

    task = "feature-extraction"
    serves = GPTNeoPreTrainedModel

    def __call__(self, inputs: Any, **options: Any) -> Any:
        """The states after ln_f, [1, T, C], of a text, as nested lists; a list of them for several texts. Of a model with a
        head what that gives, as in transformers.

        Args:
            inputs: a text, a list of them, or an iterator, whose states come one by one.
            options: return_tensors: a tensor instead. tokenize_kwargs, truncation: of the tokenizer.

        Raises:
            InputError: something that is no text.
        """
        settings, _ = self._settings(options)
        tensors, how = settings.pop("return_tensors", False), dict(settings.pop("tokenize_kwargs", None) or {})
        found = (
            self._states(text, tensors, how | settings) for text in ([inputs] if isinstance(inputs, str) else _texts(inputs))
        )
        if isinstance(inputs, Iterator):
            return found
        return next(found) if isinstance(inputs, str) else list(found)

    @torch.no_grad()
    def _states(self, text: str, tensors: bool, how: dict[str, Any]) -> Any:
        given = self._present_tokenizer()(text, return_tensors="pt", **how)
        states = self.model(**given.to(self.model.device))[0].cpu()
        return states if tensors else states.tolist()


def _texts(inputs: Any) -> Iterator[str]:
    for i, text in enumerate(items("inputs", inputs)):
        if not isinstance(text, str):
            raise InputError(f"inputs {i} is {short(text)}; give a string")
        yield text
