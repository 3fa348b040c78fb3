"""Streamers: tokens of one `generate` call to text, printed or handed to another thread."""

from __future__ import annotations

import asyncio
import queue
import unicodedata
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from typing import Any

from torch import Tensor

from ..errors import InputError


class BaseStreamer:
    """What `generate(streamer=...)` calls; any object with these two will do."""

    def put(self, value: Tensor) -> None:
        """Take token ids: first the prompt [1, T], then [1] or [1, n] as they are chosen."""
        raise NotImplementedError

    def end(self) -> None:
        """Hear that the text has ended."""
        raise NotImplementedError


class TextStreamer(BaseStreamer):
    """Prints text as it comes, by the rule of transformers 5.24.

    Args:
        tokenizer: whose `decode` gives the text.
        skip_prompt: leave the prompt out.
        decode_kwargs: of `decode`, such as skip_special_tokens=True.
    """

    def __init__(self, tokenizer: Any, skip_prompt: bool = False, **decode_kwargs: Any) -> None:
        self.tokenizer, self.skip_prompt, self.decode_kwargs = tokenizer, skip_prompt, decode_kwargs
        self._ids: list[int] = []
        self._given = 0  # characters of their text that were given out
        self._at_prompt = True

    def put(self, value: Tensor) -> None:
        """Take token ids [T] or [1, T].

        Raises:
            InputError: more than one row.
        """
        if value.dim() > 1 and value.shape[0] > 1:
            raise InputError(f"a text streamer takes one row, not {value.shape[0]}; generate the prompts one by one")
        at_prompt, self._at_prompt = self._at_prompt, False
        if at_prompt and self.skip_prompt:
            return
        self._ids.extend(value.flatten().tolist())
        text = self.tokenizer.decode(self._ids, **self.decode_kwargs)
        if text.endswith("\n"):  # the last token stays, so that a space that the next one begins with does, too
            piece, self._ids = text[self._given :], self._ids[-1:]
            self._given = len(self.tokenizer.decode(self._ids, **self.decode_kwargs))
        else:  # letters, digits and spaces at once; signs, which may be half a character, with the next space
            whole = text and (_is_cjk(text[-1]) or all(map(_is_plain, text[self._given :])))
            piece = text[self._given : len(text) if whole else text.rfind(" ") + 1]
            self._given += len(piece)
        self.on_finalized_text(piece)

    def end(self) -> None:
        """Give out what is left."""
        text = self.tokenizer.decode(self._ids, **self.decode_kwargs)[self._given :] if self._ids else ""
        self._ids, self._given, self._at_prompt = [], 0, True
        self.on_finalized_text(text, stream_end=True)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Do something with a piece of text; this class prints it."""
        print(text, flush=True, end="\n" if stream_end else "")


class TextIteratorStreamer(TextStreamer):
    """Text pieces to iterate over while `generate` runs in another thread; its error is raised in the loop.

    Args:
        timeout: seconds to wait for a piece before queue.Empty is raised; None for ever.
    """

    def __init__(self, tokenizer: Any, skip_prompt: bool = False, timeout: float | None = None, **decode_kwargs: Any) -> None:
        super().__init__(tokenizer, skip_prompt, **decode_kwargs)
        self.timeout = timeout
        self.text_queue: queue.Queue[str | BaseException | None] = queue.Queue()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Put a piece into the queue."""
        self.text_queue.put(text, timeout=self.timeout)
        if stream_end:
            self.text_queue.put(None, timeout=self.timeout)

    def fail(self, error: BaseException) -> None:
        """Raise `error` in the thread that iterates."""
        self.text_queue.put(error)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        piece = self.text_queue.get(timeout=self.timeout)
        if piece is None:
            raise StopIteration
        if isinstance(piece, BaseException):
            raise piece
        return piece


class AsyncTextIteratorStreamer(TextStreamer):
    """Text pieces for `async for` while `generate` runs in another thread; its error is raised in the loop. Made where the
    event loop runs.

    Args:
        timeout: seconds to wait for a piece before TimeoutError is raised; None for ever.
    """

    def __init__(self, tokenizer: Any, skip_prompt: bool = False, timeout: float | None = None, **decode_kwargs: Any) -> None:
        super().__init__(tokenizer, skip_prompt, **decode_kwargs)
        self.timeout = timeout
        self.text_queue: asyncio.Queue[str | BaseException | None] = asyncio.Queue()
        self.loop = asyncio.get_running_loop()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Put a piece into the queue."""
        self.loop.call_soon_threadsafe(self.text_queue.put_nowait, text)
        if stream_end:
            self.loop.call_soon_threadsafe(self.text_queue.put_nowait, None)

    def fail(self, error: BaseException) -> None:
        """Raise `error` in the loop that iterates, while there is one."""
        with suppress(RuntimeError):  # it was closed: `generate` ends with the error itself
            self.loop.call_soon_threadsafe(self.text_queue.put_nowait, error)

    def __aiter__(self) -> AsyncIterator[str]:
        return self

    async def __anext__(self) -> str:
        async with asyncio.timeout(self.timeout):
            piece = await self.text_queue.get()
        if piece is None:
            raise StopAsyncIteration
        if isinstance(piece, BaseException):
            raise piece
        return piece


_CJK = ((0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F))


def _is_plain(character: str) -> bool:
    return character.isspace() or unicodedata.category(character)[0] in "LMN"


def _is_cjk(character: str) -> bool:
    return any(first <= ord(character) <= last for first, last in _CJK)
