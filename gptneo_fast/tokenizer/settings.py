"""What stands beside the vocabulary: tokenizer_config.json, special_tokens_map.json, added_tokens.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from ..errors import TokenizerError
from ..files.hub import Source
from ..files.strict_json import read_object
from .files import Parts, added_token, read_text
from .special import NAMES

_KINDS: dict[str, tuple[type, ...]] = {  # setting -> what it may be
    "add_bos_token": (bool,),
    "add_eos_token": (bool,),
    "add_prefix_space": (bool,),
    "chat_template": (str, list, dict),
    "clean_up_tokenization_spaces": (bool,),
    "errors": (str,),
    "model_input_names": (list,),
    "model_max_length": (int, float),
    "padding_side": (str,),
    "split_special_tokens": (bool,),
    "truncation_side": (str,),
}


def read_settings(source: Source, parts: Parts, given: dict[str, Any]) -> dict[str, Any]:
    """Keywords of GPT2Tokenizer: those given, then those of the files beside the vocabulary, and `added_tokens_decoder`.

    As in transformers: tokens listed in tokenizer_config.json stand instead of those of all other files; else
    special_tokens_map.json wins over tokenizer_config.json, and tokenizer.json over added_tokens.json.

    Raises:
        TokenizerError: a setting of the wrong kind; names the file and the setting.
    """
    config, path = _read(source, "tokenizer_config.json")
    out: dict[str, Any] = dict(parts.sides)
    for name, kinds in _KINDS.items():
        value = config.get(name)
        if value is None:
            continue
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise TokenizerError(f"{path}: {name} is {value!r:.80}; it must be a {' or '.join(k.__name__ for k in kinds)}")
        if name.endswith("_side") and value not in ("left", "right"):
            raise TokenizerError(f"{path}: {name} is {value!r:.80}; use 'left' or 'right'")
        out[name] = value
    if template := source.file("chat_template.jinja"):  # wins over the setting, as in transformers
        out["chat_template"] = read_text(template)
    if "model_max_length" in out:
        out["model_max_length"] = int(out["model_max_length"])
    if source.file("tokenizer.json"):  # its post_processor says it
        out.pop("add_bos_token", None), out.pop("add_eos_token", None)
    _specials(config, path, out)
    out.update(given)
    listed = config.get("added_tokens_decoder")
    if listed is not None:
        added = {_index(i, path): added_token(t, f"{path}: added_tokens_decoder[{i}]") for i, t in _items(listed, path)}
    else:
        special, special_path = _read(source, "special_tokens_map.json")
        _specials({k: v for k, v in special.items() if not given.get(k)}, special_path, out)
        added = _legacy(source, out) | parts.added
    by_text = {t.content: t for t in added.values()}
    for name in [n for n in out if n.endswith("_token") and n not in _KINDS]:
        if isinstance(out[name], (str, AddedToken)):
            out[name] = by_text.get(str(out[name]), out[name])
    return out | {"added_tokens_decoder": added}


def _read(source: Source, name: str) -> tuple[dict[str, Any], Path | str]:
    path = source.file(name)
    return ({}, name) if path is None else (read_object(path, TokenizerError), path)


def _specials(values: dict[str, Any], path: Path | str, out: dict[str, Any]) -> None:
    """Special tokens of a file into keywords; one may stand there as a string or as an object."""
    extra = values.get("extra_special_tokens") or values.get("additional_special_tokens")
    named: dict[str, Any] = {}
    for name, value in values.items():
        if name in NAMES and value is None:
            out[name] = None
        elif name in NAMES or (name.endswith("_token") and isinstance(value, (str, dict))):
            named[name] = value
    for name, value in (named | (extra if isinstance(extra, dict) else {})).items():
        out[name] = value if isinstance(value, str) else added_token(value, f"{path}: {name}", special=True)
    if isinstance(extra, list):
        tokens = [
            added_token(t, f"{path}: extra_special_tokens[{i}]", special=True, normalized=False) for i, t in enumerate(extra)
        ]
        known = [str(t) for t in out.get("extra_special_tokens", [])]
        out["extra_special_tokens"] = [*out.get("extra_special_tokens", []), *(t for t in tokens if str(t) not in known)]
    elif extra is not None and not isinstance(extra, dict):
        raise TokenizerError(f"{path}: extra_special_tokens is {extra!r:.80}; it must be a list or an object")


def _legacy(source: Source, out: dict[str, Any]) -> dict[int, AddedToken]:
    """Tokens of added_tokens.json, which gives text -> id."""
    values, path = _read(source, "added_tokens.json")
    named = [out[n] for n in out if n.endswith("_token")]
    special = {str(t) for t in named if isinstance(t, (str, AddedToken))} | {
        str(t) for t in out.get("extra_special_tokens", [])
    }
    added: dict[int, AddedToken] = {}
    for text, i in values.items():
        index = _index(i, path)
        if index in added:
            raise TokenizerError(f"{path}: tokens {added[index].content!r:.80} and {text!r:.80} have the same id {index}")
        added[index] = added_token(text, f"{path}: {text!r:.80}", special=text in special, normalized=text not in special)
    return added


def _items(values: Any, path: Path | str) -> list[tuple[str, Any]]:
    if not isinstance(values, dict):
        raise TokenizerError(f"{path}: added_tokens_decoder is a {type(values).__name__}; it must be an object, id -> token")
    return list(values.items())


def _index(value: Any, path: Path | str) -> int:
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 12:
        value = int(value)
    if type(value) is not int or not 0 <= value < 2**32:
        raise TokenizerError(f"{path}: {value!r:.40} is no id of a token")
    return value
