"""Texts and ids as callers pass them, checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from ..errors import InputError

_MAX_TEXT = 16 << 20  # characters of one text; 2048 positions hold far fewer


def checked_texts(text: Any) -> list[str]:
    """A text or an iterable of texts as a list.

    Raises:
        InputError: no string, longer than 16 Mi characters, or not valid Unicode; names the first bad one.
    """
    texts = [text] if isinstance(text, str) else text
    if isinstance(texts, (bytes, Mapping)) or not isinstance(texts, Iterable):
        raise InputError(f"text is a {type(text).__name__}; give a string or a list of strings")
    texts = list(texts)
    for i, t in enumerate(texts):
        if not isinstance(t, str):
            raise InputError(f"text {i} is a {type(t).__name__}; give strings")
        if len(t) > _MAX_TEXT:
            raise InputError(f"text {i} has {len(t)} characters; the limit is {_MAX_TEXT}, cut it into pieces")
        try:
            t.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"text {i} has a lone surrogate at character {error.start}; it is no valid Unicode") from None
    return texts


def as_ids(token_ids: int | Iterable[int] | Tensor) -> list[int]:
    """One id, a row of ids or a 1-D tensor of them as a list."""
    if isinstance(token_ids, (Tensor, np.ndarray)):
        token_ids = token_ids.tolist()
    return [token_ids] if isinstance(token_ids, int) else list(token_ids)
