"""GPT2Tokenizer: GPT-2's byte-level BPE over the `tokenizers` library."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer
from torch import Tensor

from ..errors import InputError, TokenizerError
from ..hub import Source
from ..jsonfile import read_object
from .arguments import as_ids, checked_texts
from .files import read_tokenizer
from .stream import StreamDecoder, bytes_of

_END = "<|endoftext|>"
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


class BatchEncoding(dict[str, Any]):
    """What a tokenizer call gives: a dict whose entries are attributes too, and which moves to a device as one."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the encoding has no {name!r}; it has {', '.join(self)}") from None

    def to(self, device: torch.device | str) -> BatchEncoding:
        """The same encoding with its tensors on `device`."""
        return BatchEncoding({k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.items()})


class GPT2Tokenizer:
    """Text to token ids and back.

    Args:
        tokenizer: the `tokenizers.Tokenizer` that does the work.
        model_max_length: tokens that `truncation=True` cuts to.
        bos_token, eos_token, unk_token, pad_token: special tokens, each of which the vocabulary has.
        padding_side, truncation_side: "left" or "right".
    """

    model_input_names = ("input_ids", "attention_mask")

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        model_max_length: int = 2048,
        bos_token: str | None = _END,
        eos_token: str | None = _END,
        unk_token: str | None = _END,
        pad_token: str | None = None,
        padding_side: Literal["left", "right"] = "right",
        truncation_side: Literal["left", "right"] = "right",
    ) -> None:
        self.backend_tokenizer = tokenizer
        self.model_max_length = model_max_length
        self.padding_side, self.truncation_side = padding_side, truncation_side
        self._special = dict(zip(_SPECIAL, (bos_token, eos_token, unk_token, pad_token), strict=True))
        new = dict.fromkeys(t for t in self._special.values() if t is not None)  # each once, in order
        tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in new])
        self._bytes: dict[int, bytes] = {}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str] | Source, **options: Any) -> GPT2Tokenizer:
        """The tokenizer of a folder or hub id.

        Args:
            options: the keywords of this class, which win over tokenizer_config.json; and revision, token, cache_dir,
                local_files_only, subfolder.

        Raises:
            TokenizerError: neither tokenizer.json nor vocab.json + merges.txt, or one that is no GPT-2 tokenizer.
        """
        about = ("revision", "token", "cache_dir", "local_files_only", "subfolder")
        given = {k: options.pop(k) for k in about if k in options}
        source = (
            pretrained_model_name_or_path
            if isinstance(pretrained_model_name_or_path, Source)
            else Source.of(pretrained_model_name_or_path, **given)
        )
        settings: dict[str, Any] = {}
        if path := source.file("tokenizer_config.json"):
            settings = read_object(path, TokenizerError)
        names = ("model_max_length", "padding_side", "truncation_side", *_SPECIAL)
        values = {k: _text_of(settings[k]) for k in names if settings.get(k) is not None}
        values["model_max_length"] = min(int(values.get("model_max_length", 2048)), 2**31)
        tokenizer = read_tokenizer(source, bool(settings.get("add_prefix_space", False)))
        options.pop("use_fast", None)
        return cls(tokenizer, **(values | options))

    # Text to ids

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        padding: bool | Literal["longest", "max_length", "do_not_pad"] = False,
        truncation: bool = False,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: Literal["left", "right"] | None = None,
        return_tensors: Literal["pt", "np"] | None = None,
        return_attention_mask: bool = True,
        add_special_tokens: bool = True,
    ) -> BatchEncoding:
        """Token ids and attention mask of a text (lists of integers) or of several (lists of lists, or tensors [B, T]).

        Args:
            padding: True or "longest" to the longest of the batch, "max_length" to max_length.
            truncation: cut to max_length, or to model_max_length.
            pad_to_multiple_of: round the padded length up.
            return_tensors: "pt" or "np" for integer arrays [B, T]; a single text then is a batch of one.

        Raises:
            InputError: something other than text; texts of different lengths as one tensor; padding without a pad token.
        """
        single = isinstance(text, str)
        texts = checked_texts(text)
        ids = [e.ids for e in self.backend_tokenizer.encode_batch(texts, add_special_tokens=add_special_tokens)]
        if truncation:
            most = self.model_max_length if max_length is None else max_length
            ids = [row[:most] if self.truncation_side == "right" else row[-most:] if most else [] for row in ids]
        if padding not in (False, "do_not_pad"):
            return self.pad(
                ids[0] if single and return_tensors is None else ids,
                max_length if padding == "max_length" else None,
                pad_to_multiple_of=pad_to_multiple_of,
                padding_side=padding_side,
                return_tensors=return_tensors,
                return_attention_mask=return_attention_mask,
                fill=padding == "max_length",
            )
        rows: dict[str, list[list[int]]] = {"input_ids": ids}
        if return_attention_mask:
            rows["attention_mask"] = [[1] * len(row) for row in ids]
        return _encoding(rows, return_tensors, single)

    def pad(
        self,
        ids: Sequence[int] | Sequence[Sequence[int]],
        max_length: int | None = None,
        *,
        pad_to_multiple_of: int | None = None,
        padding_side: Literal["left", "right"] | None = None,
        return_tensors: Literal["pt", "np"] | None = None,
        return_attention_mask: bool = True,
        fill: bool = False,
        pad_token_id: int | None = None,
    ) -> BatchEncoding:
        """Rows of ids as a batch of one length, with their attention mask.

        Args:
            max_length: with `fill`, the length to pad to; None for model_max_length.
            pad_token_id: what to pad with; None for the tokenizer's own.
        """
        single = len(ids) > 0 and isinstance(ids[0], int)
        rows: list[list[int]] = [list(ids)] if single else [list(row) for row in ids]  # type: ignore[arg-type]
        length = max((len(row) for row in rows), default=0)
        if fill:
            length = max(length, self.model_max_length if max_length is None else max_length)
        if pad_to_multiple_of:
            length = -(-length // pad_to_multiple_of) * pad_to_multiple_of
        pad = self.pad_token_id if pad_token_id is None else pad_token_id
        if any(len(row) < length for row in rows) and pad is None:
            raise InputError("padding needs a pad token: set tokenizer.pad_token = tokenizer.eos_token")
        side = padding_side or self.padding_side
        padded: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": []}
        for row in rows:
            fillers = length - len(row)
            pads, zeros, ones = [pad or 0] * fillers, [0] * fillers, [1] * len(row)
            padded["input_ids"].append(pads + row if side == "left" else row + pads)
            padded["attention_mask"].append(zeros + ones if side == "left" else ones + zeros)
        if not return_attention_mask:
            del padded["attention_mask"]
        return _encoding(padded, return_tensors, single)

    def encode(self, text: str, **options: Any) -> Any:
        """Token ids of one text: a list, or with return_tensors an array [1, T]; options as in a call."""
        return self(text, **options)["input_ids"]

    def tokenize(self, text: str) -> list[str]:
        """Tokens of one text, in the byte alphabet of GPT-2."""
        return self.backend_tokenizer.encode(checked_texts(text)[0], add_special_tokens=False).tokens

    # Ids to text

    def decode(self, token_ids: int | Iterable[int] | Tensor, skip_special_tokens: bool = False) -> str:
        """Text of token ids [T]; bytes that form no character become U+FFFD."""
        return self.backend_tokenizer.decode(as_ids(token_ids), skip_special_tokens=skip_special_tokens)

    def batch_decode(self, sequences: Iterable[Any], skip_special_tokens: bool = False) -> list[str]:
        """Texts of rows of token ids [B, T]."""
        return [self.decode(row, skip_special_tokens) for row in sequences]

    def stream(self, skip_special_tokens: bool = True) -> StreamDecoder:
        """A decoder that takes tokens one by one."""
        return StreamDecoder(self.token_bytes, self.all_special_ids if skip_special_tokens else ())

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for; empty for an id that is not in the vocabulary."""
        if token_id not in self._bytes:
            self._bytes[token_id] = bytes_of(self.backend_tokenizer.id_to_token(token_id) or "")
        return self._bytes[token_id]

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        """Id of a token, or ids of several; unknown ones are the unk token's, or None."""
        if isinstance(tokens, str):
            found = self.backend_tokenizer.token_to_id(tokens)
            return self.unk_token_id if found is None else found
        return [self.convert_tokens_to_ids(t) for t in tokens]

    def convert_ids_to_tokens(self, ids: int | Iterable[int]) -> Any:
        """Token of an id, or tokens of several."""
        if isinstance(ids, int):
            return self.backend_tokenizer.id_to_token(ids)
        return [self.backend_tokenizer.id_to_token(i) for i in as_ids(ids)]

    # Vocabulary and special tokens

    @property
    def vocab_size(self) -> int:
        """Tokens without the added ones."""
        return self.backend_tokenizer.get_vocab_size(with_added_tokens=False)

    def __len__(self) -> int:
        return self.backend_tokenizer.get_vocab_size(with_added_tokens=True)

    def get_vocab(self) -> dict[str, int]:
        """Token -> id."""
        return self.backend_tokenizer.get_vocab(with_added_tokens=True)

    @property
    def all_special_ids(self) -> list[int]:
        """Ids of the special tokens, each once."""
        return sorted({i for t in self._special.values() if t and (i := self.backend_tokenizer.token_to_id(t)) is not None})

    def __getattr__(self, name: str) -> Any:  # eos_token, eos_token_id, ... of _SPECIAL
        special = self.__dict__.get("_special", {})
        if name in special:
            return special[name]
        if name.endswith("_id") and name[:-3] in special:
            token = special[name[:-3]]
            return None if token is None else self.backend_tokenizer.token_to_id(token)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _SPECIAL:
            if value is not None and self.backend_tokenizer.token_to_id(str(value)) is None:
                self.backend_tokenizer.add_special_tokens([AddedToken(str(value), special=True, normalized=False)])
            self._special[name] = None if value is None else str(value)
        elif name.endswith("_id") and name[:-3] in _SPECIAL:
            self._special[name[:-3]] = None if value is None else self.backend_tokenizer.id_to_token(value)
        else:
            super().__setattr__(name, value)

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write tokenizer.json and tokenizer_config.json, which gptneo_fast and transformers load."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.backend_tokenizer.save(str(folder / "tokenizer.json"))
        settings = {
            "tokenizer_class": "GPT2Tokenizer",
            "model_max_length": self.model_max_length,
            "padding_side": self.padding_side,
            "truncation_side": self.truncation_side,
            **self._special,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} tokens, {', '.join(f'{k}={v!r}' for k, v in self._special.items())})"


def _encoding(rows: dict[str, list[list[int]]], kind: str | None, single: bool) -> BatchEncoding:
    if kind is None:
        return BatchEncoding({k: v[0] if single else v for k, v in rows.items()})
    if len({len(row) for row in rows["input_ids"]}) > 1:
        raise InputError("rows of different lengths make no tensor; pass padding=True")
    if kind == "pt":
        return BatchEncoding({k: torch.tensor(v, dtype=torch.long) for k, v in rows.items()})
    if kind == "np":
        return BatchEncoding({k: np.array(v, dtype=np.int64) for k, v in rows.items()})
    raise InputError(f"return_tensors {kind!r} is unknown; use 'pt', 'np' or None")


def _text_of(value: Any) -> Any:
    """A setting of tokenizer_config.json; special tokens stand there as a string or as {"content": ...}."""
    return value.get("content") if isinstance(value, dict) else value
