"""Tensors from a weight file into memory: block by block, the dtype converted and every value looked at on the way.

No more than a block a worker is held besides the targets. A block stays in the processor's cache from the read over the
check to the conversion, so that each byte of the file crosses memory once.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from .weight_file import Stored

BLOCK = 1 << 18  # elements; of float32 a megabyte, which the second-level cache holds
STAGE = 16 << 20  # bytes of each of the two pinned buffers
WORKERS = 4  # threads at most; reading from memory is bound by it sooner
_STARTING = threading.Lock()


class Copier:
    """Fills CPU tensors.

    Args:
        check_finite: refuse NaN, infinities and what the target's dtype cannot hold.
    """

    def __init__(self, check_finite: bool = True) -> None:
        self.check_finite = check_finite

    def fill_all(self, pairs: Iterable[tuple[Stored, Tensor]]) -> None:
        """Read tensors into targets: contiguous, of their shapes, any floating-point dtype.

        Raises:
            CheckpointError: a value that is not finite or too large, or a file is no longer whole.
        """
        with _workers() as pool:
            jobs = [pool.submit(self.fill, stored, target) for stored, target in pairs]
            try:
                for job in jobs:
                    job.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def fill(self, stored: Stored, target: Tensor) -> None:
        """Read one tensor into `target`."""
        with torch.inference_mode(target.is_inference()):  # a mode holds for one thread only
            if stored.strides is not None:
                self._fill_strided(stored, target)
                return
            direct = stored.dtype == target.dtype
            own = None if direct else torch.empty(BLOCK, dtype=stored.dtype, device="cpu")
            for first, part in _parts(target, BLOCK):
                block = part if own is None else own[: part.numel()]
                stored.read_into(_bytes(block), first * stored.dtype.itemsize)
                if self.check_finite:
                    _check(stored, first, block, target.dtype)
                if own is not None:
                    part.copy_(block)

    def equal(self, stored: Stored, target: Tensor) -> bool:
        """Whether a tensor, in the dtype of `target`, has its values. target: contiguous, on any device."""
        if tuple(target.shape) != stored.shape or stored.strides is not None:
            return tuple(target.shape) == stored.shape and torch.equal(_strided(stored).to(target), target)
        count = BLOCK if target.device.type == "cpu" else STAGE // stored.dtype.itemsize
        own = torch.empty(count, dtype=stored.dtype, device="cpu")
        for first, part in _parts(target, count):
            block = own[: part.numel()]
            stored.read_into(_bytes(block), first * stored.dtype.itemsize)
            if not torch.equal(block.to(part), part):
                return False
        return True

    def _fill_strided(self, stored: Stored, target: Tensor) -> None:
        whole = _strided(stored)
        if self.check_finite:
            _check(stored, 0, whole, target.dtype)
        target.copy_(whole)


class CudaCopier(Copier):
    """Fills CUDA tensors through two pinned buffers: one is read into while the other is on its way to the device.

    The conversion and the check run on the device.
    """

    def __init__(self, device: torch.device, check_finite: bool = True) -> None:
        super().__init__(check_finite)
        self.device = device
        self._stages = [torch.empty(STAGE, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._left = [torch.cuda.Event() for _ in range(2)]  # recorded once a buffer's bytes are on the device
        self._turn = 0
        self._stream = torch.cuda.Stream(device)
        self._bounds: list[tuple[Stored, torch.dtype, Tensor]] = []

    def fill_all(self, pairs: Iterable[tuple[Stored, Tensor]]) -> None:
        """As `Copier.fill_all`; what the check found is asked for once, at the end."""
        now = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(now)  # memory of the targets may still be in use there
        try:
            for stored, target in pairs:
                self.fill(stored, target)
        finally:
            self._stream.synchronize()  # where reading fails, the targets' memory goes back to others
        now.wait_stream(self._stream)
        for stored, dtype, bounds in self._bounds:
            if not bounds.to(dtype).isfinite().all():
                raise not_finite(stored, None, bounds, dtype)

    def fill(self, stored: Stored, target: Tensor) -> None:
        """Read one tensor into `target`; its values are there once the stream has run."""
        if stored.strides is not None:
            self._fill_strided(stored, target)
            return
        for first, part in _parts(target, STAGE // stored.dtype.itemsize):
            stage, left = self._stages[self._turn], self._left[self._turn]
            self._turn = 1 - self._turn
            block = stage[: part.numel() * stored.dtype.itemsize].view(stored.dtype)
            left.synchronize()  # does not wait where it was never recorded
            stored.read_into(_bytes(block), first * stored.dtype.itemsize)
            with torch.cuda.stream(self._stream):
                there = block.to(self.device, non_blocking=True)
                left.record(self._stream)
                if self.check_finite and target.is_floating_point():
                    self._bounds.append((stored, target.dtype, torch.stack(torch.aminmax(there))))
                part.copy_(there)


@contextmanager
def _workers() -> Iterator[ThreadPoolExecutor]:
    """Threads in each of which torch has one: teams of torch's would wait for each other where processors are few.

    A thread's own number becomes that of all threads which begin later, so it is put back before another load asks for it.
    """
    with _STARTING:
        threads = torch.get_num_threads()
        count = max(1, min(WORKERS, threads))
        begun = threading.Barrier(count + 1)

        def begin() -> None:
            torch.set_num_threads(1)
            begun.wait()

        pool = ThreadPoolExecutor(count)
        try:
            for _ in range(count):  # none is idle before all have begun, so each begins in a thread of its own
                pool.submit(begin)
            begun.wait()
        finally:
            begun.abort()  # where the system gives no more threads, those that wait go on
            torch.set_num_threads(threads)
    with pool:
        yield pool


def copier_for(device: torch.device, check_finite: bool = True) -> Copier:
    """What fills tensors on a device."""
    return CudaCopier(device, check_finite) if device.type == "cuda" else Copier(check_finite)


def not_finite(stored: Stored, first: int | None, values: Tensor, dtype: torch.dtype) -> CheckpointError:
    """The error for a tensor with a value that is not finite, or not once it is in `dtype`.

    Args:
        first: place of the first of `values` in the tensor, None where they are its bounds.
    """
    flat = values.reshape(-1)
    at = int((~flat.to(dtype).isfinite()).nonzero()[0])
    value = float(flat[at])
    where = "" if first is None else f" at element {first + at} of {stored.numel}"
    if flat[at].isfinite():
        name = str(dtype).removeprefix("torch.")
        what = f"holds {value}{where}, beyond {name}'s {torch.finfo(dtype).max}; load with dtype='bfloat16' or 'float32'"
    else:
        what = f"holds {value}{where}: damaged weights, or a training that diverged; check_finite=False loads them all the same"
    return CheckpointError(f"{stored.file.path}: tensor {stored.name[:200]!r} {what}")


def _check(stored: Stored, first: int, block: Tensor, dtype: torch.dtype) -> None:
    """Refuse a block in which a value is not finite, or would not be in `dtype`."""
    if not block.numel() or not dtype.is_floating_point:
        return
    low, high = torch.aminmax(block)
    most = torch.finfo(dtype).max
    if -most <= low.item() and high.item() <= most:  # not so for NaN
        return
    if not block.to(dtype).isfinite().all():  # a little more than `most` rounds to it
        raise not_finite(stored, first, block, dtype)


def _parts(target: Tensor, count: int) -> Iterable[tuple[int, Tensor]]:
    """`target` in flat pieces of `count` elements, each with the place of its first."""
    flat = target.view(-1)
    return ((first, flat[first : first + count]) for first in range(0, flat.numel(), count))


def _strided(stored: Stored) -> Tensor:
    """A tensor whose elements do not lie in rows; takes the memory of the whole tensor."""
    whole = torch.empty(stored.span, dtype=stored.dtype, device="cpu")
    stored.read_into(_bytes(whole), 0)
    return whole.as_strided(stored.shape, stored.strides or (1,) * len(stored.shape))


def _bytes(flat: Tensor) -> memoryview:
    view: Any = flat.view(torch.uint8).numpy()
    return memoryview(view)
