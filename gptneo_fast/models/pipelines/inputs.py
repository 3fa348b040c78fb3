"""What a pipeline is given: options over those that it was made with, and items, alone, in lists or one by one."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from ...config import is_int
from ...errors import InputError, SetupError, short
from ...generation.options import plain

IGNORED = ("framework", "num_workers", "trust_remote_code", "use_fast")


class Pipeline:
    """A model, its tokenizer, and options under those of a call."""

    def __init__(self, model: Any, **options: Any) -> None:
        self.model, self.options = model, options

    @property
    def tokenizer(self) -> Any:
        """The model's."""
        return self.model.tokenizer

    @property
    def device(self) -> torch.device:
        """The model's."""
        place: torch.device = self.model.device
        return place

    @property
    def dtype(self) -> torch.dtype:
        """The model's."""
        kind: torch.dtype = self.model.dtype
        return kind

    def transform(self, X: Any) -> Any:
        """As a call: scikit-learn's name."""
        call: Any = self
        return call(X)

    predict = transform

    def save_pretrained(self, save_directory: str | os.PathLike[str], **options: Any) -> None:
        """The model and its tokenizer to a folder; options are those of the model's `save_pretrained`."""
        self.model.save_pretrained(save_directory, **options)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(save_directory)

    def _settings(self, options: dict[str, Any]) -> tuple[dict[str, Any], int]:
        """(options of the pipeline under those of a call, batch_size).

        Raises:
            InputError: batch_size out of range.
        """
        settings = {k: v for k, v in (self.options | options).items() if k not in IGNORED}
        size = plain(settings.pop("batch_size", None))
        if size is not None and not (is_int(size) and 0 < size < 2**31):
            raise InputError(f"batch_size={short(size)} is not an integer from 1 to {2**31 - 1}")
        return settings, size or 1

    def _present_tokenizer(self) -> Any:
        """The model's tokenizer.

        Raises:
            SetupError: it has none.
        """
        if self.tokenizer is None:
            raise SetupError("the model has no tokenizer: use pipeline(..., tokenizer=...), or set model.tokenizer")
        return self.tokenizer


def items(name: str, inputs: Any) -> Iterable[Any]:
    """What is in a list, an iterator or a dataset."""
    if isinstance(inputs, (bytes, bytearray, Mapping)) or not (isinstance(inputs, Iterable) or hasattr(inputs, "__getitem__")):
        raise InputError(f"{name} is {short(inputs)} ({type(inputs).__name__}); give a string or a list of strings")
    return inputs if isinstance(inputs, Iterable) else (inputs[i] for i in range(len(inputs)))


def batches(of: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """`size` of them at a time."""
    rest = iter(of)
    while batch := list(itertools.islice(rest, size)):
        yield batch
