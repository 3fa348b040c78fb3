"""BatchEncoding: what a tokenizer call gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Encoding
from torch import Tensor

from ..errors import InputError, short


class CharSpan(NamedTuple):
    """Characters start .. end - 1 of a text."""

    start: int
    end: int


class TokenSpan(NamedTuple):
    """Tokens start .. end - 1 of a row."""

    start: int
    end: int


class BatchEncoding(dict[Any, Any]):
    """A dict whose entries are attributes too, which moves to a device as one and maps tokens to words and characters.

    Entries by name (`batch["input_ids"]`, `batch.input_ids`); `batch[i]` is the `tokenizers.Encoding` of row i and
    `batch[i:j]` those of rows i .. j - 1 (of an encoding that was not made from text: a dict of these rows). The methods
    that map take `(row, index)`, or `(index)` for row 0.

    Args:
        data: the entries.
        encoding: the `tokenizers.Encoding` of each row, which the mapping methods read.
        tensor_type: "pt" or "np" to turn every entry into an int64 array.
        prepend_batch_axis: give each array a first axis of length 1.
    """

    _encodings: list[Encoding] | None = None

    def __init__(
        self,
        data: Any = None,
        encoding: Encoding | Sequence[Encoding] | None = None,
        tensor_type: str | None = None,
        prepend_batch_axis: bool = False,
    ) -> None:
        super().__init__(data or {})
        self._encodings = [encoding] if isinstance(encoding, Encoding) else encoding if encoding is None else list(encoding)
        self.convert_to_tensors(tensor_type, prepend_batch_axis)

    def __getitem__(self, item: Any) -> Any:
        if isinstance(item, int):
            return self._of(item)
        if isinstance(item, slice):
            if self._encodings is not None:
                return self._encodings[item]
            return {k: v[item] for k, v in self.items()}
        return super().__getitem__(item)

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return super().__getitem__(name)
        raise AttributeError(f"the encoding has no {name!r}; it has {', '.join(map(str, self))}")

    def copy(self) -> BatchEncoding:
        """A shallow copy."""
        return BatchEncoding(self, self._encodings)

    @property
    def data(self) -> dict[str, Any]:
        """The entries."""
        return dict(self)

    @property
    def is_fast(self) -> bool:
        """Whether the rows know their words and characters."""
        return self._encodings is not None

    @property
    def encodings(self) -> list[Encoding] | None:
        """The `tokenizers.Encoding` of each row."""
        return self._encodings

    @property
    def n_sequences(self) -> int | None:
        """1 for texts, 2 for pairs, None where nothing is known."""
        return self._encodings[0].n_sequences if self._encodings else None

    def tokens(self, batch_index: int = 0) -> list[str]:
        """Tokens of a row, in the byte alphabet of GPT-2."""
        return self._of(batch_index).tokens

    def sequence_ids(self, batch_index: int = 0) -> list[int | None]:
        """0 or 1 for tokens of the first or second text of a pair, None for special ones."""
        return self._of(batch_index).sequence_ids

    def word_ids(self, batch_index: int = 0) -> list[int | None]:
        """The word that each token is of, None for special ones."""
        return self._of(batch_index).word_ids

    def token_to_sequence(self, batch_or_token_index: int, token_index: int | None = None) -> int | None:
        """Which text of a pair a token is of."""
        row, token = _row(batch_or_token_index, token_index)
        return self._of(row).token_to_sequence(self._token(row, token))

    def token_to_word(self, batch_or_token_index: int, token_index: int | None = None) -> int | None:
        """The word that a token is of."""
        row, token = _row(batch_or_token_index, token_index)
        return self._of(row).token_to_word(self._token(row, token))

    def token_to_chars(self, batch_or_token_index: int, token_index: int | None = None) -> CharSpan | None:
        """The characters that a token covers."""
        row, token = _row(batch_or_token_index, token_index)
        span = self._of(row).token_to_chars(self._token(row, token))
        return None if span is None else CharSpan(*span)

    def word_to_tokens(
        self, batch_or_word_index: int, word_index: int | None = None, sequence_index: int = 0
    ) -> TokenSpan | None:
        """The tokens of a word."""
        row, word = _row(batch_or_word_index, word_index)
        span = self._of(row).word_to_tokens(word, sequence_index)
        return None if span is None else TokenSpan(*span)

    def word_to_chars(
        self, batch_or_word_index: int, word_index: int | None = None, sequence_index: int = 0
    ) -> CharSpan | None:
        """The characters of a word."""
        row, word = _row(batch_or_word_index, word_index)
        span = self._of(row).word_to_chars(word, sequence_index)
        return None if span is None else CharSpan(*span)

    def char_to_token(self, batch_or_char_index: int, char_index: int | None = None, sequence_index: int = 0) -> int | None:
        """The token that covers a character."""
        row, char = _row(batch_or_char_index, char_index)
        return self._of(row).char_to_token(char, sequence_index)

    def char_to_word(self, batch_or_char_index: int, char_index: int | None = None, sequence_index: int = 0) -> int | None:
        """The word that covers a character."""
        row, char = _row(batch_or_char_index, char_index)
        return self._of(row).char_to_word(char, sequence_index)

    def convert_to_tensors(self, tensor_type: str | None = None, prepend_batch_axis: bool = False) -> BatchEncoding:
        """Turn every entry into an int64 array in place; "pt", "np" or None for no change.

        Raises:
            InputError: rows of different lengths, or another type of tensor.
        """
        if tensor_type is None:
            return self
        if not isinstance(tensor_type, str) or tensor_type not in ("pt", "np"):
            raise InputError(f"return_tensors {short(tensor_type)} is unknown; use 'pt', 'np' or None")
        for key, value in self.items():
            if not isinstance(value, Tensor if tensor_type == "pt" else np.ndarray):
                self[key] = _array(key, [value] if prepend_batch_axis else value, tensor_type)
        return self

    def to(self, device: torch.device | str | int, *, non_blocking: bool = False) -> BatchEncoding:
        """The same encoding, its tensors moved to `device`."""
        for key, value in self.items():
            if isinstance(value, Tensor):
                self[key] = value.to(device, non_blocking=non_blocking)
        return self

    def _of(self, row: int) -> Encoding:
        if self._encodings is None:
            raise InputError("this encoding was not made from text, so that it knows no words and characters")
        if not -len(self._encodings) <= row < len(self._encodings):
            raise InputError(f"row {row} of an encoding of {len(self._encodings)}")
        return self._encodings[row]

    def _token(self, row: int, token: int) -> int:
        return token if token >= 0 else len(self._of(row).ids) + token


def _row(first: int, second: int | None) -> tuple[int, int]:
    """(row, index) from one or two arguments."""
    return (0, first) if second is None else (first, second)


def _array(key: str, value: Any, kind: str) -> Any:
    if isinstance(value, list) and len(lengths := {len(v) for v in value if hasattr(v, "__len__")}) > 1:
        raise InputError(
            f"rows of different lengths ({min(lengths)} to {max(lengths)} in {key!r}) make no tensor; "
            "pass padding=True, and truncation=True where they may be too long"
        )
    try:
        array = np.asarray(value.cpu() if isinstance(value, Tensor) else value, dtype=None if _filled(value) else np.int64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{key!r} makes no tensor: {error}") from error
    if array.dtype == object:
        raise InputError(f"{key!r} makes no tensor: it is nested unevenly or holds other things than numbers")
    return torch.from_numpy(np.ascontiguousarray(array)) if kind == "pt" else array


def _filled(value: Any) -> bool:
    """Whether there is a number in a nested list, from which its dtype is told."""
    return any(map(_filled, value)) if isinstance(value, (list, tuple)) else True
