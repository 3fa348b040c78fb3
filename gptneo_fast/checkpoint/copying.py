"""Tensors from a weight file into memory: block by block, the dtype converted and every value looked at on the way.

No more than a block is held besides the target. A block stays in the processor's cache from the read over the check to
the conversion, so that each byte of the file crosses memory once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from .stored import Stored

BLOCK = 4 << 20  # bytes; of 256 KB to 64 MB the quickest measured on the CPU
STAGE = 16 << 20  # bytes of each of the two pinned buffers


class Copier:
    """Fills CPU tensors.

    Args:
        check_finite: refuse NaN, infinities and what the target's dtype cannot hold.
    """

    def __init__(self, check_finite: bool = True) -> None:
        self.check_finite = check_finite
        self._block = torch.empty(BLOCK, dtype=torch.uint8)

    def fill(self, stored: Stored, target: Tensor) -> None:
        """Read a tensor into `target`: contiguous, of its shape, any floating-point dtype.

        Raises:
            CheckpointError: a value that is not finite or too large, or the file is no longer whole.
        """
        if stored.strides is not None:
            self._fill_strided(stored, target)
            return
        flat, item, direct = target.view(-1), stored.dtype.itemsize, stored.dtype == target.dtype
        for first in range(0, stored.numel, BLOCK // item):
            part = flat[first : first + BLOCK // item]
            block = part if direct else self._typed(stored, part.numel())
            stored.file.read_into(_bytes(block), stored.start + first * item)
            if self.check_finite:
                self._check(stored, first, block, target.dtype)
            if not direct:
                part.copy_(block)

    def equal(self, stored: Stored, target: Tensor) -> bool:
        """Whether a tensor, in the dtype of `target`, has its values. target: contiguous, on any device."""
        if tuple(target.shape) != stored.shape or stored.strides is not None:
            return tuple(target.shape) == stored.shape and torch.equal(_strided(stored).to(target), target)
        flat, item = target.view(-1), stored.dtype.itemsize
        for first in range(0, stored.numel, BLOCK // item):
            part = flat[first : first + BLOCK // item]
            block = self._typed(stored, part.numel())
            stored.file.read_into(_bytes(block), stored.start + first * item)
            if not torch.equal(block.to(part), part):
                return False
        return True

    def finish(self) -> None:
        """Wait for what is under way."""

    def _typed(self, stored: Stored, count: int) -> Tensor:
        return self._block[: count * stored.dtype.itemsize].view(stored.dtype)

    def _fill_strided(self, stored: Stored, target: Tensor) -> None:
        whole = _strided(stored)
        if self.check_finite and whole.numel():
            self._check(stored, 0, whole, target.dtype)
        target.copy_(whole)

    def _check(self, stored: Stored, first: int, block: Tensor, dtype: torch.dtype) -> None:
        if not torch.stack(torch.aminmax(block)).to(dtype).isfinite().all():
            raise not_finite(stored, first, block, dtype)


class CudaCopier(Copier):
    """Fills CUDA tensors through two pinned buffers: one is read into while the other is on its way to the device.

    The conversion and the check run on the device; `finish` waits for them and raises what they found.
    """

    def __init__(self, device: torch.device, check_finite: bool = True) -> None:
        super().__init__(check_finite)
        self.device = device
        self._stages = [torch.empty(STAGE, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._left = [torch.cuda.Event() for _ in range(2)]  # recorded once a buffer's bytes are on the device
        self._turn = 0
        self._stream = torch.cuda.Stream(device)
        self._bounds: list[tuple[Stored, torch.dtype, Tensor]] = []

    def fill(self, stored: Stored, target: Tensor) -> None:
        """As `Copier.fill`; the values are there once `finish` returns."""
        if stored.strides is not None:
            self._fill_strided(stored, target)
            return
        flat, item = target.view(-1), stored.dtype.itemsize
        self._stream.wait_stream(torch.cuda.current_stream(self.device))  # target's memory may still be in use there
        for first in range(0, stored.numel, STAGE // item):
            part = flat[first : first + STAGE // item]
            stage, left = self._stages[self._turn], self._left[self._turn]
            self._turn = 1 - self._turn
            block = stage[: part.numel() * item].view(stored.dtype)
            left.synchronize()  # an event that was never recorded does not wait
            stored.file.read_into(_bytes(block), stored.start + first * item)
            with torch.cuda.stream(self._stream):
                there = block.to(self.device, non_blocking=True)
                left.record(self._stream)
                if self.check_finite:
                    self._bounds.append((stored, target.dtype, torch.stack(torch.aminmax(there))))
                part.copy_(there)

    def finish(self) -> None:
        """Wait for the copies.

        Raises:
            CheckpointError: a tensor holds a value that is not finite, or too large for the target's dtype.
        """
        torch.cuda.current_stream(self.device).wait_stream(self._stream)
        self._stream.synchronize()
        for stored, dtype, bounds in self._bounds:
            if not bounds.to(dtype).isfinite().all():
                raise not_finite(stored, None, bounds, dtype)
        self._bounds.clear()


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


def _strided(stored: Stored) -> Tensor:
    """A tensor whose elements do not lie in rows; takes the memory of the whole tensor."""
    whole = torch.empty(stored.span, dtype=stored.dtype)
    stored.file.read_into(_bytes(whole), stored.start)
    return whole.as_strided(stored.shape, stored.strides or (1,) * len(stored.shape))


def _bytes(flat: Tensor) -> memoryview:
    view: Any = flat.view(torch.uint8).numpy()
    return memoryview(view)
