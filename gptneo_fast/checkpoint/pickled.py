"""`pytorch_model.bin`: the tensors of a zip archive that torch.save wrote, without ever unpickling it.

The archive holds one member per storage and `data.pkl`, which says how tensors lie in them. That pickle is read by a small
machine that knows the opcodes of a state dict and six names; it builds strings, numbers, tuples, dicts and places in the
file. Nothing is imported, called or allocated on its word, which is less than `torch.load(weights_only=True)` does.
"""

from __future__ import annotations

import io
import math
import pickletools
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import CheckpointError, UnsafeCheckpointError
from .archive import Member, members
from .weight_file import Stored, WeightFile, kind_of

MAX_PICKLE = 16 << 20  # bytes; a GPT-Neo of 256 layers has 1 MB
_CONVERT = "write it anew with torch.save(torch.load(path, weights_only=True), path) where you trust it, or use safetensors"
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_CALLS = {  # what a state dict may name; a name stands for itself
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    *(f"torch {name}" for name in _STORAGES),
}
_MARK = object()


@dataclass(frozen=True)
class _Name:
    text: str


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def stored_in(file: WeightFile) -> list[Stored]:
    """Every tensor of a `pytorch_model.bin`, in the order in which they lie in it.

    Raises:
        CheckpointError: no zip archive of torch.save, a cut one, or one that holds more than named tensors.
        UnsafeCheckpointError: it would run code, or claims more bytes than it has.
    """
    if file.read(0, 4) != b"PK\x03\x04":
        what = kind_of(file) or "this is no zip archive of torch.save"
        raise CheckpointError(f"{file.path} cannot be read: {what}; a file of torch before 1.6: {_CONVERT}")
    found = members(file)
    root = next((name[: -len("data.pkl")] for name in found if name.endswith("data.pkl") and name.count("/") <= 1), None)
    if root is None:
        raise CheckpointError(f"{file.path} is a zip archive without data.pkl: torch.save did not write it")
    if f"{root}constants.pkl" in found or any(name.startswith(f"{root}code/") for name in found):
        raise UnsafeCheckpointError(f"{file.path} is a TorchScript program and no state dict; save model.state_dict() instead")
    if packed := next((name for name, member in found.items() if not member.plain), None):
        raise UnsafeCheckpointError(
            f"{file.path}: member {packed[:200]!r} is compressed or encrypted; torch.save stores tensors as they are, so this "
            f"archive may unpack to any size; {_CONVERT}"
        )
    if f"{root}byteorder" in found and file.read(found[f"{root}byteorder"].begin, 6) != b"little":
        raise CheckpointError(f"{file.path} was written on a big-endian machine; {_CONVERT}")
    begin, size, _ = found[f"{root}data.pkl"]
    if size > MAX_PICKLE:
        raise UnsafeCheckpointError(f"{file.path}: data.pkl has {size} bytes, of at most {MAX_PICKLE}")
    state = _read(file, file.read(begin, size))
    if not isinstance(state, dict):
        raise CheckpointError(f"{file.path} holds {_kind(state)}, not a dict from names to tensors")
    tensors = [_placed(file, found, root, name, value) for name, value in state.items()]
    return sorted(tensors, key=lambda t: t.start)


def _placed(file: WeightFile, found: dict[str, Member], root: str, name: str, value: Any) -> Stored:
    """One tensor of the state dict, held against the bytes that its storage has."""
    where = f"{file.path}: tensor {name[:200]!r}"
    if not isinstance(value, _Tensor):
        raise CheckpointError(
            f"{file.path}: entry {name[:200]!r} is {_kind(value)}, not a tensor; save model.state_dict() alone"
        )
    storage, item = value.storage, value.storage.dtype.itemsize
    member = found.get(f"{root}data/{storage.key}")
    if member is None or member.size != storage.numel * item:
        has = "is missing" if member is None else f"has {member.size} bytes"
        raise UnsafeCheckpointError(f"{where}: its storage {storage.key[:40]!r} of {storage.numel} x {item} bytes {has}")
    numel = math.prod(value.shape)
    last = value.offset + sum((n - 1) * step for n, step in zip(value.shape, value.strides, strict=True))
    if numel and (last >= storage.numel or numel > storage.numel):
        raise UnsafeCheckpointError(
            f"{where} of shape {list(value.shape)} and strides {list(value.strides)} reaches beyond the {storage.numel} "
            "elements of its storage, or repeats them"
        )
    rows, step = [], 1
    for n in reversed(value.shape):
        rows.append(step)
        step *= n
    dense = all(n == 1 or a == b for n, a, b in zip(value.shape, value.strides, reversed(rows), strict=True))
    start = member.begin + value.offset * item
    return Stored(name, storage.dtype, value.shape, file, start, None if dense or not numel else value.strides)


def _read(file: WeightFile, data: bytes) -> Any:
    machine = _Machine(file)
    try:
        for opcode, argument, _ in pickletools.genops(io.BytesIO(data)):
            if opcode.name == "STOP":
                return machine.stack.pop()
            machine.step(opcode.name, argument)
    except (UnsafeCheckpointError, CheckpointError):
        raise
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:  # all that bytes at random can do
        raise CheckpointError(
            f"{file.path}: data.pkl is damaged: {str(error)[:200]!r}; delete it and fetch it again"
        ) from error
    raise CheckpointError(f"{file.path}: data.pkl is cut")


class _Machine:
    """The stack of a pickle, for the opcodes that a state dict is written with (protocols 2 to 5)."""

    def __init__(self, file: WeightFile) -> None:
        self.file = file
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        """One opcode."""
        stack = self.stack
        if name in ("PROTO", "FRAME"):
            pass
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _VALUES:
            stack.append(argument)
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memo[len(self.memo) if argument is None else argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            stack[-count:] = [tuple(stack[-count:])]
        elif name == "TUPLE":
            stack.append(tuple(self.marked()))
        elif name in ("APPEND", "APPENDS"):
            items = [stack.pop()] if name == "APPEND" else self.marked()
            self.top(list).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = [stack.pop(), stack.pop()][::-1] if name == "SETITEM" else self.marked()
            self.fill(items)
        elif name == "GLOBAL":
            stack.append(self.named(argument))
        elif name == "STACK_GLOBAL":
            last, module = stack.pop(), stack.pop()
            if type(module) is not str or type(last) is not str:
                raise TypeError(f"a class is named by {_kind(last)}")
            stack.append(self.named(f"{module} {last}"))
        elif name == "REDUCE":
            arguments, call = stack.pop(), stack.pop()
            stack.append(self.call(call, arguments))
        elif name == "BUILD":
            stack.pop()  # the state of a dict: torch keeps versions of modules there
            self.top(dict)
        elif name == "BINPERSID":
            stack.append(self.storage(stack.pop()))
        else:
            raise UnsafeCheckpointError(f"{self.file.path}: data.pkl has the opcode {name}, which no state dict needs")

    def marked(self) -> list[Any]:
        """What stands above the last mark, taken off with it."""
        at = len(self.stack) - 1
        while self.stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise ValueError("no mark on the stack")
        items = self.stack[at + 1 :]
        del self.stack[at:]
        return items

    def top(self, kind: type[Any]) -> Any:
        if type(self.stack[-1]) is not kind:
            raise TypeError(f"a {kind.__name__} is written to, {_kind(self.stack[-1])} is there")
        return self.stack[-1]

    def fill(self, items: list[Any]) -> None:
        into = self.top(dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is not str:
                raise CheckpointError(f"{self.file.path} has {_kind(key)} as a name; a state dict's names are text")
            into[key] = value

    def named(self, text: str) -> _Name:
        if text not in _CALLS:
            raise UnsafeCheckpointError(
                f"{self.file.path} would call {text.replace(' ', '.')[:100]!r} when unpickled: it is no state dict of tensors, "
                "and was not loaded"
            )
        return _Name(text.split(" ")[1])

    def call(self, call: Any, arguments: Any) -> Any:
        name = call.text if isinstance(call, _Name) else None
        if name == "OrderedDict" and arguments == ():
            return {}
        if name == "_rebuild_parameter" and isinstance(arguments[0], _Tensor):
            return arguments[0]
        if name == "_rebuild_tensor_v2":
            storage, offset, shape, strides = arguments[:4]
            sized = _sizes((offset,)) and _sizes(shape) and _sizes(strides) and len(shape) == len(strides)
            if isinstance(storage, _Storage) and sized:
                return _Tensor(storage, offset, shape, strides)
        raise UnsafeCheckpointError(f"{self.file.path}: data.pkl calls {name or _kind(call)} in a way that torch.save does not")

    def storage(self, about: Any) -> _Storage:
        if type(about) is tuple and len(about) == 5 and about[0] == "storage" and isinstance(about[1], _Name):
            _, kind, key, _, numel = about
            if kind.text in _STORAGES and type(key) is str and _sizes((numel,)):
                return _Storage(key, _STORAGES[kind.text], numel)
        raise UnsafeCheckpointError(f"{self.file.path}: data.pkl names a storage in a way that torch.save does not")


_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "MARK": _MARK, "EMPTY_TUPLE": ()}
_EMPTY: dict[str, Any] = {"EMPTY_DICT": dict, "EMPTY_LIST": list}
_VALUES = frozenset("BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE".split())


def _sizes(values: Any) -> bool:
    return type(values) is tuple and len(values) <= 8 and all(type(v) is int and 0 <= v < 2**63 for v in values)


def _kind(value: Any) -> str:
    names = {_Tensor: "a tensor", _Storage: "a storage", _Name: "a class", dict: "a dict", list: "a list", str: "text"}
    return names.get(type(value), f"a {type(value).__name__}")
