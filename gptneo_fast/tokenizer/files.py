"""Tokenizer files to a `tokenizers.Tokenizer`, after a look at what they are made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from ..errors import TokenizerError
from ..hub import Source
from ..jsonfile import read_object

_ALLOWED: dict[str, set[str | None]] = {  # component of tokenizer.json -> kinds that GPT-2's may have
    "model": {"BPE"},
    "pre_tokenizer": {"ByteLevel"},
    "decoder": {"ByteLevel"},
    "post_processor": {None, "ByteLevel", "TemplateProcessing"},
    "normalizer": {None},
}


def read_tokenizer(source: Source, add_prefix_space: bool = False) -> Tokenizer:
    """The tokenizer of a folder or repository, from tokenizer.json or else from vocab.json + merges.txt, with equal ids.

    Raises:
        TokenizerError: neither is there, or they are no GPT-2 tokenizer.
    """
    if path := source.file("tokenizer.json"):
        return _from_tokenizer_json(path)
    vocab, merges = source.file("vocab.json"), source.file("merges.txt")
    if vocab is None or merges is None:
        raise TokenizerError(
            f"{source.name!r} holds no tokenizer; looked for tokenizer.json, and for vocab.json with merges.txt"
        )
    return _from_vocab(vocab, merges, add_prefix_space)


def _from_tokenizer_json(path: Path) -> Tokenizer:
    parts = read_object(path, TokenizerError)
    for name, kinds in _ALLOWED.items():
        part = parts.get(name)
        kind = part.get("type") if isinstance(part, dict) else part
        if kind not in kinds:
            wanted = " or ".join(str(k) for k in kinds)
            raise TokenizerError(f"{path}: {name} is {kind!r}; GPT-2's tokenizer has {wanted}")
    try:
        return Tokenizer.from_str(json.dumps(parts))
    except Exception as error:  # the library raises bare Exception
        raise TokenizerError(f"{path} is no tokenizer that tokenizers {tokenizers.__version__} reads: {error}") from error


def _from_vocab(vocab: Path, merges: Path, add_prefix_space: bool) -> Tokenizer:
    ids = read_object(vocab, TokenizerError)
    lines = merges.read_text(encoding="utf-8").split("\n")
    pairs: list[Any] = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    if bad := next((p for p in pairs if len(p) != 2), None):
        raise TokenizerError(f"{merges}: {' '.join(bad)[:80]!r} is no pair of tokens")
    try:
        tokenizer = Tokenizer(models.BPE(vocab=ids, merges=pairs))
    except Exception as error:
        raise TokenizerError(f"{vocab} and {merges} do not go together: {error}") from error
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
