"""A step of generation as a CUDA graph, and the streams and events around its replays. On a CPU there are none of these."""

from __future__ import annotations

import functools
import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor

from ..errors import OutOfMemoryError, warn_once

_one_at_a_time = threading.Lock()
_broken: list[Any] = []  # graphs whose capture failed: torch 2.11's allocator of pinned memory goes on asking them


def current_stream(device: torch.device) -> Any:
    """The stream that this thread launches on; None on a CPU."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def on_stream(stream: Any) -> AbstractContextManager[Any]:
    """Launches go to `stream` and its device, whatever the caller does between two pieces; None for no CUDA."""
    return nullcontext() if stream is None else torch.cuda.stream(stream)


def event_of(stream: Any) -> Any:
    """What happens once all that was launched on `stream` so far has been done; None for no CUDA."""
    if stream is None:
        return None
    event = torch.cuda.Event()
    event.record(stream)
    return event


class CapturedStep:
    """A step as a CUDA graph. counters: what its kernels take tickets from, and nobody else."""

    why_launched: str | None = None

    def __init__(self, graph: Any, counters: Tensor | None) -> None:
        self.graph, self.counters, self.replay = graph, counters, graph.replay


class EagerStep:
    """In place of a captured step where there is none: the same work, launched anew each time. why_launched: the reason."""

    def __init__(self, step: Callable[[], None], why_launched: str) -> None:
        self.replay, self.why_launched = step, why_launched


Step = CapturedStep | EagerStep


def capture(step: Callable[[], None], device: torch.device) -> Step:
    """A CUDA graph of `step`, which must have no effect when called now; the eager step where it cannot be captured.

    Raises:
        OutOfMemoryError: the memory that a step takes for itself is not there.
    """
    if device.type != "cuda":
        return EagerStep(step, f"there are no graphs on the {device.type}")
    from ..kernels import tickets

    with _one_at_a_time, torch.cuda.device(device), tickets.of_capture(device) as counters:
        now, aside = torch.cuda.current_stream(device), _aside(device)
        aside.wait_stream(now)
        try:
            with torch.cuda.stream(aside):
                step()  # compiles and allocates what the first call of a kernel does
                step()
                return CapturedStep(_graph(step, device, aside), counters)
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError(
                f"{device} has too little memory left for a step of generation beside the weights and the cache; generate "
                "fewer rows or fewer tokens at a time, or free what other calls keep with model.release_memory()"
            ) from error
        except _NotCapturedError as error:
            why = str(error)
        finally:
            now.wait_stream(aside)
    warn_once(f"the decode step cannot be captured and is launched kernel by kernel: {why}")
    return EagerStep(step, why)


class _NotCapturedError(Exception):
    """A step that ran when it was launched, and cannot be captured."""


@functools.cache
def _aside(device: torch.device) -> Any:
    """The stream on which all steps of a device are captured."""
    return torch.cuda.Stream(device)


def _graph(step: Callable[[], None], device: torch.device, stream: Any) -> Any:
    """What `step` launches on `stream`, the current one, as a CUDA graph.

    Raises:
        _NotCapturedError: says what stood in the way. torch.OutOfMemoryError: no memory for the graph.
    """
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    cause: BaseException | None = None
    try:
        # thread-local: what other threads do meanwhile neither breaks this capture nor is caught by it
        with _no_collection(), torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            try:
                step()
            except BaseException as error:  # which CUDA's complaint about a broken capture would hide
                cause = error
                raise
        return graph
    except BaseException as error:
        with suppress(RuntimeError):  # "not currently recording": the capture was ended as it should be
            torch._C._cuda_endAllocateToPool(device.index, pool)  # else torch 2.11 takes it to be under way for ever
            _broken.append(graph)
        cause = cause or error
        if isinstance(cause, torch.OutOfMemoryError) or not isinstance(cause, Exception):
            raise cause from None
        raise _NotCapturedError(f"{type(cause).__name__}: {cause}") from error


@contextmanager
def _no_collection() -> Iterator[None]:
    """A garbage collection might free another graph, and CUDA break off the capture for it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
