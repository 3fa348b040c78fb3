"""Tokens to text one by one, over the byte alphabet of GPT-2."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable


class StreamDecoder:
    """Tokens in, text out, never half a character: bytes wait until they form one."""

    def __init__(self, token_bytes: Callable[[int], bytes], skipped: Iterable[int] = ()) -> None:
        self._token_bytes, self._skipped = token_bytes, frozenset(skipped)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def put(self, token_id: int) -> str:
        """The text that this token completes, which may be empty."""
        return "" if token_id in self._skipped else self._utf8.decode(self._token_bytes(token_id))

    def end(self) -> str:
        """What is left: U+FFFD for bytes that stayed incomplete."""
        return self._utf8.decode(b"", final=True)


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in of each byte: itself where it prints, else the next free code point from 256 on."""
    prints = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [b for b in range(256) if b not in prints]
    return {chr(b): b for b in prints} | {chr(256 + i): b for i, b in enumerate(hidden)}


ALPHABET = _byte_alphabet()


def bytes_of(token: str) -> bytes:
    """The bytes that a token of the vocabulary stands for; an added token stands for its own text."""
    if all(c in ALPHABET for c in token):
        return bytes(ALPHABET[c] for c in token)
    return token.encode()
