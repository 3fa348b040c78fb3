"""A weight file that is held open, the place of a tensor in it, and what a file is that should be weights and is not."""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, InputError, short

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
    stat.S_IFSOCK: "a socket",
}
_STARTS = {
    b"version https://git-lfs": "a Git LFS pointer and not the file it points to: run git lfs pull",
    b"PK\x03\x04": "a zip archive (torch.save writes these): name it pytorch_model.bin",
    b"\x1f\x8b": "a gzip archive: unpack it",
    b"\x28\xb5\x2f\xfd": "a zstandard archive: unpack it",
    b"\x89HDF": "an HDF5 file (TensorFlow's weights): convert it with transformers",
    b"\x80\x02": "a pickle: only zip archives of torch.save are read",
    b"\x80\x03": "a pickle: only zip archives of torch.save are read",
    b"\x80\x04": "a pickle: only zip archives of torch.save are read",
    b"\x80\x05": "a pickle: only zip archives of torch.save are read",
    b"{": "JSON text: was a server's message saved as the file?",
}
_PAGE = (b"<!doctype html", b"<html", b"<head", b"<?xml")


class WeightFile:
    """A regular file, open for positioned reads; what stood in it at opening must stand there to the end.

    Positioned reads and no memory map: a mapped file that shrinks kills the process, and its pages count as memory.

    Args:
        path: of the file.

    Raises:
        CheckpointError: not a regular file, or it may not be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            kind = stat.S_IFMT(os.stat(path).st_mode)
            if kind != stat.S_IFREG:  # before opening: that of a FIFO or a device waits, or does something
                raise CheckpointError(f"{path} is {_KINDS.get(kind, 'no regular file')}; weights are a regular file")
            self.descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            link = ", a symbolic link that leads nowhere" if path.is_symlink() else ""
            raise CheckpointError(f"{path}{link} cannot be read: {error.strerror}") from error
        self._stat = os.fstat(self.descriptor)
        self.size = self._stat.st_size  # bytes

    def read(self, start: int, count: int) -> bytes:
        """`count` bytes from `start` on, or as many as there are."""
        try:
            return os.pread(self.descriptor, count, start)
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error.strerror}") from error

    def read_into(self, view: memoryview, start: int) -> None:
        """Fill `view` from the bytes from `start` on.

        Raises:
            CheckpointError: the file ends before, as it did not when it was opened.
        """
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self.descriptor, [view[done:]], start + done)
            except OSError as error:
                raise CheckpointError(f"{self.path} cannot be read: {error.strerror}") from error
            if not count:
                raise CheckpointError(
                    f"{self.path} had {self.size} bytes when loading began and ends at byte {start + done} now: "
                    "it was cut while it was read; load again once nothing writes to it"
                )
            done += count

    def check_unchanged(self) -> None:
        """Refuse a file that was written to since it was opened.

        Raises:
            CheckpointError: its size or time of change is another.
        """
        now = os.fstat(self.descriptor)
        if (now.st_size, now.st_mtime_ns) != (self._stat.st_size, self._stat.st_mtime_ns):
            raise CheckpointError(
                f"{self.path} changed while it was read ({self.size} bytes then, {now.st_size} now); "
                "load again once nothing writes to it"
            )

    def close(self) -> None:
        """Let go of the file."""
        os.close(self.descriptor)


class HeldTensor:
    """What a WeightFile is to its readers, for one tensor that is in memory already. path: what errors call it."""

    def __init__(self, tensor: Tensor, path: Path) -> None:
        self.path = path
        flat: Any = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        self._bytes = memoryview(flat)

    def read_into(self, view: memoryview, start: int) -> None:
        """Fill `view` from the bytes from `start` on."""
        view[:] = self._bytes[start : start + len(view)]


@dataclass(frozen=True)
class Stored:
    """A tensor's place in a weight file.

    name: as the file gives it. shape: of the tensor. dtype: as it is stored, little-endian.
    start: byte of its first element. strides: in elements, None for rows one after the other.
    pieces: (first byte, bytes) of each part of a tensor that does not lie in one piece; none for one that does.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: WeightFile | HeldTensor
    start: int
    strides: tuple[int, ...] | None = None
    pieces: tuple[tuple[int, int], ...] = ()

    def read_into(self, view: memoryview, first: int) -> None:
        """Fill `view` from the tensor's bytes, from the one numbered `first` on.

        Raises:
            CheckpointError: the file ends before, as it did not when it was opened.
        """
        if not self.pieces:
            self.file.read_into(view, self.start + first)
            return
        begin = 0  # of the piece among the tensor's bytes
        for start, size in self.pieces:
            low, high = max(first, begin), min(first + len(view), begin + size)
            if low < high:
                self.file.read_into(view[low - first : high - first], start + low - begin)
            begin += size

    @property
    def numel(self) -> int:
        """Elements of the tensor."""
        return math.prod(self.shape)

    @property
    def span(self) -> int:
        """Elements from the first to the last, both included, as they lie in the file."""
        if self.strides is None or not self.numel:
            return self.numel
        return 1 + sum((n - 1) * step for n, step in zip(self.shape, self.strides, strict=True))


def kind_of(file: WeightFile) -> str | None:
    """What the first bytes say that the file is, with the way out; None where they say nothing."""
    begin = file.read(0, 512)
    if not begin:
        return "it has 0 bytes: interrupted download? delete it and fetch it again"
    if begin.lstrip().lower().startswith(_PAGE):
        return "this is an HTML page: a download was answered by a web page, perhaps one that asks to log in"
    if len(begin) >= 64 and not any(begin):
        return "it begins with zeros: interrupted download? delete it and fetch it again"
    return next((f"this is {what}" for start, what in _STARTS.items() if begin.startswith(start)), None)


def held(state_dict: Mapping[str, Tensor]) -> list[Stored]:
    """The tensors of a state dict, to be read as those of a file.

    Raises:
        InputError: something else.
    """
    if not isinstance(state_dict, Mapping) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state_dict.items()
    ):
        raise InputError(f"state_dict is {short(state_dict)}; give a dict from names to tensors, as of model.state_dict()")
    place = Path("state_dict")
    return [Stored(name, t.dtype, tuple(t.shape), HeldTensor(t, place), 0) for name, t in state_dict.items()]
