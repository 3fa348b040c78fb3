"""Work: the queue of an Engine, and the loop of its thread: read a chunk of prompts, take a step, answer who is done."""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import BusyError, SetupError
from ..generation.captured.capturing import current_stream, on_stream
from ..generation.captured.pool import weights_of
from ..generation.request import LanguageModel
from ..network import touch
from ..network.cache import KVCache
from .job import Job
from .reading import Reading, together
from .rows import Rows


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

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Have them here, too."""
        cast = nullcontext() if self.dtype is None else torch.autocast(self.kind, self.dtype)
        with torch.no_grad(), on_stream(self.stream), cast:
            yield


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
        self._reading: Reading | None = None
        self._named: dict[tuple[int, ...], Job] = {}  # the last request with that prefix
        self._prefixes: OrderedDict[object, KVCache] = OrderedDict()  # by their requests' family
        self._state: object = None  # of the model that the prefixes are of
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
            if job.shared:
                before = self._named.get(job.shared)
                if before is not None and not before.done():  # else the model may be another one now
                    job.family = before.family
                self._named[job.shared] = job
            self._waiting.append(job)
            self._news.notify_all()

    def withdraw(self, job: Job) -> None:
        """A job was cancelled: its place in the queue is free."""
        if os.getpid() != self._process:
            return
        with self._news:
            waits = job in self._waiting
            if waits:
                self._waiting.remove(job)
            self._news.notify_all()
        if waits:
            job.let_go()

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
            while self._goes_on():
                with self.surroundings.entered():  # anew each time: autocast keeps copies of weights for as long as it is on
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
        return bool(self._waiting) or self._reading is not None or bool(self._rows and self._rows.jobs)

    def _turn(self) -> None:
        """One chunk of prompts at most, then a step of all rows."""
        try:
            if self._rows is None:
                self._rows = Rows(self.model, self.most_rows, self.columns)
            self.model.looked(anew=True)  # a layer's `forward` may be set without a sign
        except Exception as error:  # the cache has no room, or the configuration was changed
            self._fail_all(error)
            return
        try:
            self._forget()
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
            if not jobs:
                self._fail_all(error)

    def _forget(self) -> None:
        """Let prefixes go that no request names any more, or that the model has changed since."""
        if not self._named:
            return
        with self._news:
            self._named = {shared: job for shared, job in self._named.items() if not job.done()}
            jobs = [*self._waiting, *(self._rows.jobs if self._rows else ()), *(self._reading.jobs if self._reading else ())]
        named, state = {job.family for job in jobs}, _state_of(self.model)
        if state != self._state:
            named.clear()
            if self._reading is not None:
                self._reading.lasts = False
        for key in [key for key in self._prefixes if key not in named]:
            del self._prefixes[key]
        self._state = state

    def _fill(self, rows: Rows) -> None:
        """Read up to a chunk of prompts; those that are complete join the rows."""
        left = self.chunk
        while left > 0:
            if self._reading is None:
                jobs = self._next(rows.most - len(rows.jobs), left) if rows.fit() else []
                if not jobs:
                    return
                for job in jobs:
                    job.begin()
                if not self._prefixes:
                    self._state = _state_of(self.model)
                self._reading = Reading(self.model, jobs, self._prefixes)
            reading = self._reading
            if all(job.cancelled() for job in reading.jobs):
                self._reading = None
                for job in reading.jobs:
                    job.let_go()
                continue
            try:
                left -= reading.run(left)
            except Exception as error:
                self._reading = None
                for job in reading.jobs:
                    job.fail(error)
                continue
            if reading.is_complete:
                self._reading = None
                for row, job in enumerate(reading.jobs):
                    try:
                        rows.join(job, reading.cache, row)
                    except Exception as error:  # the cache cannot grow
                        job.fail(error)

    def _next(self, most: int, tokens: int) -> list[Job]:
        """The next request, and those behind it that can be read with it, up to so many rows and tokens."""
        found: list[Job] = []
        with self._news:
            while self._waiting and len(found) < most:
                job = self._waiting[0]
                if not job.cancelled() and found and not together([*found, job], tokens):
                    break
                self._waiting.popleft()
                self._news.notify_all()
                if job.cancelled():
                    job.let_go()
                else:
                    found.append(job)
        return found

    def _fail_all(self, error: BaseException) -> None:
        """The answer to all jobs."""
        for job in self._taken_back():
            job.fail(error)

    def _taken_back(self) -> list[Job]:
        """All jobs, under way and waiting, which are then nobody's."""
        jobs = [] if self._rows is None else list(self._rows.jobs)
        if self._rows is not None:
            self._rows.clear()
        if self._reading is not None:
            jobs += self._reading.jobs
            self._reading = None
        with self._news:
            jobs += self._waiting
            self._waiting.clear()
            self._news.notify_all()
        return jobs

    def _is_thread(self) -> bool:
        return threading.get_ident() == self._thread


def _state_of(model: LanguageModel) -> object:
    """What is another one after a hook, a replaced layer or changed weights; not after a change through `.data`."""
    held = (*model.parameters(), *model.buffers())  # weights in few bits are buffers
    return touch.stamp(), weights_of(model), [None if t.is_inference() else t._version for t in held]
