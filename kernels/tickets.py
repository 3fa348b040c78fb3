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

_COUNTERS = 1 << 14
_of_stream: dict[tuple[int | None, int], Tensor] = {}  # (device, stream) -> counters of what is launched there
_of_capture: dict[tuple[int | None, int], Tensor] = {}  # -> those of the graph that was captured there last
_of_graphs: list[Tensor] = []  # those of graphs that were captured before; graphs know addresses only


def tickets(groups: int, device: torch.device) -> Tensor:
    """Zeros, int32 [>= groups], which the kernels of this stream hand on from one to the next and leave at zero.

    Kernels that may run at one time need counters of their own: there is one set for each device and stream, and a CUDA
    graph keeps for itself the set that the calls before its capture warmed up with. A capture without such calls records
    the making of one.
    """
    stream = 0 if launch.INTERPRETED else triton.runtime.driver.active.get_current_stream(device.index or 0)
    key = (device.index, stream)
    if groups > _COUNTERS:
        return torch.zeros(groups, dtype=torch.int32, device=device)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        if key not in _of_capture:
            _of_capture[key] = _of_stream.pop(key) if key in _of_stream else _zeros(device)
        return _of_capture[key]
    if key in _of_capture:
        _of_graphs.append(_of_capture.pop(key))
    if key not in _of_stream:
        _of_stream[key] = _zeros(device)
    return _of_stream[key]


def _zeros(device: torch.device) -> Tensor:
    return torch.zeros(_COUNTERS, dtype=torch.int32, device=device)


@triton.jit
def arrives_last(ticket_ptr, programs):
    """Whether this is the last of `programs` programs to come here; what the others stored before is visible to it."""
    tl.debug_barrier()  # all threads of the program have stored
    last = tl.atomic_add(ticket_ptr, 1, sem="acq_rel", scope="gpu") == programs - 1
    tl.debug_barrier()
    if last:
        tl.store(ticket_ptr, 0)
    return last
