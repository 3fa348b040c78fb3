"""The vocabulary and the tokens that were added to it, special ones above all."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, processors
from torch import Tensor

from ..config import is_int
from ..errors import InputError, nearest, short, warn_once
from .arguments import as_ids, checked_setting, checked_text, checked_tokens, flag, listed, mapping

NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class SpecialTokens:
    """What GPT2Tokenizer knows of tokens.

    `bos_token`, `eos_token`, `unk_token`, `sep_token`, `pad_token`, `cls_token` and `mask_token` are strings or None and
    can be set, as `bos_token_id` and so on can; `extra_special_tokens` (and `_ids`) are the special tokens without a name.
    """

    backend_tokenizer: Tokenizer
    model_max_length: int
    _lock: threading.Lock
    _special: dict[str, str | AddedToken | None]
    _extra: list[str | AddedToken]
    _bytes: dict[int, bytes]
    _around: tuple[bool, bool]  # whether bos is put before, eos behind a text

    def __getattr__(self, name: str) -> Any:
        special, bare = self.__dict__.get("_special", {}), name.removesuffix("s").removesuffix("_id")
        if name in special:
            return None if special[name] is None else str(special[name])
        if bare in special and name == f"{bare}_id":
            return None if special[bare] is None else self.convert_tokens_to_ids(str(special[bare]))
        if name == "extra_special_tokens":
            return [str(t) for t in self._extra]
        if name == "extra_special_tokens_ids":
            return self.convert_tokens_to_ids([str(t) for t in self._extra])
        near = nearest(name, [*special, *(f"{n}_id" for n in special), *dir(type(self))])
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}{near}")

    def __setattr__(self, name: str, value: Any) -> None:
        special, bare = self.__dict__.get("_special", {}), name.removesuffix("_id")
        if bare in special and name != bare and value is not None:
            value = self._token_of(name, value)
        if bare in special:
            self._set_special(bare, value)
        elif name == "extra_special_tokens":
            self._extra = extra_tokens(value)
        elif name == "extra_special_tokens_ids":
            self._extra = extra_tokens([self._token_of(name, i) for i in listed(name, value)])
        else:
            super().__setattr__(name, checked_setting(name, value))

    def _token_of(self, name: str, value: Any) -> str:
        value = value.tolist() if isinstance(value, (Tensor, np.generic)) else value
        token = self.convert_ids_to_tokens(value) if is_int(value) else None
        if token is None:
            raise InputError(f"{name} is {short(value)}; give an id of the vocabulary, 0 to {len(self) - 1}, or None")
        return str(token)

    def _set_special(self, name: str, value: Any) -> None:
        if value is not None:
            text = checked_text(value.content if isinstance(value, AddedToken) else value, name)
            if self.backend_tokenizer.token_to_id(text) is None:
                warn_once(
                    f"{name} {text!r} is not in the vocabulary and gets the unk token's id; "
                    f"to add it: tokenizer.add_special_tokens({{{name!r}: {text!r}}})"
                )
        self._special[name] = value

    def __len__(self) -> int:
        return self.backend_tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def vocab_size(self) -> int:
        """Tokens without the added ones; `len(tokenizer)` counts all."""
        return self.backend_tokenizer.get_vocab_size(with_added_tokens=False)

    def get_vocab(self) -> dict[str, int]:
        """Token -> id, added ones as well."""
        return self.backend_tokenizer.get_vocab(with_added_tokens=True)

    def longest_token(self) -> int | None:
        """The most characters of a text that one token stands for; None where an added one takes any number of spaces."""
        if any(token.lstrip or token.rstrip for token in self.added_tokens_decoder.values()):
            return None
        return max(map(len, self.get_vocab()))

    @property
    def vocab(self) -> dict[str, int]:
        """Token -> id, added ones as well."""
        return self.get_vocab()

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        """Id -> token of the added ones."""
        return self.backend_tokenizer.get_added_tokens_decoder()

    @property
    def added_tokens_encoder(self) -> dict[str, int]:
        """Token -> id of the added ones, by id."""
        return {token.content: i for i, token in sorted(self.added_tokens_decoder.items())}

    def get_added_vocab(self) -> dict[str, int]:
        """Token -> id of the added ones, by id."""
        return self.added_tokens_encoder

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """Name -> token of the named special tokens that are set."""
        return {name: str(token) for name, token in self._special.items() if token is not None}

    @property
    def all_special_tokens(self) -> list[str]:
        """The special tokens, each once."""
        return list(dict.fromkeys([*self.special_tokens_map.values(), *map(str, self._extra)]))

    @property
    def all_special_ids(self) -> list[int]:
        """Ids of `all_special_tokens`."""
        ids: list[int] = self.convert_tokens_to_ids(self.all_special_tokens)
        return ids

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        """Id of a token, or ids of several; an unknown one gets the unk token's, or None where there is no unk token."""
        if not isinstance(tokens, str):
            return [self.convert_tokens_to_ids(t) for t in listed("tokens", tokens)]
        found = self.backend_tokenizer.token_to_id(checked_text(tokens, "token"))
        unk = self._special.get("unk_token")
        return self.backend_tokenizer.token_to_id(str(unk)) if found is None and unk is not None else found

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """Token of an id, or tokens of several (list, tensor or array [T]); None for an id beyond the vocabulary."""
        ids = as_ids(ids)
        if isinstance(ids, int):
            return self.backend_tokenizer.id_to_token(ids)
        skipped = set(self.all_special_ids) if flag("skip_special_tokens", skip_special_tokens) else set()
        if any(isinstance(i, list) for i in ids):
            raise InputError(f"ids is {short(ids)}; give an id or one row of them")
        return [self.backend_tokenizer.id_to_token(i) for i in ids if i not in skipped]

    def add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
        """Put tokens at the end of the vocabulary, unless it has them; then `model.resize_token_embeddings(len(tokenizer))`.

        Args:
            new_tokens: a string, an AddedToken or a list of them.
            special_tokens: whether decoding with skip_special_tokens leaves them out.

        Returns:
            How many were new.
        """
        tokens = checked_tokens([] if new_tokens is None else new_tokens)
        if not tokens:
            return 0
        with self._lock:
            self._bytes.clear()
            add = (
                self.backend_tokenizer.add_special_tokens
                if flag("special_tokens", special_tokens)
                else self.backend_tokenizer.add_tokens
            )
            return add(tokens)

    def add_special_tokens(self, special_tokens_dict: dict[str, Any], replace_extra_special_tokens: bool = True) -> int:
        """Name special tokens, and add those that the vocabulary lacks, as `add_tokens` does.

        Args:
            special_tokens_dict: name ("pad_token", ...) -> string or AddedToken; "extra_special_tokens" (or
                "additional_special_tokens") -> a list of them.
            replace_extra_special_tokens: whether the new extra ones stand instead of or behind the old ones.

        Returns:
            How many were new.
        """
        given = dict(mapping("special_tokens_dict", special_tokens_dict))
        replace_extra_special_tokens = flag("replace_extra_special_tokens", replace_extra_special_tokens)
        if "additional_special_tokens" in given:
            given.setdefault("extra_special_tokens", given.pop("additional_special_tokens"))
        known = [*self._special, "extra_special_tokens"]
        for name, value in given.items():
            if name not in known:
                raise InputError(f"{name!r} is no special token{nearest(name, known)}; use one of {', '.join(known)}")
            if name == "extra_special_tokens" and isinstance(value, (str, AddedToken)):
                raise InputError(f"{name} is {short(value)}; give a list of tokens")
            if name != "extra_special_tokens" and not isinstance(value, (str, AddedToken)):
                raise InputError(f"{name} is {short(value)}; give a string or an AddedToken")
            checked_tokens(value, name)
        extra = [_special(t) for t in given.pop("extra_special_tokens", [])]
        if not replace_extra_special_tokens:
            extra = [t for t in extra if t.content not in self.extra_special_tokens]
        named = {name: _special(value) for name, value in given.items()}
        count = self.add_tokens([*named.values(), *extra], special_tokens=True)
        self._special.update(named)
        if extra:
            self._extra = [*extra] if replace_extra_special_tokens else [*self._extra, *extra]
        return count

    def get_special_tokens_mask(
        self, token_ids_0: Any, token_ids_1: Any = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        """1 for each special token of a row of ids, 0 for the others.

        Raises:
            InputError: anything but one row that already has its special tokens.
        """
        if not flag("already_has_special_tokens", already_has_special_tokens) or token_ids_1 is not None:
            raise InputError(
                "give one row of ids with already_has_special_tokens=True, or call with return_special_tokens_mask"
            )
        special = set(self.all_special_ids)
        ids = as_ids(token_ids_0)
        if not isinstance(ids, list) or any(isinstance(i, list) for i in ids):
            raise InputError(f"token_ids_0 is {short(ids)}; give one row of ids")
        return [int(i in special) for i in ids]

    # bos before and eos behind every text, off unless asked for

    @property
    def add_bos_token(self) -> bool:
        """Whether a call puts bos_token before a text."""
        return self._around[0]

    @add_bos_token.setter
    def add_bos_token(self, value: bool) -> None:
        self._set_around(flag("add_bos_token", value), self._around[1])

    @property
    def add_eos_token(self) -> bool:
        """Whether a call puts eos_token behind a text."""
        return self._around[1]

    @add_eos_token.setter
    def add_eos_token(self, value: bool) -> None:
        self._set_around(self._around[0], flag("add_eos_token", value))

    def _set_around(self, bos: bool, eos: bool) -> None:
        bos, eos = bos and self.bos_token is not None, eos and self.eos_token is not None
        before = [self.bos_token] if bos else []
        behind = [self.eos_token] if eos else []
        first = [*(f"{t}:0" for t in before), "$A:0", *(f"{t}:0" for t in behind)]
        second = [*(f"{t}:1" for t in before), "$B:1", *(f"{t}:1" for t in behind)]
        with self._lock:
            self.backend_tokenizer.post_processor = processors.TemplateProcessing(
                single=first,
                pair=[*first, *second],
                special_tokens=[(t, self.backend_tokenizer.token_to_id(t)) for t in dict.fromkeys([*before, *behind])],
            )
        self._around = bos, eos

    def update_post_processor(self) -> None:
        """Put the tokens around texts that bos_token and eos_token are now."""
        self._set_around(*self._around)

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """Special tokens that a call puts around a text or a pair."""
        return self.backend_tokenizer.num_special_tokens_to_add(flag("pair", pair))

    @property
    def max_len_single_sentence(self) -> int:
        """Tokens of a text that fit model_max_length."""
        return self.model_max_length - self.num_special_tokens_to_add()

    @property
    def max_len_sentences_pair(self) -> int:
        """Tokens of a pair that fit model_max_length."""
        return self.model_max_length - self.num_special_tokens_to_add(pair=True)


def extra_tokens(tokens: Any) -> list[str | AddedToken]:
    """Special tokens without a name, as a list.

    Raises:
        InputError: something else than a list of tokens.
    """
    if tokens is not None and not isinstance(tokens, (list, tuple)):
        raise InputError(f"extra_special_tokens is {short(tokens)}; give a list of strings and AddedTokens")
    return checked_tokens(tokens or [], "extra_special_tokens")


def _special(token: str | AddedToken) -> AddedToken:
    return AddedToken(token, special=True, normalized=False) if isinstance(token, str) else token
