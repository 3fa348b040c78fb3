"""A vocabulary of one's own texts, by the pipeline of a tokenizer that there is."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from tokenizers import AddedToken, Tokenizer, pre_tokenizers
from tokenizers.trainers import BpeTrainer

from ..config import is_int
from ..errors import InputError, UnknownOptionError, nearest, short
from .arguments import checked_text, flag

_OPTIONS = ("min_frequency", "limit_alphabet", "max_token_length", "show_progress")


def train(
    backend: Tokenizer,
    texts: Iterable[Any],
    vocab_size: int,
    length: int | None,
    new: list[str | AddedToken],
    renamed: dict[str, str],
    options: dict[str, Any],
) -> Tokenizer:
    """The pipeline of `backend` over a vocabulary trained on `texts`, its special tokens and the `new` ones first.

    Args:
        length: texts in all, for the bar. renamed: special token -> what it is called from now on.
        options: of the trainer.

    Raises:
        InputError: a number out of range, or something that is no text. UnknownOptionError: another option.
    """
    if odd := next((name for name in options if name not in _OPTIONS), None):
        raise UnknownOptionError(f"train_new_from_iterator has no option {odd!r}{nearest(odd, _OPTIONS)}")
    numbers = {"vocab_size": vocab_size, "length": length} | {k: v for k, v in options.items() if k != "show_progress"}
    for name, value in numbers.items():
        if not (is_int(value) and 0 <= value < 2**32) and (value is not None or name == "vocab_size"):
            raise InputError(f"{name}={short(value)} is not an integer from 0 to {2**32 - 1}")
    try:
        found_texts = None if isinstance(texts, (str, bytes)) else iter(texts)
    except TypeError:
        found_texts = None
    if found_texts is None:
        raise InputError(f"text_iterator is {short(texts)}; give texts, or lists of them, in a list or one by one")
    parts = json.loads(backend.to_str())
    added, around = parts.pop("added_tokens"), parts.pop("post_processor")
    parts["model"] |= {"vocab": {}, "merges": []}
    found = Tokenizer.from_str(json.dumps(parts))
    special = [_renamed(token, renamed) for token in added if token["special"]]
    trainer = BpeTrainer(
        special_tokens=[*special, *new],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        vocab_size=vocab_size,
        show_progress=flag("show_progress", options.get("show_progress", True)),
        **{k: v for k, v in options.items() if v is not None and k != "show_progress"},
    )
    found.train_from_iterator(_checked(found_texts), trainer=trainer, length=length)
    if around is None:
        return found
    for entry in around.get("special_tokens", {}).values():
        entry["tokens"] = [renamed.get(token, token) for token in entry["tokens"]]
        entry["ids"] = [found.token_to_id(token) for token in entry["tokens"]]
    return Tokenizer.from_str(json.dumps(json.loads(found.to_str()) | {"post_processor": around}))


def _renamed(token: dict[str, Any], renamed: dict[str, str]) -> AddedToken:
    values = {k: v for k, v in token.items() if k not in ("id", "special")}
    return AddedToken(**(values | {"content": renamed.get(token["content"], token["content"])}))


def _checked(texts: Iterable[Any]) -> Iterator[Any]:
    for i, item in enumerate(texts):
        if isinstance(item, (list, tuple)):
            yield [checked_text(text, f"text {i}.{n}") for n, text in enumerate(item)]
        else:
            yield checked_text(item, f"text {i}")
