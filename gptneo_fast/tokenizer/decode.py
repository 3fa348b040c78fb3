"""Ids to text, whole or one token at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import InputError, UnknownOptionError, nearest, short, warn_once
from .arguments import as_ids, checked_text, flag, listed
from .special import SpecialTokens
from .stream import StreamDecoder, bytes_of


class Decoding(SpecialTokens):
    """What GPT2Tokenizer does with ids."""

    clean_up_tokenization_spaces: bool

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **unknown: Any,
    ) -> Any:
        """Text of an id or of a row of ids [T]; texts of rows [B, T]. Lists, tensors and arrays.

        Bytes that form no character become U+FFFD; ids beyond the vocabulary stand for nothing.

        Args:
            skip_special_tokens: leave out the special tokens.
            clean_up_tokenization_spaces: accepted; True changes nothing, since it would corrupt byte-level text.

        Raises:
            InputError: something that is no id.
        """
        unknown.pop("use_source_tokenizer", None)
        if unknown:
            name = next(iter(unknown))
            options = ("skip_special_tokens", "clean_up_tokenization_spaces")
            raise UnknownOptionError(f"decode has no option {name!r}{nearest(name, options)}")
        skip_special_tokens = flag("skip_special_tokens", skip_special_tokens)
        if (
            clean_up_tokenization_spaces is not None and flag("clean_up_tokenization_spaces", clean_up_tokenization_spaces)
        ) or (clean_up_tokenization_spaces is None and self.clean_up_tokenization_spaces):
            warn_once("clean_up_tokenization_spaces=True is ignored: it would strip spaces that byte-level BPE keeps exactly")
        ids = as_ids(token_ids)
        if isinstance(ids, list) and any(isinstance(i, list) for i in ids):
            return [self._text(row, skip_special_tokens) for row in ids]
        return self._text([ids] if isinstance(ids, int) else ids, skip_special_tokens)

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = False, **options: Any) -> list[str]:
        """Texts of rows of ids [B, T], or the one text of a row [T] in a list; options as in `decode`."""
        if not isinstance(sequences, Mapping):
            sequences = listed("sequences", sequences)
        if len(sequences) == 0:
            return []
        text = self.decode(sequences, skip_special_tokens, **options)
        return [text] if isinstance(text, str) else text

    def _text(self, row: Any, skip_special_tokens: bool) -> str:
        if not isinstance(row, list) or not all(isinstance(i, int) for i in row):
            raise InputError("token ids are nested unevenly; give a row of ids, or rows of them")
        return self.backend_tokenizer.decode(row, skip_special_tokens=skip_special_tokens)

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """Text of tokens in the byte alphabet of GPT-2."""
        given = [tokens] if isinstance(tokens, str) else listed("tokens", tokens)
        return self.backend_tokenizer.decoder.decode([checked_text(t, f"token {i}") for i, t in enumerate(given)])

    def clean_up_tokenization(self, text: str) -> str:
        """A text without the spaces before punctuation and English contractions that tokenizers of words leave; `decode` never
        does so, for GPT-2's spaces are the text's own."""
        checked_text(text)
        for spaced in (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're"):
            text = text.replace(spaced, spaced.strip())
        return text

    @property
    def decoder(self) -> Any:
        """Of `tokenizers`: tokens to text."""
        return self.backend_tokenizer.decoder

    def stream(self, skip_special_tokens: bool = True) -> StreamDecoder:
        """A decoder that takes tokens one by one; its pieces joined are what `decode` gives for all of them."""
        special = (i for i, token in self.added_tokens_decoder.items() if token.special)
        return StreamDecoder(self.token_bytes, special if flag("skip_special_tokens", skip_special_tokens) else ())

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for; empty for an id beyond the vocabulary."""
        known = self._bytes.get(token_id) if type(token_id) is int else None
        if known is None:
            found = as_ids(token_id)
            if isinstance(found, list):
                raise InputError(f"token_id is {short(found)}; give one id")
            known = self._bytes[found] = bytes_of(self.backend_tokenizer.id_to_token(found) or "")
        return known
