"""A tokenizer to files, all of them or none."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from ..errors import TokenizerError


def save(tokenizer: Any, save_directory: str | os.PathLike[str], legacy: bool) -> tuple[str, ...]:
    """Write the files of `GPT2Tokenizer.save_pretrained`; they are complete before the first of them takes its name.

    Raises:
        TokenizerError: the folder is a file, or cannot be written.
    """
    folder = Path(save_directory)
    if folder.exists() and not folder.is_dir():
        raise TokenizerError(f"{folder} is a file; give a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".tokenizer-", dir=folder) as scratch:
            new = Path(scratch)
            tokenizer.backend_tokenizer.save(str(new / "tokenizer.json"))
            _write(new / "tokenizer_config.json", _settings(tokenizer))
            if legacy:
                tokenizer.backend_tokenizer.model.save(scratch)
                _write(new / "added_tokens.json", tokenizer.added_tokens_encoder)
            names = sorted(path.name for path in new.iterdir())
            for name in names:
                os.replace(new / name, folder / name)
    except Exception as error:
        if not isinstance(error, OSError) and type(error) is not Exception:  # the library raises bare Exception
            raise
        raise TokenizerError(f"the tokenizer cannot be written to {folder}: {error}") from error
    return tuple(str(folder / name) for name in names)


def _settings(tokenizer: Any) -> dict[str, Any]:
    """tokenizer_config.json, as transformers 5 reads it; tokenizer.json holds all that the added tokens are."""
    settings: dict[str, Any] = {
        "tokenizer_class": "GPT2Tokenizer",
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


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
