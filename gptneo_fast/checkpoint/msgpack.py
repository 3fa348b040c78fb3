"""flax_model.msgpack: a tree of arrays as flax.serialization writes it. Only its structure is read here, never an array.

Format (msgpack's specification, and flax/serialization.py): maps with string keys down to leaves; a leaf is an extension
of type 1 (array) or 3 (scalar) around [shape, dtype name, bytes]. An array of more than 2^30 bytes is a map with the key
`__msgpack_chunked_array__`, its shape, and its flat pieces in order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from ..errors import CheckpointError, UnsafeCheckpointError
from .weight_file import Stored, WeightFile, kind_of

MAX_NODES, MAX_DEPTH, MAX_TEXT = 1 << 18, 16, 4096  # values in the tree, maps inside one another, bytes of a key
_CHUNKED = "__msgpack_chunked_array__"
_ARRAY, _SCALAR = 1, 3
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    )
}
_LEAF_NAMES = {"scale": "weight", "embedding": "weight", "kernel": "weight"}
_SIZED = {  # first byte -> (kind, bytes of the size that follows)
    **{0xC4 + i: ("bin", 1 << i) for i in range(3)},
    **{0xC7 + i: ("ext", 1 << i) for i in range(3)},
    **{0xCC + i: ("int", 1 << i) for i in range(4)},
    **{0xD9 + i: ("str", 1 << i) for i in range(3)},
    **{0xDC + i: ("array", 2 << i) for i in range(2)},
    **{0xDE + i: ("map", 2 << i) for i in range(2)},
}
_PLAIN = {0xC0: ("nil", 0), 0xC2: ("bool", 0), 0xC3: ("bool", 0), 0xCA: ("float", 4), 0xCB: ("float", 8)}  # + bytes of it
_PLAIN |= {0xD0 + i: ("signed int", 1 << i) for i in range(4)}
_NAMES = {"nil": "None", "bool": "a bool", "int": "an integer", "signed int": "an integer", "negative integer": "an integer"}
_NAMES |= {"str": "text", "bin": "bytes", "array": "a list", "ext": "an extension"}


class _Head(NamedTuple):
    """The begin of a value: its kind, and its length (of what holds something) or itself (of an integer, a bool)."""

    kind: str
    value: int


def stored_in(file: WeightFile) -> list[Stored]:
    """Every tensor of a `flax_model.msgpack` under its name in torch, in the order in which they lie in it.

    A kernel [in, out] is given as its transpose [out, in], by strides.

    Raises:
        CheckpointError: the file is something else, cut, or holds more than named arrays; names the tensor.
        UnsafeCheckpointError: nested deeper, or of more values, than any model has.
    """
    walker = _Walker(file)
    try:
        return walker.tree()
    except CheckpointError as error:
        if kind := kind_of(file):
            raise CheckpointError(f"{file.path} is no msgpack file of flax: {kind}") from error
        raise


def torch_name(path: str) -> str:
    """`transformer/h/0/ln_1/scale` as `transformer.h.0.ln_1.weight`; the outer `params` of a variables dict is dropped."""
    module, _, leaf = path.removeprefix("params/").rpartition("/")
    return f"{module}/{_LEAF_NAMES.get(leaf, leaf)}".strip("/").replace("/", ".")


class _Walker:
    """Reads the file from its first byte to its last, jumping over the bytes of arrays."""

    def __init__(self, file: WeightFile) -> None:
        self.file = file
        self.at = 0  # byte that is read next
        self.nodes = 0
        self.found: list[Stored] = []

    def tree(self) -> list[Stored]:
        """The whole file."""
        head = self._head()
        if head.kind != "map":
            raise self._fault(f"is no msgpack file of flax: it begins with {_NAMES.get(head.kind, head.kind)}, not with a map")
        self._map(head.value, (), 1)
        if self.at != self.file.size:
            raise self._fault(f"has {self.file.size - self.at} bytes after the end of its tree; delete it and fetch it again")
        return self.found

    def _map(self, count: int, path: tuple[str, ...], depth: int) -> None:
        if depth > MAX_DEPTH:
            raise UnsafeCheckpointError(f"{self.file.path}: {self._where(path)} is nested deeper than {MAX_DEPTH} maps")
        keys = set[str]()
        for i in range(count):
            key = self._key(path)
            if key in keys:
                raise self._fault(f"holds {self._where((*path, key))} twice")
            keys.add(key)
            if i == 0 and key == _CHUNKED:
                self._chunked(count, path)
                return
            self._value((*path, key), depth)

    def _value(self, path: tuple[str, ...], depth: int) -> None:
        head = self._head()
        if head.kind == "map":
            self._map(head.value, path, depth + 1)
        elif head.kind == "ext":
            self.found.append(self._named(path, self._array(head, path)))
        else:
            raise self._fault(f"holds {_NAMES.get(head.kind, 'a ' + head.kind)} as {self._where(path)}; weights are arrays")

    def _array(self, head: _Head, path: tuple[str, ...]) -> Stored:
        """The array in an extension, with the name '' and rows as they lie in the file."""
        kind, end = self._bytes(1)[0], self.at + head.value
        if kind not in (_ARRAY, _SCALAR):
            raise self._fault(f"holds an extension of type {kind} as {self._where(path)}; arrays are of type {_ARRAY}")
        if end > self.file.size:
            raise self._cut(head.value - (self.file.size - self.at), path)
        if self._head() != ("array", 3) or (rank := self._head()).kind != "array" or rank.value > 8:
            raise self._fault(f"holds {self._where(path)}, whose array is not [shape of at most 8 sizes, dtype, bytes]")
        shape = tuple(self._integer(path) for _ in range(rank.value))
        name = self._text(path)
        dtype = _DTYPES.get(name)
        if dtype is None:
            raise self._fault(f"holds {self._where(path)} of dtype {name[:40]!r}; known are {', '.join(_DTYPES)}")
        data = self._head()
        needed = math.prod(shape) * dtype.itemsize
        if data.kind != "bin" or data.value != needed or self.at + needed != end:
            raise self._fault(
                f"holds {self._where(path)}, which as {name} {list(shape)} needs {needed} bytes and has "
                f"{data.value if data.kind == 'bin' else data.kind} in an extension that leaves it {end - self.at}"
            )
        start, self.at = self.at, end
        return Stored("", dtype, shape, self.file, start)

    def _chunked(self, count: int, path: tuple[str, ...]) -> None:
        """An array in pieces; its map has `count` entries and its first key is read."""
        fault = self._fault(f"holds {self._where(path)}, a chunked array that is not (shape, chunks) of one dtype")
        if count != 3 or self._head() != ("bool", 1) or self._key(path) != "shape":
            raise fault
        shape = tuple(self._integer(path) for _ in self._numbered(path, fault, 8))
        if self._key(path) != "chunks":
            raise fault
        parts = []
        for _ in self._numbered(path, fault, MAX_NODES):
            if (head := self._head()).kind != "ext":
                raise fault
            parts.append(self._array(head, path))
        has = sum(part.numel for part in parts)
        if not parts or has != math.prod(shape) or any(part.dtype != parts[0].dtype for part in parts):
            raise self._fault(f"holds {self._where(path)} of shape {list(shape)} in chunks of {has} elements in all")
        pieces = tuple((part.start, part.numel * part.dtype.itemsize) for part in parts)
        whole = Stored("", parts[0].dtype, shape, self.file, parts[0].start, pieces=pieces)
        self.found.append(self._named(path, whole))

    def _numbered(self, path: tuple[str, ...], fault: CheckpointError, most: int) -> Iterator[int]:
        """A tuple as flax writes it, a map from "0", "1", ...: yields each time that the next value is to be read."""
        head = self._head()
        if head.kind != "map" or head.value > most:
            raise fault
        for i in range(head.value):
            if self._key(path) != str(i):
                raise fault
            yield i

    def _named(self, path: tuple[str, ...], array: Stored) -> Stored:
        name, shape, strides = torch_name("/".join(path)), array.shape, None
        if path[-1] == "kernel" and len(shape) == 2:
            shape, strides = shape[::-1], (1, shape[1])
        return Stored(name, array.dtype, shape, self.file, array.start, strides, array.pieces)

    # Values

    def _head(self) -> _Head:
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise UnsafeCheckpointError(f"{self.file.path} holds more than {MAX_NODES} values; a model has thousands")
        first = self._bytes(1)[0]
        if first < 0x80:
            return _Head("int", first)
        if first < 0xC0:
            kind, size = ("map", first & 15) if first < 0x90 else ("array", first & 15) if first < 0xA0 else ("str", first & 31)
            return _Head(kind, size)
        if first in _SIZED:
            kind, width = _SIZED[first]
            return _Head(kind, int.from_bytes(self._bytes(width), "big"))
        if first in _PLAIN:
            kind, width = _PLAIN[first]
            self._bytes(width)
            return _Head(kind, first - 0xC2 if kind == "bool" else 0)
        if 0xD4 <= first <= 0xD8:
            return _Head("ext", 1 << (first - 0xD4))
        return _Head("negative integer" if first >= 0xE0 else "byte that begins nothing", 0)

    def _key(self, path: tuple[str, ...]) -> str:
        return self._text(path)

    def _text(self, path: tuple[str, ...]) -> str:
        head = self._head()
        if head.kind != "str" or head.value > MAX_TEXT:
            what = f"text of {head.value} bytes" if head.kind == "str" else _NAMES.get(head.kind, "a " + head.kind)
            raise self._fault(f"has {what} where a name is due, in {self._where(path)}")
        try:
            return self._bytes(head.value).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._fault(f"has a name that is not UTF-8 in {self._where(path)}") from error

    def _integer(self, path: tuple[str, ...]) -> int:
        head = self._head()
        if head.kind != "int":
            raise self._fault(
                f"holds {self._where(path)}, whose shape has {_NAMES.get(head.kind, 'a ' + head.kind)} for a size"
            )
        return head.value

    def _bytes(self, count: int) -> bytes:
        data = self.file.read(self.at, count)
        if len(data) < count:
            raise self._cut(count - len(data), ())
        self.at += count
        return data

    # Errors

    def _where(self, path: tuple[str, ...]) -> str:
        return f"tensor {'/'.join(path)[:200]!r}" if path else "the tree"

    def _fault(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.file.path} {what}")

    def _cut(self, fewer: int, path: tuple[str, ...]) -> CheckpointError:
        return self._fault(
            f"is cut: it has {self.file.size} bytes and {self._where(path)} needs {fewer} more: interrupted download? "
            "delete it and fetch it again"
        )
