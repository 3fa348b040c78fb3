"""Texts to ids: what every call of the tokenizer comes down to."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any, Protocol

from tokenizers import Encoding, Tokenizer

from ..errors import InputError, UnknownOptionError, nearest, short
from .arguments import Shape, checked_texts, flag, mapping
from .encoding import BatchEncoding
from .padding import no_pad_token

_OPTIONS: dict[str, Any] = {
    "add_special_tokens": True,
    "is_split_into_words": False,
    "return_attention_mask": None,
    "return_length": False,
    "return_offsets_mapping": False,
    "return_overflowing_tokens": False,
    "return_special_tokens_mask": False,
    "return_tensors": None,
    "return_token_type_ids": None,
    "split_special_tokens": None,
    "tokenizer_kwargs": None,
    "verbose": True,
}
_SHAPES = ("padding", "truncation", "max_length", "max_target_length", "stride", "pad_to_multiple_of", "padding_side")


class Settings(Protocol):
    """What encoding reads of a tokenizer."""

    backend_tokenizer: Tokenizer
    model_input_names: list[str]
    pad_token: str | None
    pad_token_id: int | None
    pad_token_type_id: int
    split_special_tokens: bool
    truncation_side: str
    _lock: threading.Lock


def encode(tokenizer: Settings, text: Any, pair: Any, shape: Shape, given: Mapping[str, Any]) -> BatchEncoding:
    """The encoding of a text or of several; `given` holds options of `_OPTIONS`.

    Raises:
        InputError, UnknownOptionError: see GPT2Tokenizer.__call__.
    """
    for name in given:
        if name not in _OPTIONS:
            raise UnknownOptionError(f"the tokenizer has no option {name!r}{nearest(name, [*_OPTIONS, *_SHAPES])}")
    options = _OPTIONS | dict(given) | dict(mapping("tokenizer_kwargs", given.get("tokenizer_kwargs")))
    for name, value in options.items():
        if name not in ("return_tensors", "tokenizer_kwargs") and value is not None:
            options[name] = flag(name, value)
    words = bool(options["is_split_into_words"])
    rows, batched = _rows(text, pair, words)
    if shape.truncation == "only_second" and not all(isinstance(row, tuple) for row in rows):
        raise InputError("truncation='only_second' needs pairs; give text_pair, or use truncation=True")
    found = _run(tokenizer, rows, shape, options) if rows else []
    overflows = options["return_overflowing_tokens"]
    kept = [(i, e) for i, row in enumerate(found) for e in ((row, *row.overflowing) if overflows else (row,))]
    columns = _columns(kept, options, tokenizer.model_input_names)
    kind = options["return_tensors"]
    if not batched and kind is None and not overflows:
        columns = {k: v[0] if isinstance(v[0], list) else v for k, v in columns.items()}
    return BatchEncoding(columns, [e for _, e in kept], kind)


def _rows(text: Any, pair: Any, words: bool) -> tuple[list[Any], bool]:
    """The texts or pairs (tuples) of a call, and whether the call gave several."""
    text = checked_texts(text)
    pair = None if pair is None else checked_texts(pair, "text_pair")
    if words and isinstance(text, str):
        raise InputError("is_split_into_words=True needs lists of words, not a string")
    batched = isinstance(text, (list, tuple)) and (not words or (bool(text) and isinstance(text[0], (list, tuple))))
    if not batched:
        return [(text, pair) if pair else text], False
    if pair is not None:
        if isinstance(pair, str) or len(pair) != len(text):
            count = "one" if isinstance(pair, str) else len(pair)
            raise InputError(f"{len(text)} texts and {count} of text_pair; give as many of each")
        return list(zip(text, pair, strict=True)), True
    rows = []
    for i, row in enumerate(text):
        plain = isinstance(row, str) or (words and all(isinstance(w, str) for w in row))
        if not plain and len(row) != 2:
            raise InputError(f"text {i} is a list of {len(row)}; give a string, a pair, or words with is_split_into_words=True")
        rows.append(row if plain and isinstance(row, str) else list(row) if plain else tuple(row))
    return rows, True


def _run(tokenizer: Settings, rows: list[Any], shape: Shape, options: Mapping[str, Any]) -> list[Encoding]:
    """Encodings, cut and filled by the backend; its settings are the call's own, and back to none after it."""
    backend, pads = tokenizer.backend_tokenizer, shape.padding != "do_not_pad"
    if pads and tokenizer.pad_token_id is None:
        raise InputError(no_pad_token())
    split = options["split_special_tokens"]
    with tokenizer._lock:
        try:
            if shape.truncation != "do_not_truncate":
                _cut(backend, rows, shape, tokenizer.truncation_side, options)
            if pads:
                backend.enable_padding(
                    direction=shape.side,
                    pad_id=tokenizer.pad_token_id,
                    pad_type_id=tokenizer.pad_token_type_id,
                    pad_token=tokenizer.pad_token,
                    length=shape.max_length if shape.padding == "max_length" else None,
                    pad_to_multiple_of=shape.multiple,
                )
            backend.encode_special_tokens = tokenizer.split_special_tokens if split is None else bool(split)
            found: list[Encoding] = backend.encode_batch(
                rows,
                add_special_tokens=bool(options["add_special_tokens"]),
                is_pretokenized=bool(options["is_split_into_words"]),
            )
            return found
        except TypeError as error:
            raise InputError(f"these are no texts, pairs of texts or lists of words: {error}") from error
        except Exception as error:  # truncation raises bare Exception
            if isinstance(error, InputError):
                raise
            raise InputError(f"the texts cannot be cut to {short(shape.max_length)} tokens: {error}") from error
        finally:
            backend.no_truncation()
            backend.no_padding()


def _cut(backend: Tokenizer, rows: list[Any], shape: Shape, side: str, options: Mapping[str, Any]) -> None:
    """Let the backend truncate, where it can: it panics on a stride that is not shorter than what is kept of a text."""
    pairs = [i for i, row in enumerate(rows) if isinstance(row, tuple)]
    around = backend.num_special_tokens_to_add(bool(pairs)) if options["add_special_tokens"] else 0
    most = (shape.max_length or 0) - around
    if most < 0 or (shape.stride and shape.stride >= most):
        raise InputError(
            f"max_length {shape.max_length} leaves no room: {around} special tokens stand around a text, and stride "
            f"{shape.stride} must be less than what is left"
        )
    if shape.stride and pairs:
        words = bool(options["is_split_into_words"])
        whole = backend.encode_batch([rows[i] for i in pairs], add_special_tokens=False, is_pretokenized=words)
        for i, encoding in zip(pairs, whole, strict=True):
            second = sum(s == 1 for s in encoding.sequence_ids)
            first = len(encoding.ids) - second
            kept = {"only_first": most - second, "only_second": most - first}.get(shape.truncation, most // 2)
            if first + second > most and 0 < kept <= shape.stride:
                raise InputError(f"text {i} keeps {kept} tokens and stride is {shape.stride}, which must be less")
    backend.enable_truncation(most + around, stride=shape.stride, strategy=shape.truncation, direction=side)


def _columns(kept: list[tuple[int, Encoding]], options: Mapping[str, Any], names: list[str]) -> dict[str, list[Any]]:
    """Entries of the result by name, from (text, row of it) pairs."""

    def asked(name: str) -> bool:
        wanted = options[f"return_{name}"]
        return name in names if wanted is None else bool(wanted)

    columns: dict[str, list[Any]] = {"input_ids": [e.ids for _, e in kept]}
    if asked("token_type_ids"):
        columns["token_type_ids"] = [e.type_ids for _, e in kept]
    if asked("attention_mask"):
        columns["attention_mask"] = [e.attention_mask for _, e in kept]
    if asked("special_tokens_mask"):
        columns["special_tokens_mask"] = [e.special_tokens_mask for _, e in kept]
    if asked("offsets_mapping"):
        columns["offset_mapping"] = [e.offsets for _, e in kept]
    if asked("length"):
        columns["length"] = [len(e.ids) for _, e in kept]
    if asked("overflowing_tokens"):
        columns["overflow_to_sample_mapping"] = [i for i, _ in kept]
    return columns
