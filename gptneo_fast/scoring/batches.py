"""Texts of any lengths as batches with little padding, and the texts' token ids."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..config import is_int
from ..errors import InputError, SetupError, short

_TOKENS = {"cuda": 8192}  # of a batch, padding included
_TOKENS_ELSEWHERE = 2048

Text = str | Sequence[int] | Tensor


def ids_of(tokenizer: Any, text: Text, vocabulary: int, name: str) -> list[int]:
    """Token ids of a text, or of ids that are given as such.

    Raises:
        InputError: neither text nor ids of the vocabulary. SetupError: a text, and no tokenizer.
    """
    if isinstance(text, str):
        if tokenizer is None:
            raise SetupError(
                f"{name} is text and the model has no tokenizer: use gptneo_fast.load, or set model.tokenizer = "
                "GPT2Tokenizer.from_pretrained(...)"
            )
        found: list[int] = tokenizer.encode(text)
        return found
    ids = text.tolist() if isinstance(text, Tensor) and text.dim() == 1 else text
    if not isinstance(ids, (list, tuple)) or not all(map(is_int, ids)):
        raise InputError(f"{name} is {short(text)}; give a string, or token ids as a list or a tensor [n]")
    for token in ids:
        if not 0 <= token < vocabulary:
            raise InputError(f"{name} holds token {short(token)}, which is not in the vocabulary of {vocabulary}")
    return [int(token) for token in ids]


def batches(lengths: Sequence[int], tokens: int, held: int = 0) -> list[list[int]]:
    """Places of texts that run together, the longest first: neighbours of like length need little padding.

    Args:
        lengths: of the texts, those of 0 left out. tokens: of a batch, padding included; a longer text runs alone.
        held: tokens of a context, which each text has a copy of.
    """
    found: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if lengths[i] == 0:
            continue
        if not found or (len(found[-1]) + 1) * (lengths[found[-1][0]] + held) > tokens:
            found.append([])
        found[-1].append(i)
    return found


def budget_of(device: torch.device) -> int:
    """Tokens of a batch, padding included."""
    return _TOKENS.get(device.type, _TOKENS_ELSEWHERE)


def texts_of(texts: Text | Iterable[Text]) -> tuple[list[Text], bool]:
    """(the texts, whether it was one alone)."""
    if isinstance(texts, str) or (isinstance(texts, Tensor) and texts.dim() == 1):
        return [texts], True
    if isinstance(texts, (list, tuple)) and texts and all(map(is_int, texts)):
        return [texts], True
    if not isinstance(texts, Iterable) or isinstance(texts, Mapping) or (isinstance(texts, Tensor) and texts.dim() == 0):
        what = "give its input_ids, or" if isinstance(texts, Mapping) else "give"
        raise InputError(f"texts is a {type(texts).__name__}; {what} a string or token ids, or several of them")
    return list(texts), False
