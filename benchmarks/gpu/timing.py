"""Time on a device: warm, medians, CUDA events around graph replays, more data than the caches hold.

On a CPU everything here runs too, by the wall clock, so that the code is exercised where there is no GPU.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ROTATING = 200e6  # bytes that successive calls go through, so that no cache answers
MOST_SETS = 512
MOST_BYTES = 8e9  # of memory, of all sets of arguments together


class Clock:
    """Seconds until a deadline."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds left, negative once it is over."""
        return self._end - time.monotonic()


@dataclass(frozen=True)
class Timing:
    """Seconds of one call. how: "graph" (replayed), "events" (launched one by one) or "clock" (CPU)."""

    seconds: float
    how: str


def rotating(make: Callable[[int], Sequence[Any]], moved: float, tiny: bool = False) -> list[Sequence[Any]]:
    """Independent sets of arguments, as many as it takes to exceed the caches and MOST_BYTES allow; one where `tiny`.

    Args:
        make: the arguments of a call by the number of their set; sets may share tensors.
        moved: bytes that one call reads and writes, which may be few of those that it holds.
    """
    wanted = 1 if tiny else min(MOST_SETS, max(2, math.ceil(ROTATING / max(moved, 1))))
    sets: list[Sequence[Any]] = []
    seen: set[int] = set()  # storages
    total = newest = 0
    while len(sets) < wanted and total + newest <= MOST_BYTES:  # the next one holds as much anew as the last
        sets.append(make(len(sets)))
        storages = {s._cdata: s.nbytes() for a in sets[-1] if isinstance(a, Tensor) for s in [a.untyped_storage()]}
        newest = sum(nbytes for storage, nbytes in storages.items() if storage not in seen)
        total += newest
        seen |= storages.keys()
    return sets


def per_call(calls: Sequence[Callable[[], Any]], device: torch.device, rounds: int = 9, graph: bool = True) -> Timing:
    """Median seconds of one call of `calls`, which run in turn.

    On CUDA they are captured into one graph, whose replays have no launch overhead of the host between them; calls that
    cannot be captured, or `graph=False`, are launched one by one, and `how` says so. On a CPU each is called once.
    """
    if device.type != "cuda":
        began = time.perf_counter()
        for call in calls:
            call()
        return Timing((time.perf_counter() - began) / len(calls), "clock")
    for call in calls[:3]:
        call()
    torch.cuda.synchronize(device)
    replayed = captured(calls) if graph else None
    if replayed is None:
        return Timing(_events(lambda: [call() for call in calls], rounds) / len(calls), "events")
    return Timing(_events(replayed.replay, rounds) / len(calls), "graph")


def captured(calls: Sequence[Callable[[], Any]]) -> Any:
    """The calls as one CUDA graph, or None where one of them cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for call in calls:
                call()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph


def wall(call: Callable[[], Any], device: torch.device, rounds: int = 5) -> float:
    """Median seconds from a call to the end of its work on the device: what a caller waits."""
    times = []
    for _ in range(1 if device.type != "cuda" else rounds + 1):
        began = time.perf_counter()
        call()
        _wait(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:] or times)  # the first one compiles


def _events(run: Callable[[], Any], rounds: int) -> float:
    """Median seconds of `run` between two events; two runs warm up."""
    times = []
    for i in range(rounds + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        if i >= 2:
            times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def chain(step: Callable[[], Any], count: int, device: torch.device, warmup: int = 4) -> float:
    """Seconds of one step among `count` that follow each other without waiting: the rate of a decoding loop."""
    for _ in range(warmup):
        step()
    _wait(device)
    began = time.perf_counter()
    for _ in range(count):
        step()
    _wait(device)
    return (time.perf_counter() - began) / count


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
