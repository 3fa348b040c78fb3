"""Job: one request to an Engine, as a future of its result and an iterator over what comes."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import NonFiniteLogitsError
from ..generation.request import Request, non_finite
from ..generation.stopping import MaxLengthCriteria, MaxTimeCriteria, StoppingCriteriaList
from ..generation.text import GrowingText

if TYPE_CHECKING:
    from .engine import Engine


_LOG = logging.getLogger("gptneo_fast")


class Job(Future[Any]):
    """The continuation of one prompt: a string of a string, a list of token ids of token ids.

    `result(timeout)` and `await job` give it whole. Iterating, with `for` or `async for`, gives pieces of text, or tokens, as
    they come; then what went wrong, if something did. `cancel()` works until the end.

    ids: of the prompt, prefix included, and of what was found so far.
    prompt: how many of them are the prompt's. shared: of those, the prefix that other requests have, too, as far as it is read
        before the newest token.
    seed: of the random numbers, None where none are drawn: on the CPU `generate(ids, seed=seed)` gives the same.
    """

    def __init__(
        self,
        engine: Engine,
        request: Request,
        ids: list[int],
        *,
        shared: int,  # tokens of the prefix
        seed: int | None,
        decode: Any,
        own: Sequence[Any],  # the user's stopping criteria
    ) -> None:
        super().__init__()
        self.request, self.seed, self.ids = request, seed, ids
        self.prompt = len(ids)
        self.shared = tuple(ids[: min(shared, len(ids) - 1)])
        self.family = object()  # of requests that share one computation of their prefix
        self._engine: Engine | None = engine  # which lives for as long as somebody waits for it
        self._decode = decode  # the model, where the result is text
        self.stopped = False  # by a criterion
        self._clocks = [c for c in request.criteria if isinstance(c, MaxTimeCriteria) and not any(c is o for o in own)]
        self._news = threading.Condition()  # of tokens and of the end; Future's own wakes those who wait for the end
        self._let_go = False  # by the thread that generates
        self._listeners: set[Callable[[], None]] = set()

    @property
    def tokens(self) -> list[int]:
        """Those found so far, the end token included."""
        return self.ids[self.prompt :]

    @property
    def finish_reason(self) -> str | None:
        """Why it ended: "stop" (an end token, a stop string or a criterion), "length", "cancelled" or "error"; None before."""
        if not self.done():
            return None
        if self.cancelled():
            return "cancelled"
        if self.exception() is not None:
            return "error"
        ends = self.request.ends
        return "stop" if self.stopped or (ends and self.ids[-1] in ends) else "length"

    def result(self, timeout: float | None = None) -> Any:
        """The continuation; waits for it.

        Raises:
            TimeoutError: not within `timeout` seconds. CancelledError: it was cancelled, or the engine closed.
            NonFiniteLogitsError, InputError: as `generate`; or what a processor, a criterion or a module raised.
            SetupError: this process was forked from the one that computes it.
        """
        self._require_another_thread()
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """What went wrong, or None; waits for the end."""
        self._require_another_thread()
        return super().exception(timeout)

    def cancel(self) -> bool:
        """End it before the next step, and wake all who wait; False where it has ended."""
        cancelled = super().cancel()
        engine = self._engine
        if cancelled and engine is not None:
            engine._work.withdraw(self)
            self._tell()
        return cancelled

    def __iter__(self) -> Iterator[Any]:
        self._require_another_thread()
        text, n = self._text(), 0
        while (new := self._next(n)) is not None:
            n += len(new)
            yield from _pieces(text, new)
            if text is not None and text.over:
                return
        yield from self._last(text)

    async def __aiter__(self) -> AsyncIterator[Any]:
        self._require_another_thread()
        loop, news = asyncio.get_running_loop(), asyncio.Event()

        def tell() -> None:
            loop.call_soon_threadsafe(news.set)

        with self._news:
            self._listeners.add(tell)
        try:
            text, n = self._text(), 0
            while True:
                news.clear()
                ended, new = self.done(), self.ids[self.prompt + n :]
                n += len(new)
                for piece in _pieces(text, new):
                    yield piece
                if text is not None and text.over:
                    return
                if ended:
                    break
                await news.wait()
            for piece in self._last(text):
                yield piece
        finally:
            with self._news:
                self._listeners.discard(tell)

    def __await__(self) -> Generator[Any, None, Any]:
        self._require_another_thread()
        return asyncio.wrap_future(self).__await__()

    # What follows is for the thread that generates.

    @cached_property
    def plain(self) -> bool:
        """Whether each token is the likeliest that may come: any, or while `least` is above 0 any but the end tokens."""
        r = self.request
        return not r.options.do_sample and (r.alone or not r.processors)

    @property
    def least(self) -> int:
        """Tokens that must come before one may end the text."""
        return self.request.least - len(self.ids)

    def take(self, tokens: list[int]) -> None:
        """Add tokens, and tell who waits for them."""
        with self._news:
            self.ids += tokens
        self._tell()

    def finish(self) -> None:
        """It is complete."""
        found = self.tokens if self._decode is None else self._decode._text(self.tokens, self.request.options)
        self._end(lambda: self.set_result(found))

    def fail(self, error: BaseException) -> None:
        """It cannot go on."""
        self._end(lambda: self.set_exception(error))

    def let_go(self) -> None:
        """It was cancelled, and nobody works on it any more."""
        self._end(lambda: self.set_exception(CancelledError()))

    def broken(self) -> NonFiniteLogitsError:
        """The error for logits that were not finite."""
        texts = None if self._decode is None else [self._decode._text(self.tokens, self.request.options)]
        return non_finite({0: len(self.ids)}, torch.tensor([self.ids]), texts)

    def begin(self) -> None:
        """Its turn has come: from now on `max_time` counts."""
        for clock in self._clocks:
            clock.begin()

    def meets(self, ids: Tensor) -> bool:
        """Whether a criterion other than the length ends a text ids [1, T]."""
        total = self.request.total
        criteria = [c for c in self.request.criteria if type(c) is not MaxLengthCriteria or c.max_length < total]
        self.stopped = bool(criteria) and bool(StoppingCriteriaList(criteria)(ids, None).any())
        return self.stopped

    def _end(self, settle: Callable[[], None]) -> None:
        self._engine = None
        try:
            if not self.done() or (self.cancelled() and not self._let_go):
                self._let_go = True
                if self.set_running_or_notify_cancel():  # not cancelled, and cannot be any more
                    settle()
        except BaseException:  # a callback's: the engine has others to answer
            _LOG.exception("a callback of a job raised")
        self.request.processors.clear()  # which may hold caches of their own
        self._tell()

    def _tell(self) -> None:
        with self._news:
            self._news.notify_all()
            listeners = list(self._listeners)
        for tell in listeners:
            try:
                tell()
            except RuntimeError:  # the loop that listened is closed
                with self._news:
                    self._listeners.discard(tell)

    def _require_another_thread(self) -> None:
        engine = self._engine
        if engine is not None and not self.done():
            engine._work.require_another_thread()

    def _next(self, n: int) -> list[int] | None:
        """Tokens after the first n, once there are any; None when there will be none."""
        with self._news:
            while len(self.ids) == self.prompt + n and not self.done():
                self._news.wait()
            return self.ids[self.prompt + n :] or None

    def _text(self) -> GrowingText | None:
        return None if self._decode is None else GrowingText(self._decode.tokenizer, self.request.options)

    def _last(self, text: GrowingText | None) -> Iterator[str]:
        """What is left once it has ended; raises what went wrong."""
        if text is not None and (piece := text.end()):
            yield piece
        self.result()


def _pieces(text: GrowingText | None, tokens: list[int]) -> list[Any]:
    if text is None:
        return list(tokens)
    piece = text.put(tokens)
    return [piece] if piece else []
