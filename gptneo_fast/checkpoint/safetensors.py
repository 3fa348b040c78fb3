"""The header of a safetensors file, screened whole before any of its tensors is read.

Eight bytes give the header's length; the header is a JSON object from name to dtype, shape and the place after the header;
the tensors then cover the rest of the file, each byte once.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ..errors import CheckpointError
from ..files.strict_json import parse_object
from .weight_file import Stored, WeightFile, kind_of

MAX_HEADER = 16 << 20  # bytes; a GPT-Neo of 256 layers has a header of 1 MB
_AGAIN = "delete it and fetch it again"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def stored_in(file: WeightFile) -> list[Stored]:
    """Every tensor of a safetensors file, in the order in which they lie in it.

    Raises:
        CheckpointError: the file is something else, cut, or its header contradicts itself; names the tensor.
    """
    try:
        return _screened(file)
    except CheckpointError as error:
        if kind := kind_of(file):  # only now: the length may begin like anything
            raise CheckpointError(f"{file.path} is no safetensors file: {kind}") from error
        raise


def _screened(file: WeightFile) -> list[Stored]:
    length = int.from_bytes(file.read(0, 8), "little")
    if file.size < 10:
        raise CheckpointError(f"{file.path} has {file.size} bytes, no room for a header: interrupted download? {_AGAIN}")
    if length > MAX_HEADER:
        raise CheckpointError(
            f"{file.path} is no safetensors file: its header would have {length} bytes, of at most {MAX_HEADER}"
        )
    if 8 + length > file.size:
        raise CheckpointError(
            f"{file.path} is cut: its header has {length} bytes, the file {file.size}: interrupted download? {_AGAIN}"
        )
    header = parse_object(file.read(8, length), f"the header of {file.path}", CheckpointError)
    header.pop("__metadata__", None)
    begin = 8 + length
    tensors = sorted((_tensor(file, begin, name, about) for name, about in header.items()), key=_place)
    _cover(file, begin, tensors)
    return tensors


def _place(tensor: Stored) -> tuple[int, int]:
    return tensor.start, tensor.numel


def _end(tensor: Stored) -> int:
    return tensor.start + tensor.numel * tensor.dtype.itemsize


def _tensor(file: WeightFile, begin: int, name: str, about: Any) -> Stored:
    """One entry of the header, right in itself."""

    def fault(what: str) -> CheckpointError:
        return CheckpointError(f"{file.path}: tensor {name[:200]!r} {what}")

    if not isinstance(about, dict):
        raise fault(f"is described by a {type(about).__name__}, not by an object with dtype, shape and data_offsets")
    kind, shape, place = (about.get(key) for key in ("dtype", "shape", "data_offsets"))
    dtype = DTYPES.get(kind) if isinstance(kind, str) else None
    if dtype is None:
        raise fault(f"has dtype {repr(kind)[:40]}; known are {', '.join(DTYPES)}")
    if not isinstance(shape, list) or len(shape) > 8 or not all(_is_size(n) for n in shape):
        raise fault(f"has shape {repr(shape)[:80]}; a shape is a list of at most 8 sizes")
    if not isinstance(place, list) or len(place) != 2 or not all(_is_size(n) for n in place):
        raise fault(f"has data_offsets {repr(place)[:80]}; they are two positions in the file")
    first, last = place
    expected = math.prod(shape) * dtype.itemsize
    if last - first != expected:
        raise fault(f"of shape {shape} and dtype {kind} needs {expected} bytes, its data_offsets {place} give {last - first}")
    return Stored(name, dtype, tuple(shape), file, begin + first)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _cover(file: WeightFile, begin: int, tensors: list[Stored]) -> None:
    """Refuse tensors that do not cover the bytes after the header, each byte once."""
    at, before = begin, "the header"
    for tensor in tensors:
        if tensor.start < at:
            raise CheckpointError(f"{file.path}: tensor {tensor.name[:200]!r} overlaps {before} by {at - tensor.start} bytes")
        if tensor.start > at:
            raise CheckpointError(
                f"{file.path}: {tensor.start - at} bytes between {before} and tensor {tensor.name[:200]!r} belong to none"
            )
        at, before = _end(tensor), f"tensor {tensor.name[:200]!r}"
    if at > file.size:
        raise CheckpointError(
            f"{file.path} is cut: its tensors need {at} bytes, it has {file.size} ({at - file.size} fewer): "
            f"interrupted download? {_AGAIN}"
        )
    if at < file.size:
        raise CheckpointError(f"{file.path}: {file.size - at} bytes stand after {before}, the last; {_AGAIN}")
