"""Counters by which the programs of a kernel find out which of them is the last: it finishes the job, and none ever waits.

A program stores its part, takes a ticket (an atomic addition with acquire-release order behind a barrier of its threads)
and ends; who draws the last ticket of its group sees the parts of all the others, and sets the counter back to zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Lock

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch

_COUNTERS = 1 << 14
of_stream: dict[tuple[int | None, int], Tensor] = {}  # (device, stream) -> counters of what is launched there
_making = Lock()
of_this_capture: ContextVar[Tensor | None] = ContextVar("of_capture", default=None)


@contextmanager
def of_capture(device: torch.device) -> Iterator[Tensor]:
    """Within it all launches of this thread on `device` take the counters that it yields; enter it before a capture begins.

    A captured graph knows their address only: whoever keeps the graph must keep them, and nobody else may use them.
    """
    counters = zeros(_COUNTERS, device)
    token = of_this_capture.set(counters)
    try:
        yield counters
    finally:
        of_this_capture.reset(token)


def tickets(groups: int, device: torch.device) -> Tensor:
    """Zeros, int32 [>= groups], which the kernels of a stream hand on from one to the next and leave at zero.

    Kernels that may run at one time need counters of their own, so ask at every launch. A graph that was captured within
    `of_capture` has a set for itself, and so has each device and stream that is launched on directly. In a capture that
    somebody else made, every launch gets zeros that each replay makes anew.
    """
    given = of_this_capture.get()
    if given is not None and groups <= _COUNTERS and given.device == device:
        return given
    if groups > _COUNTERS or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return zeros(groups, device)
    stream = 0 if launch.INTERPRETED else triton.runtime.driver.active.get_current_stream(device.index or 0)
    key = (device.index, stream)
    if key not in of_stream:
        with _making:
            if key not in of_stream:
                of_stream[key] = zeros(_COUNTERS, device)
    return of_stream[key]


def zeros(counters: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # they outlive the call
        return torch.zeros(counters, dtype=torch.int32, device=device)


@triton.jit
def arrives_last(ticket_ptr, programs):
    """Whether this is the last of `programs` programs to come here; what the others stored before is visible to it."""
    tl.debug_barrier()  # all threads of the program have stored
    last = tl.atomic_add(ticket_ptr, 1, sem="acq_rel", scope="gpu") == programs - 1
    tl.debug_barrier()
    if last:
        tl.store(ticket_ptr, 0)
    return last
