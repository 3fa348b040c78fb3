"""Tokenizer files to the parts of a tokenizer, screened: tokenizer.json, or vocab.json with merges.txt."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from ..errors import InputError, NoTokenizerError, TokenizerError, short
from ..files.hub import Source
from ..files.strict_json import MAX_BYTES, read_object
from .arguments import listed
from .stream import ALPHABET

# Component of tokenizer.json -> kinds that GPT-2's may have. A regular expression of a stranger is none of them.
_ALLOWED: dict[str, tuple[str | None, ...]] = {
    "model": ("BPE", None),  # older files do not say
    "pre_tokenizer": ("ByteLevel",),
    "decoder": ("ByteLevel",),
    "post_processor": (None, "ByteLevel", "TemplateProcessing"),
    "normalizer": (None,),
}
# What a BPE model's settings must be: they change ids, or make them random.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "dropout": (None, 0.0),
    "unk_token": (None, "", "<|endoftext|>"),  # no text needs one: every byte is a token
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "byte_fallback": (None, False),
    "ignore_merges": (None, False),
}
MOST_CHARACTERS = 4096  # of an added token, which every text is searched for
MOST_ADDED = 2**17


@dataclass
class Parts:
    """What a tokenizer is made of.

    vocab: token -> id. merges: pairs by rank. added: id -> token. post_processor: of `tokenizers`, or None.
    sides: padding_side and truncation_side, where the file says them.
    """

    vocab: dict[str, int]
    merges: list[tuple[str, str]]
    added: dict[int, AddedToken] = field(default_factory=dict)
    post_processor: Any = None
    sides: dict[str, str] = field(default_factory=dict)


def read_parts(source: Source) -> Parts:
    """The parts that stand in a folder or repository; vocab.json with merges.txt where there is no tokenizer.json.

    Raises:
        TokenizerError: neither is there, or they are no GPT-2 tokenizer; names the file and what is wrong in it.
    """
    if path := source.file("tokenizer.json"):
        return _of_json(path)
    vocab, merges = source.file("vocab.json"), source.file("merges.txt")
    if vocab is None or merges is None:
        there = f", and found only {(vocab or merges).name}" if vocab or merges else ""  # type: ignore[union-attr]
        raise NoTokenizerError(
            f"{source.name!r} holds no tokenizer; looked for tokenizer.json, and for vocab.json with merges.txt{there}"
        )
    return _screened(Parts(read_object(vocab, TokenizerError), _read_merges(merges)), f"{vocab} with {merges.name}")


def given_parts(vocab: Any, merges: Any, tokenizer_file: Any) -> Parts:
    """The parts that a caller gives, as objects or as paths of files.

    Raises:
        TokenizerError: as `read_parts`. InputError: nothing was given.
    """
    if isinstance(vocab, Parts):
        return vocab
    for name, given in (("tokenizer_file", tokenizer_file), ("vocab", None if isinstance(vocab, Mapping) else vocab)):
        if given is not None and not isinstance(given, (str, os.PathLike)):
            raise InputError(f"{name} is {short(given)}; give the path of a file")
    if tokenizer_file is not None:
        return _of_json(Path(tokenizer_file))
    if vocab is None or merges is None:
        raise InputError("a tokenizer needs vocab and merges, tokenizer_file or tokenizer_object; or use from_pretrained")
    ids = vocab if isinstance(vocab, Mapping) else read_object(Path(vocab), TokenizerError)
    pairs = _read_merges(Path(merges)) if isinstance(merges, (str, os.PathLike)) else _pairs(merges, "merges[{}]".format)
    return _screened(Parts(dict(ids), pairs), "vocab" if isinstance(vocab, Mapping) else str(vocab))


def _of_json(path: Path) -> Parts:
    """The parts in a tokenizer.json.

    Raises:
        TokenizerError: a component that GPT-2's tokenizer does not have, or one that is malformed.
    """
    values = read_object(path, TokenizerError)
    for name, kinds in _ALLOWED.items():
        part = values.get(name)
        kind = part.get("type") if isinstance(part, dict) else part
        if (name == "model" and not isinstance(part, dict)) or not (kind is None or isinstance(kind, str)) or kind not in kinds:
            wanted = " or ".join(str(k) for k in kinds)
            raise TokenizerError(f"{path}: {name} is {kind!r:.80}; GPT-2's tokenizer has {wanted}")
    if values["pre_tokenizer"].get("use_regex", True) is not True:
        raise TokenizerError(f"{path}: pre_tokenizer.use_regex is off; GPT-2's tokenizer splits words first")
    model = values["model"]
    for name, plain in _PLAIN.items():
        if model.get(name) not in plain:
            raise TokenizerError(f"{path}: model.{name} is {model[name]!r:.80}; GPT-2's tokenizer has {plain[-1]!r}")
    if not isinstance(model.get("vocab"), dict) or not isinstance(model.get("merges"), list):
        raise TokenizerError(f"{path}: model has no vocab (an object) or no merges (a list)")
    merges = _pairs(model["merges"], lambda i: f"{path}: model.merges[{i}]")
    added = _added_of(values.get("added_tokens") or [], path)
    size = len({*model["vocab"], *(t.content for t in added.values())})
    return _screened(Parts(model["vocab"], merges, added, _post_processor(values, path, size), _sides(values)), str(path))


def _read_merges(path: Path) -> list[tuple[str, str]]:
    """The pairs in a merges.txt: two tokens a line with a space between, best first.

    Raises:
        TokenizerError: no regular file, not UTF-8, or a line that is no pair; names the line.
    """
    lines = read_text(path).split("\n")
    kept = [i for i, line in enumerate(lines) if line not in ("", "\r") and line[:8] != "#version"]
    return _pairs([lines[i].removesuffix("\r") for i in kept], lambda i: f"{path}, line {kept[i] + 1}")


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        TokenizerError: no regular file, not UTF-8, more bytes than any such file has.
    """
    try:
        if not path.is_file() or path.stat().st_size > MAX_BYTES:
            raise TokenizerError(f"{path} is no regular file of at most {MAX_BYTES} bytes")
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path} is not UTF-8: {error}") from error
    except OSError as error:
        raise TokenizerError(f"{path} cannot be read: {error}") from error


def build(parts: Parts, add_prefix_space: bool) -> Tokenizer:
    """The `tokenizers.Tokenizer` of these parts, without its added tokens."""
    try:
        tokenizer = Tokenizer(models.BPE(vocab=parts.vocab, merges=parts.merges, fuse_unk=False))
    except Exception as error:  # the library raises bare Exception
        raise TokenizerError(f"tokenizers {tokenizers.__version__} does not take this vocabulary: {error}") from error
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    if parts.post_processor is not None:
        tokenizer.post_processor = parts.post_processor
    return tokenizer


def added_token(value: Any, where: str, **defaults: Any) -> AddedToken:
    """An AddedToken from a string or from an object of a file.

    Raises:
        TokenizerError: it is neither, or has other fields; names `where`.
    """
    if isinstance(value, AddedToken):
        return value
    fields = {"content": value} if isinstance(value, str) else value
    if isinstance(fields, Mapping):
        fields = defaults | {k: v for k, v in fields.items() if k not in ("__type", "id")}
        switches = ("single_word", "lstrip", "rstrip", "normalized", "special")
        content = fields.pop("content", None)
        if isinstance(content, str) and len(content) > MOST_CHARACTERS:
            raise TokenizerError(f"{where} has {len(content)} characters; a token has at most {MOST_CHARACTERS}")
        if isinstance(content, str) and content and all(k in switches and isinstance(v, bool) for k, v in fields.items()):
            try:
                content.encode()
                return AddedToken(content, **fields)
            except UnicodeEncodeError:
                pass
    raise TokenizerError(f"{where} is {short(value)}, which is no token; give a string or an object with content")


def _screened(parts: Parts, where: str) -> Parts:
    """The parts, if their ids and merges can be right; `where` names their file in the error."""
    vocab, size = parts.vocab, len({*parts.vocab, *(t.content for t in parts.added.values())})
    holders: dict[int, str] = {}
    for token, i in vocab.items():
        if type(i) is not int or not 0 <= i < size:
            raise TokenizerError(
                f"{where}: token {short(token)} has id {short(i)}; ids of {size} tokens go from 0 to {size - 1}"
            )
        if i in holders:
            raise TokenizerError(f"{where}: tokens {holders[i]!r:.80} and {token!r:.80} have the same id {i}")
        holders[i] = token
    if lacking := [f"0x{byte:02x} ({char!r})" for char, byte in ALPHABET.items() if char not in vocab]:
        raise TokenizerError(
            f"{where}: the vocabulary lacks {len(lacking)} of the 256 bytes, the first is {lacking[0]}; "
            "texts with them would lose them"
        )
    for rank, (left, right) in enumerate(parts.merges):
        if left not in vocab or right not in vocab or left + right not in vocab:
            lacking = [t for t in (left, right, left + right) if t not in vocab]
            raise TokenizerError(
                f"{where}: merge {rank} ({left!r:.40} {right!r:.40}) needs {lacking[0]!r:.80}, which has no id"
            )
    return parts


def _pairs(merges: Iterable[Any], where: Callable[[int], str]) -> list[tuple[str, str]]:
    """Merges, each "a b" or ["a", "b"], as pairs; `where` names the place of one that is neither."""
    pairs = []
    for i, merge in enumerate(listed("merges", merges)):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if isinstance(pair, (list, tuple)) and len(pair) == 2:
            left, right = pair
            if left and right and isinstance(left, str) and isinstance(right, str):
                pairs.append((left, right))
                continue
        raise TokenizerError(f"{where(i)}: {short(merge)} is no pair of tokens")
    return pairs


def _added_of(values: Any, path: Path) -> dict[int, AddedToken]:
    added: dict[int, AddedToken] = {}
    if isinstance(values, list) and len(values) > MOST_ADDED:
        raise TokenizerError(f"{path}: {len(values)} added_tokens; there can be {MOST_ADDED}")
    for i, value in enumerate(values if isinstance(values, list) else [values]):
        where = f"{path}: added_tokens[{i}]"
        if not isinstance(value, dict) or type(value.get("id")) is not int:
            raise TokenizerError(f"{where} is {value!r:.100}; it needs an id and a content")
        if value["id"] in added:
            raise TokenizerError(f"{where}: id {value['id']} is given to {added[value['id']].content!r:.80} already")
        added[value["id"]] = added_token(value, where)
    return added


def _post_processor(values: dict[str, Any], path: Path, size: int) -> Any:
    part = values.get("post_processor")
    if part is None:
        return None
    special = part.get("special_tokens", {}) if part.get("type") == "TemplateProcessing" else {}
    ids = [i for t in special.values() if isinstance(t, dict) for i in t.get("ids", [])] if isinstance(special, dict) else [-1]
    if bad := [i for i in ids if type(i) is not int or not 0 <= i < size]:
        raise TokenizerError(f"{path}: post_processor puts id {bad[0]!r:.40} around a text; there are {size} tokens")
    bare = {"version": "1.0", "added_tokens": [], "post_processor": part, "model": {"type": "BPE", "vocab": {}, "merges": []}}
    try:
        read = Tokenizer.from_str(json.dumps(bare))
    except Exception as error:
        raise TokenizerError(
            f"{path}: post_processor is none that tokenizers {tokenizers.__version__} reads: {error}"
        ) from error
    if part.get("type") == "TemplateProcessing":
        _check_template(json.loads(read.to_str())["post_processor"], path)
    return read.post_processor


def _check_template(part: dict[str, Any], path: Path) -> None:
    """Refuse a template that leaves a text out, or names a token that it does not list: the library panics at that."""
    for name, texts in (("single", {"A"}), ("pair", {"A", "B"})):
        found = {piece["Sequence"]["id"] for piece in part[name] if "Sequence" in piece}
        named = [piece["SpecialToken"]["id"] for piece in part[name] if "SpecialToken" in piece]
        if unlisted := [token for token in named if token not in part["special_tokens"]]:
            raise TokenizerError(
                f"{path}: post_processor.{name} names {unlisted[0]!r:.80}, which its special_tokens do not list"
            )
        if found != texts:
            raise TokenizerError(
                f"{path}: post_processor.{name} puts together {sorted(found)} and not {sorted(texts)}: texts would be lost"
            )


def _sides(values: dict[str, Any]) -> dict[str, str]:
    """Sides that padding and truncation of the file name; the rest of them is decided by each call."""
    found: Iterable[tuple[str, Any]] = (("padding_side", values.get("padding")), ("truncation_side", values.get("truncation")))
    return {name: str(part["direction"]).lower() for name, part in found if isinstance(part, dict) and "direction" in part}
