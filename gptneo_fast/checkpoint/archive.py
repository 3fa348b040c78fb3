"""The members of a zip archive as torch.save writes it: stored and not compressed, so that each is a range of the file.

Layout (PKWARE's APPNOTE 6.3): local header + bytes of each member, then the central directory, then its end record. Sizes
of 4 GB and more stand in zip64 fields.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from ..errors import CheckpointError, UnsafeCheckpointError
from .weight_file import WeightFile

MAX_DIRECTORY = 64 << 20  # bytes
_END, _END64, _LOCATOR, _ENTRY, _LOCAL = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07", b"PK\x01\x02", b"PK\x03\x04"
_FULL = 0xFFFFFFFF


class Member(NamedTuple):
    """A file in an archive: where its bytes begin, how many there are, and whether they are the file's own as they stand."""

    begin: int
    size: int
    plain: bool


def members(file: WeightFile) -> dict[str, Member]:
    """Every member of an archive by its name.

    Raises:
        CheckpointError: no zip archive, or a cut one.
        UnsafeCheckpointError: a member stands outside the file, or twice.
    """
    try:
        start, size = _directory(file)
        return _entries(file, file.read(start, size))
    except struct.error as error:
        raise CheckpointError(f"{file.path} is a damaged zip archive: {error}; delete it and fetch it again") from error


def _directory(file: WeightFile) -> tuple[int, int]:
    """Where the central directory stands."""
    tail_at = max(0, file.size - (22 + 0xFFFF))
    tail = file.read(tail_at, file.size - tail_at)
    at = tail.rfind(_END)
    if at < 0 or len(tail) < at + 22:
        raise CheckpointError(
            f"{file.path} ({file.size} bytes) is a zip archive without its end: interrupted download? "
            "delete it and fetch it again"
        )
    size, start = struct.unpack_from("<II", tail, at + 12)
    if at >= 20 and tail.startswith(_LOCATOR, at - 20):
        (at64,) = struct.unpack_from("<Q", tail, at - 12)
        end64 = file.read(at64, 56) if at64 < file.size else b""
        if not end64.startswith(_END64):
            raise CheckpointError(f"{file.path} is a damaged zip archive: its zip64 record is not where it says")
        size, start = struct.unpack_from("<QQ", end64, 40)
    if size > MAX_DIRECTORY or start + size > file.size:
        raise UnsafeCheckpointError(
            f"{file.path}: the zip directory would have {size} bytes at byte {start} of {file.size} (limit {MAX_DIRECTORY})"
        )
    return start, size


def _entries(file: WeightFile, directory: bytes) -> dict[str, Member]:
    found: dict[str, Member] = {}
    at = 0
    while at < len(directory):
        if not directory.startswith(_ENTRY, at):
            raise CheckpointError(f"{file.path} is a damaged zip archive: byte {at} of its directory begins no entry")
        flags, method = struct.unpack_from("<HH", directory, at + 8)
        packed, size = struct.unpack_from("<II", directory, at + 20)
        long_name, long_extra, long_note = struct.unpack_from("<HHH", directory, at + 28)
        (local,) = struct.unpack_from("<I", directory, at + 42)
        extra_at = at + 46 + long_name
        name = directory[at + 46 : extra_at].decode("utf-8", "replace")
        packed, size, local = _wide(directory[extra_at : extra_at + long_extra], size, packed, local)
        at = extra_at + long_extra + long_note
        if name in found:
            raise UnsafeCheckpointError(f"{file.path}: member {name[:200]!r} stands twice in the zip archive")
        plain = method == 0 and not flags & 1 and packed == size
        found[name] = Member(_begin(file, name, local, packed), packed, plain)
    return found


def _wide(extra: bytes, size: int, packed: int, local: int) -> tuple[int, int, int]:
    """(packed, size, local), each from the zip64 field where 32 bits do not hold it."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            wide = [v for (v,) in struct.iter_unpack("<Q", extra[at + 4 : at + 4 + length // 8 * 8])]
            values = [wide.pop(0) if v == _FULL and wide else v for v in (size, packed, local)]
            return values[1], values[0], values[2]
        at += 4 + length
    return packed, size, local


def _begin(file: WeightFile, name: str, local: int, size: int) -> int:
    """Byte at which a member's contents begin: after its local header, whose names may differ in length."""
    head = file.read(local, 30) if local < file.size else b""
    if len(head) == 30 and head.startswith(_LOCAL):
        long_name, long_extra = struct.unpack_from("<HH", head, 26)
        begin = local + 30 + long_name + long_extra
        if begin + size <= file.size:
            return begin
    raise UnsafeCheckpointError(f"{file.path}: member {name[:200]!r} of {size} bytes does not lie within the {file.size} bytes")
