"""A tokenizer to files, all of them or none."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..errors import InputError, TokenizerError, short
from ..files import atomic
from .arguments import checked_text


def save(tokenizer: Any, save_directory: str | os.PathLike[str], legacy: bool) -> tuple[str, ...]:
    """Write the files of `GPT2Tokenizer.save_pretrained`, all of them or none; returns their paths.

    Raises:
        TokenizerError: the folder is a file, or cannot be written; what was there still is.
    """
    whole = tokenizer.backend_tokenizer.to_str(pretty=True)
    config = {"tokenizer_class": "GPT2Tokenizer", **settings_of(tokenizer)}
    texts = {"tokenizer.json": whole, "tokenizer_config.json": _text(config)}
    if legacy:
        texts |= _vocabulary(whole) | {"added_tokens.json": _text(tokenizer.added_tokens_encoder)}
    return _write(save_directory, dict(sorted(texts.items())))


def save_vocabulary(tokenizer: Any, save_directory: str | os.PathLike[str], prefix: str | None) -> tuple[str, ...]:
    """Write vocab.json and merges.txt, as `PREFIX-vocab.json` where there is one; returns their paths.

    Raises:
        TokenizerError: as `save`.
        InputError: the prefix is that of a path.
    """
    if prefix is not None and not isinstance(prefix, str):
        raise InputError(f"filename_prefix is {short(prefix)}; give the beginning of a file's name")
    checked_text(prefix or "", "filename_prefix")
    if prefix and os.path.basename(prefix) != prefix:
        raise InputError(f"filename_prefix {prefix!r} names a folder; give that as save_directory")
    texts = _vocabulary(tokenizer.backend_tokenizer.to_str())
    return _write(save_directory, {f"{prefix}-{name}" if prefix else name: text for name, text in texts.items()})


def _write(folder: str | os.PathLike[str], texts: dict[str, str]) -> tuple[str, ...]:
    atomic.write(folder, texts, TokenizerError)
    return tuple(str(Path(folder) / name) for name in texts)


def _vocabulary(tokenizer_json: str) -> dict[str, str]:
    """The two files of GPT-2's release, byte for byte as `tokenizers` writes them."""
    model = json.loads(tokenizer_json)["model"]
    merges = ["#version: 0.2", *map(" ".join, model["merges"]), ""]
    vocabulary = json.dumps(model["vocab"], ensure_ascii=False, separators=(",", ":"))
    return {"vocab.json": vocabulary, "merges.txt": "\n".join(merges)}


def settings_of(tokenizer: Any) -> dict[str, Any]:
    """Keywords of GPT2Tokenizer, as tokenizer_config.json has them; tokenizer.json holds all that the added tokens are."""
    settings: dict[str, Any] = {
        "add_prefix_space": tokenizer.add_prefix_space,
        "clean_up_tokenization_spaces": tokenizer.clean_up_tokenization_spaces,
        "errors": "replace",
        "model_input_names": tokenizer.model_input_names,
        "model_max_length": tokenizer.model_max_length,
        "padding_side": tokenizer.padding_side,
        "truncation_side": tokenizer.truncation_side,
        "split_special_tokens": tokenizer.split_special_tokens,
        **{name: None if token is None else str(token) for name, token in tokenizer._special.items()},
    }
    settings = {
        name: value for name, value in settings.items() if value is not None or name in ("bos_token", "eos_token", "unk_token")
    }
    if tokenizer.extra_special_tokens:
        settings["extra_special_tokens"] = tokenizer.extra_special_tokens
    if tokenizer.chat_template is not None:
        settings["chat_template"] = tokenizer.chat_template
    return settings


def _text(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"
