"""The members of a zip archive as torch.save writes it: stored and not compressed, so that each is a range of the file."""

from __future__ import annotations

import io
import struct
import zipfile
from typing import NamedTuple

from ..errors import CheckpointError, UnsafeCheckpointError
from .weight_file import WeightFile

MAX_DIRECTORY = 8 << 20  # bytes; one of 65536 members has 5 MB
_LOCAL = struct.Struct("<4s22xHH")  # signature, lengths of the name and of what follows it


class Member(NamedTuple):
    """A file in an archive: where its bytes begin, how many there are, and whether they are the file's own as they stand."""

    begin: int
    size: int
    plain: bool


class _Bounded(io.BufferedReader):
    """A weight file for zipfile, which reads the directory at the length that the archive claims."""

    def __init__(self, file: WeightFile) -> None:
        super().__init__(io.FileIO(file.descriptor, closefd=False))
        self.path = file.path

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > MAX_DIRECTORY:
            raise UnsafeCheckpointError(f"{self.path}: the zip directory would have {size} bytes, of at most {MAX_DIRECTORY}")
        return super().read(size)


def members(file: WeightFile) -> dict[str, Member]:
    """Every member of an archive by its name.

    Raises:
        CheckpointError: no zip archive, or a cut one.
        UnsafeCheckpointError: a member stands outside the file, or twice.
    """
    try:
        with _Bounded(file) as stream, zipfile.ZipFile(stream) as archive:
            entries = archive.infolist()
    except CheckpointError:
        raise
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, OSError, struct.error) as error:
        raise CheckpointError(
            f"{file.path} ({file.size} bytes) is a zip archive without its end, or a damaged one ({str(error)[:100]!r}): "
            "interrupted download? delete it and fetch it again"
        ) from error
    found: dict[str, Member] = {}
    for entry in entries:
        if entry.filename in found:
            raise UnsafeCheckpointError(f"{file.path}: member {entry.filename[:200]!r} stands twice in the zip archive")
        plain = entry.compress_type == zipfile.ZIP_STORED and not entry.flag_bits & 1 and entry.compress_size == entry.file_size
        found[entry.filename] = Member(_begin(file, entry), entry.compress_size, plain)
    return found


def _begin(file: WeightFile, entry: zipfile.ZipInfo) -> int:
    """Byte at which a member's contents begin: after its local header, whose lengths the directory does not have."""
    at, size = entry.header_offset, entry.compress_size
    head = file.read(at, _LOCAL.size) if 0 <= at < file.size else b""
    if len(head) == _LOCAL.size:
        signature, name, extra = _LOCAL.unpack(head)
        begin = at + _LOCAL.size + name + extra
        if signature == b"PK\x03\x04" and begin + size <= file.size:
            return int(begin)
    raise UnsafeCheckpointError(
        f"{file.path}: member {entry.filename[:200]!r} of {size} bytes does not lie within the {file.size} bytes"
    )
