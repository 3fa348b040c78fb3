"""Texts, ids and options as callers pass them, checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from tokenizers import AddedToken
from torch import Tensor

from ..errors import InputError, nearest, short, warn_once

MAX_TEXT = 16 << 20  # characters of one text; 2048 positions hold far fewer
UNLIMITED = int(1e20)  # from here on a model_max_length says that there is none
_PADDING = {False: "do_not_pad", True: "longest", None: "do_not_pad"}
_TRUNCATION = {False: "do_not_truncate", True: "longest_first", None: "do_not_truncate"}


def checked_text(text: Any, where: str = "text") -> str:
    """One string.

    Raises:
        InputError: no string, longer than 16 Mi characters, or not valid Unicode; names it by `where`.
    """
    if not isinstance(text, str):
        raise InputError(f"{where} is a {type(text).__name__}; give a string")
    if len(text) > MAX_TEXT:
        raise InputError(f"{where} has {len(text)} characters; the limit is {MAX_TEXT}, cut it into pieces")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{where} has a lone surrogate at character {error.start}; it is no valid Unicode") from None
    return text


def checked_texts(text: Any, where: str = "text", depth: int = 0) -> Any:
    """A text, or a list of texts, of pairs, of words, of pairs of lists of words; the same nesting as lists and tuples.

    Raises:
        InputError: something else stands in it; names the first bad one by its position.
    """
    if isinstance(text, str) or depth == 4:
        return checked_text(text, where)
    if isinstance(text, (bytes, bytearray, Mapping)) or not isinstance(text, Iterable):
        raise InputError(f"{where} is a {type(text).__name__}; give a string or a list of strings")
    kind = tuple if isinstance(text, tuple) else list
    inside = enumerate(listed(where, text))
    return kind([checked_texts(t, f"{where} {i}" if depth == 0 else f"{where}.{i}", depth + 1) for i, t in inside])


def as_ids(token_ids: Any) -> Any:
    """An id, a row of ids or rows of them, in lists, tensors or arrays, as int, list or list of lists.

    Raises:
        InputError: no integers, or below 0, or 2**32 and more; names the first bad one.
    """
    if isinstance(token_ids, Mapping):
        if "input_ids" not in token_ids:
            raise InputError(f"there are no input_ids in {short(token_ids)}; give a row of ids, or rows of them")
        token_ids = token_ids["input_ids"]
    if isinstance(token_ids, (Tensor, np.ndarray, np.generic)):
        token_ids = token_ids.tolist()
    if isinstance(token_ids, list) and set(map(type, token_ids)) == {int} and min(token_ids) >= 0 and max(token_ids) < 2**32:
        return token_ids  # the rule, at the speed of C
    if isinstance(token_ids, int) and not isinstance(token_ids, bool):
        if not 0 <= token_ids < 2**32:
            raise InputError(f"token id {short(token_ids)} is no id; ids go from 0 to the size of the vocabulary - 1")
        return token_ids
    if isinstance(token_ids, (str, bytes)) or not isinstance(token_ids, Iterable):
        raise InputError(f"token ids are integers, not {short(token_ids)} ({type(token_ids).__name__})")
    return [as_ids(i) for i in token_ids]


def listed(where: str, values: Any) -> list[Any]:
    """What is in a list, an array or an iterator.

    Raises:
        InputError: nothing can be: a number, a string, None.
    """
    if isinstance(values, (str, bytes, bytearray, Mapping)):
        raise InputError(f"{where} is a {type(values).__name__}; give a list")
    try:
        return list(values)
    except TypeError:
        raise InputError(f"{where} is {short(values)}; give a list") from None


def mapping(name: str, value: Any) -> Mapping[str, Any]:
    """A dict of options; empty for None.

    Raises:
        InputError: something else.
    """
    if value is not None and not isinstance(value, Mapping):
        raise InputError(f"{name} is {short(value)}; give a dict")
    return value or {}


def flag(name: str, value: Any) -> bool:
    """A value as True or False.

    Raises:
        InputError: it is neither, as an array of several values.
    """
    try:
        return bool(value)
    except (RuntimeError, TypeError, ValueError):
        raise InputError(f"{name} is {short(value)}; use True or False") from None


def checked_setting(name: str, value: Any) -> Any:
    """What an attribute of a tokenizer may be, or the value as it is where that is not settled.

    Raises:
        InputError: something else.
    """
    if name in ("padding_side", "truncation_side"):
        return checked_side(name, value)
    if name in ("add_prefix_space", "split_special_tokens", "clean_up_tokenization_spaces"):
        return flag(name, value)
    if name == "model_max_length":
        value = int(1e30) if value is None else value
        return _integer(name, int(value) if isinstance(value, float) and value.is_integer() else value, 0)
    if name == "model_input_names":
        return [checked_text(text, f"{name} {i}") for i, text in enumerate(listed(name, value))]
    if name == "chat_template" and not isinstance(value, (str, list, Mapping, type(None))):
        raise InputError(f"{name} is {short(value)}; give a text, or several under names")
    return value


class Shape(NamedTuple):
    """How rows are cut and filled: strategies in the words of transformers, max_length in tokens."""

    padding: str
    truncation: str
    max_length: int | None
    stride: int = 0
    multiple: int | None = None
    side: str = "right"


def shape_of(
    padding: Any, truncation: Any, max_length: Any, stride: Any, multiple: Any, side: Any, model_max_length: int
) -> Shape:
    """The rules of transformers: max_length alone truncates; a missing one is the model's, or nothing where it has none.

    Raises:
        InputError: a value that is none, or values that contradict each other.
    """
    if max_length is not None and padding is False and truncation is None:
        truncation = True
    if max_length is not None and padding is True and truncation in (None, False, "do_not_truncate"):
        warn_once("max_length is ignored with padding=True and no truncation; to pad to it use padding='max_length'")
    padding = _one_of("padding", padding, _PADDING, ("longest", "max_length", "do_not_pad"))
    strategies = ("longest_first", "only_first", "only_second", "do_not_truncate")
    truncation = _one_of("truncation", truncation, _TRUNCATION, strategies)
    max_length, stride = _integer("max_length", max_length, 0), _integer("stride", stride, 0) or 0
    multiple = _integer("pad_to_multiple_of", multiple, 1)
    checked_side("padding_side", side)
    if max_length is None and model_max_length <= UNLIMITED:
        max_length = model_max_length if padding == "max_length" or truncation != "do_not_truncate" else None
    elif max_length is None:
        padding = "do_not_pad" if padding == "max_length" else padding
        truncation = "do_not_truncate"
    if multiple is not None and multiple > MAX_TEXT:
        raise InputError(f"pad_to_multiple_of is {short(multiple)}; the limit is {MAX_TEXT}")
    if padding == "max_length" and max_length is not None and max_length > MAX_TEXT:
        raise InputError(f"max_length is {short(max_length)}, to which rows are padded; the limit is {MAX_TEXT}")
    if (
        truncation != "do_not_truncate"
        and padding != "do_not_pad"
        and multiple
        and max_length is not None
        and max_length % multiple
    ):
        raise InputError(
            f"max_length {max_length} is no multiple of pad_to_multiple_of {multiple}: rows cut to the one and filled to a "
            "multiple of the other would be longer; change one of them"
        )
    return Shape(padding, truncation, max_length, stride, multiple, side)


def checked_side(name: str, side: Any) -> str:
    """ "left" or "right", or an InputError."""
    if not isinstance(side, str) or side not in ("left", "right"):
        raise InputError(f"{name} is {short(side)}; use 'left' or 'right'")
    return str(side)


def checked_tokens(tokens: Any, where: str = "new_tokens") -> list[str | AddedToken]:
    """Tokens to add as a list of strings and AddedTokens."""
    tokens = [tokens] if isinstance(tokens, (str, AddedToken)) else tokens
    if isinstance(tokens, (np.ndarray, Tensor)) or not isinstance(tokens, Sequence):
        raise InputError(f"{where} is a {type(tokens).__name__}; give strings or AddedTokens")
    for i, token in enumerate(tokens):
        checked_text(token.content if isinstance(token, AddedToken) else token, f"{where} {i}")
    return list(tokens)


def _one_of(name: str, value: Any, known: dict[Any, str], values: tuple[str, ...]) -> str:
    if isinstance(value, bool) or value is None:
        return known[value]
    if not isinstance(value, str) or value not in values:
        raise InputError(f"{name} is {short(value)}{nearest(value, values)}; use True, False or one of {', '.join(values)}")
    return str(getattr(value, "value", value))  # an enum of transformers is a string as well


def _integer(name: str, value: Any, least: int) -> Any:
    """An integer, be it numpy's or a tensor, or None."""
    value = value.tolist() if isinstance(value, (np.generic, np.ndarray, Tensor)) else value
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
        raise InputError(f"{name} is {short(value)}; give an integer from {least} on, or leave it out")
    return value
