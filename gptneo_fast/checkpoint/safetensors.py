"""The header of a safetensors file, screened whole before any of its tensors is read.

Eight bytes give the header's length; the header is a JSON object from name to dtype, shape and the place after the header;
the tensors then cover the rest of the file, each byte once. The library has the last word on that; what is checked here
before are keys given twice, which it takes, and what its errors would not name.
"""

from __future__ import annotations

import math
from typing import Any, TypeGuard

import torch
from safetensors import SafetensorError, safe_open

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
    tensors = [_tensor(file, 8 + length, name, about) for name, about in header.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.numel))
    _check_length(file, 8 + length, tensors)
    try:
        with safe_open(file.path, "np"):  # maps the file, and touches its header alone
            return tensors
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file.path}: safetensors refuses its header, whose tensors lie one after the other without overlap or hole: "
            f"{str(error)[:300]!r}; {_AGAIN}"
        ) from error


def _tensor(file: WeightFile, begin: int, name: str, about: Any) -> Stored:
    """One entry of the header, which names its tensor where it cannot be right; the library's errors often do not."""
    where = f"{file.path}: tensor {name[:200]!r}"
    if not isinstance(about, dict):
        raise CheckpointError(f"{where} is described by a {type(about).__name__}, not by dtype, shape and data_offsets")
    kind, shape, place = (about.get(key) for key in ("dtype", "shape", "data_offsets"))
    dtype = DTYPES.get(kind) if isinstance(kind, str) else None
    if dtype is None:
        raise CheckpointError(f"{where} has dtype {repr(kind)[:40]}; known are {', '.join(DTYPES)}")
    if not _sizes(shape, 8) or not _sizes(place, 2) or len(place) != 2:
        raise CheckpointError(
            f"{where} has shape {repr(shape)[:80]} and data_offsets {repr(place)[:80]}; a shape is a list of at most 8 sizes, "
            "and they are two positions in the file"
        )
    has, needs = place[1] - place[0], math.prod(shape) * dtype.itemsize
    if has != needs:
        raise CheckpointError(
            f"{where} of shape {shape} and dtype {kind} needs {needs} bytes, its data_offsets {place} give {has}"
        )
    return Stored(name, dtype, tuple(shape), file, begin + place[0])


def _sizes(values: Any, most: int) -> TypeGuard[list[int]]:
    return isinstance(values, list) and len(values) <= most and all(type(n) is int and 0 <= n < 2**63 for n in values)


def _check_length(file: WeightFile, begin: int, tensors: list[Stored]) -> None:
    """Refuse a file that ends before its last tensor does, or after."""
    at = max((tensor.start + tensor.numel * tensor.dtype.itemsize for tensor in tensors), default=begin)
    if at > file.size:
        raise CheckpointError(
            f"{file.path} is cut: its tensors need {at} bytes, it has {file.size} ({at - file.size} fewer): "
            f"interrupted download? {_AGAIN}"
        )
    if at < file.size:
        last = f"tensor {tensors[-1].name[:200]!r}, the last" if tensors else "the header"
        raise CheckpointError(f"{file.path}: {file.size - at} bytes stand after {last}; {_AGAIN}")
