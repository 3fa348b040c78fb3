"""Counters by which the programs of a kernel find out which of them is the last: it finishes the job, and none ever waits.

A program stores its part, takes a ticket (an atomic addition with acquire-release order behind a barrier of its threads)
and ends; who draws the last ticket of its group sees the parts of all the others, and sets the counter back to zero.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch

_COUNTERS = 1 << 16
_of_stream: dict[tuple[int | None, int], Tensor] = {}


def tickets(groups: int, device: torch.device) -> Tensor:
    """Zeros, int32 [>= groups], which the kernels of this stream hand on from one to the next and leave at zero.

    Kernels that may run at one time need counters of their own: there is one set for each device and stream. A CUDA graph
    keeps the set of the stream that it was captured on, so graphs that shall be replayed side by side want different
    capture streams. A capture that finds none records zeros of its own.
    """
    stream = 0 if launch.INTERPRETED else triton.runtime.driver.active.get_current_stream(device.index or 0)
    key = (device.index, stream)
    if groups <= _COUNTERS and key in _of_stream:
        return _of_stream[key]
    if groups > _COUNTERS or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return torch.zeros(groups, dtype=torch.int32, device=device)
    return _of_stream.setdefault(key, torch.zeros(_COUNTERS, dtype=torch.int32, device=device))


@triton.jit
def arrives_last(ticket_ptr, programs):
    """Whether this is the last of `programs` programs to come here; what the others stored before is visible to it."""
    tl.debug_barrier()  # all threads of the program have stored
    last = tl.atomic_add(ticket_ptr, 1, sem="acq_rel", scope="gpu") == programs - 1
    tl.debug_barrier()
    if last:
        tl.store(ticket_ptr, 0)
    return last
