"""Work: the queue of an Engine, and the loop of its thread: read a chunk of prompts, take a step, answer who is done."""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from collections import OrderedDict, deque
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import BusyError, SetupError
from ..generation.captured.capturing import current_stream, on_stream
from ..generation.request import LanguageModel
from ..network.cache import KVCache
from .job import Job
from .rows import Rows

_PREFIXES = 4  # that are kept


@dataclass(frozen=True)
class Surroundings:
    """What a thread computes under: its CUDA stream, and autocast."""

    stream: Any
    kind: str
    dtype: torch.dtype | None  # of autocast, where it is on

    @classmethod
    def now(cls, device: torch.device) -> Surroundings:
        """Those of the thread that calls."""
        kind = device.type
        return cls(current_stream(device), kind, torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None)

    def enter(self, stack: ExitStack) -> None:
        """Have them here, too, for as long as the stack is open."""
        stack.enter_context(torch.no_grad())
        stack.enter_context(on_stream(self.stream))
        if self.dtype is not None:
            stack.enter_context(torch.autocast(self.kind, self.dtype))


_all: weakref.WeakSet[Work] = weakref.WeakSet()


@atexit.register
def _end() -> None:
    """No thread computes while the interpreter is taken down."""
    for work in list(_all):
        work.close(cancel=True)


class Work:
    """What an Engine's thread does. It knows no engine, so that one that nobody holds can be collected.

    Args: see Engine.
    """

    def __init__(
        self, model: LanguageModel, most_rows: int, *, columns: int, most_waiting: int, chunk: int, surroundings: Surroundings
    ) -> None:
        self.model, self.most_rows, self.columns = model, most_rows, columns
        self.most_waiting, self.chunk, self.surroundings = most_waiting, chunk, surroundings
        self._news = threading.Condition()  # over what follows
        self._waiting: deque[Job] = deque()
        self._ending: str | None = None  # "finish" or "cancel"
        self._process = os.getpid()
        self._thread: int | None = None
        self._over = threading.Event()
        self._rows: Rows | None = None
        self._filling: _Filling | None = None
        self._prefixes: OrderedDict[tuple[int, ...], KVCache] = OrderedDict()
        _all.add(self)

    def put(self, job: Job, timeout: float | None) -> None:
        """Queue a job.

        Raises:
            BusyError: no place within so many seconds. SetupError: the engine is closed.
        """
        end = None if timeout is None else time.monotonic() + timeout
        with self._news:
            while self._ending is None and len(self._waiting) >= self.most_waiting:
                left = None if end is None else end - time.monotonic()
                if self._is_thread() or (left is not None and left <= 0):
                    raise BusyError(
                        f"{len(self._waiting)} requests wait for a row, as many as may (max_waiting); wait longer, or make an "
                        "engine of more rows"
                    )
                self._news.wait(left)
            if self._ending is not None:
                raise SetupError("this engine is closed; make another one")
            self._waiting.append(job)
            self._news.notify_all()

    def wake(self) -> None:
        """Something has changed."""
        with self._news:
            self._news.notify_all()

    def close(self, cancel: bool, wait: bool = True) -> None:
        """End the thread, and wait for that. cancel: without what is not done yet."""
        if os.getpid() != self._process:
            return  # nothing runs here
        with self._news:
            self._ending = "cancel" if cancel else self._ending or "finish"
            self._news.notify_all()
        if wait and not self._is_thread():
            self._over.wait()

    def require_this_process(self) -> None:
        """Raise in a forked child, where the thread is not.

        Raises:
            SetupError: says what to do.
        """
        if os.getpid() != self._process:
            raise SetupError(
                f"this engine works in process {self._process}, from which this one ({os.getpid()}) was forked; make an engine "
                "here, or start the process with the 'spawn' method"
            )

    def require_another_thread(self) -> None:
        """Raise where waiting would be for ever.

        Raises:
            SetupError: in a forked child, and in the engine's own thread.
        """
        self.require_this_process()
        if self._is_thread():
            raise SetupError("a callback of a job waits for another job of the same engine; wait in a thread of your own")

    def run(self) -> None:
        """Until the end. What it raises is the answer to every job."""
        self._thread = threading.get_ident()
        try:
            with ExitStack() as stack:
                self.surroundings.enter(stack)
                while self._goes_on():
                    self._turn()
        except BaseException as error:
            self._fail_all(error)
            raise
        finally:
            with self._news:
                self._ending = "cancel"
            for job in self._taken_back():
                job.cancel()
                job.let_go()
            self._rows = None
            self._prefixes.clear()
            self._over.set()

    def _goes_on(self) -> bool:
        """Wait for something to do; False once there will be nothing."""
        with self._news:
            while self._ending is None and not self._has_work():
                self._news.wait()
            return self._ending != "cancel" and self._has_work()

    def _has_work(self) -> bool:
        return bool(self._waiting) or self._filling is not None or bool(self._rows and self._rows.jobs)

    def _turn(self) -> None:
        """One chunk of prompts at most, then a step of all rows."""
        if self._rows is None:
            try:
                self._rows = Rows(self.model, self.most_rows, self.columns)
            except Exception as error:  # the cache has no room
                self._fail_all(error)
                return
        try:
            for job in [job for job in self._rows.jobs if job.cancelled()]:
                self._rows.drop(job)
                job.let_go()
            self._fill(self._rows)
            if self._rows.jobs:
                self._rows.step()
        except Exception as error:  # of the model
            jobs = list(self._rows.jobs)
            self._rows.clear()
            for job in jobs:
                job.fail(error)

    def _fill(self, rows: Rows) -> None:
        left = self.chunk
        while left > 0:
            if self._filling is None:
                job = self._next() if len(rows.jobs) < rows.most else None
                if job is None:
                    return
                self._filling = _Filling(self.model, job, self._prefixes)
            filling = self._filling
            try:
                if filling.job.cancelled():
                    self._filling = None
                    filling.job.let_go()
                    continue
                left -= filling.run(left)
                if filling.is_complete:
                    rows.join(filling.job, filling.cache)
                    self._filling = None
            except Exception as error:
                self._filling = None
                filling.job.fail(error)

    def _next(self) -> Job | None:
        with self._news:
            while self._waiting:
                job = self._waiting.popleft()
                self._news.notify_all()
                if not job.cancelled():
                    return job
                job.let_go()
        return None

    def _fail_all(self, error: BaseException) -> None:
        """The answer to all jobs."""
        for job in self._taken_back():
            job.fail(error)

    def _taken_back(self) -> list[Job]:
        """All jobs, under way and waiting, which are then nobody's."""
        jobs = [] if self._rows is None else list(self._rows.jobs)
        if self._rows is not None:
            self._rows.clear()
        if self._filling is not None:
            jobs.append(self._filling.job)
            self._filling = None
        with self._news:
            jobs += self._waiting
            self._waiting.clear()
            self._news.notify_all()
        return jobs

    def _is_thread(self) -> bool:
        return threading.get_ident() == self._thread


class _Filling:
    """A request whose prompt is being read: all but its last token, after the prefix that it shares with others."""

    def __init__(self, model: LanguageModel, job: Job, prefixes: OrderedDict[tuple[int, ...], KVCache]) -> None:
        self.model, self.job, self.prefixes = model, job, prefixes
        self.target = len(job.ids) - 1
        self.shared = tuple(job.ids[: min(job.prefix, self.target)])
        self.own = False  # whether the cache is the job's alone
        self.cache: KVCache | None = None
        if self.shared and (found := prefixes.get(self.shared)) is not None:
            prefixes.move_to_end(self.shared)
            self.cache = found

    @property
    def done(self) -> int:
        """Tokens that are read."""
        return 0 if self.cache is None else self.cache.get_seq_length()

    @property
    def is_complete(self) -> bool:
        """Whether the request can join the others."""
        return self.done == self.target

    def run(self, most: int) -> int:
        """Read up to so many tokens; how many it were."""
        begin = self.done
        goal = len(self.shared) if begin < len(self.shared) else self.target
        end = min(goal, begin + most)
        if begin == end:
            return 0
        if self.cache is None:
            self.cache = self.model.transformer.new_cache(1, goal)
        elif begin >= len(self.shared) and self.shared and not self.own:
            self.cache = self.cache.fork()
            self.cache.allocate(self.target, exact=True)
        self.own = begin >= len(self.shared)
        read(self.model, self.job.ids[begin:end], self.cache)
        if end == len(self.shared) and not self.own:
            self.prefixes[self.shared] = self.cache
            while len(self.prefixes) > _PREFIXES:
                self.prefixes.popitem(last=False)
        return end - begin


def read(model: LanguageModel, tokens: list[int], cache: KVCache) -> None:
    """Append tokens to a cache of one row."""
    ids = torch.tensor([tokens], device=model.device)
    if model.looked().forward:  # nobody asks for logits
        past = cache.get_seq_length()
        model.transformer.run(ids, torch.arange(past, past + len(tokens), device=model.device)[None], cache=cache)
        return
    model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1, return_dict=True)
