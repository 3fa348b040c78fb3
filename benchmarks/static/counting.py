"""Count what really happens: kernel launches, and the bytes that interpreted Triton kernels load and store.

    with Traffic(weights=[w], cache=[k_cache, v_cache]) as traffic:
        kernels.linear_add(x, w, b, x)
    traffic.read["weights"].total       # bytes of active lanes, every load of every program
    traffic.read["weights"].distinct    # bytes that were touched at all
    traffic.launches                    # ["_linear_add_kernel"]

Bytes come from the pointers and masks that the interpreter is given, so they need TRITON_INTERPRET=1; launches are counted
there and on a GPU alike. A torch function that would launch a kernel of its own counts too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

OTHER = "other"  # the name of memory that no one named
_NO_KERNEL = ("empty", "detach", "alias", "set_", "lift_fresh", "resize_")  # aten functions that only make or name memory


@contextlib.contextmanager
def swapped(owner: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """`owner.name` replaced by `make(owner.name)`, put back at the end."""
    before = getattr(owner, name)
    setattr(owner, name, make(before))
    try:
        yield
    finally:
        setattr(owner, name, before)


class Launches(TorchDispatchMode):
    """A context that lists the kernels launched within it, in order: Triton kernels by name, torch's as "aten.mm"."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[str] = []
        self._inside = 0  # the interpreter itself calls torch
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Launches:
        from triton.runtime.interpreter import InterpretedFunction
        from triton.runtime.jit import JITFunction

        for kind in (InterpretedFunction, JITFunction):
            self._open.enter_context(swapped(kind, "run", self._counted))
        super().__enter__()
        return self

    def __exit__(self, *reason: Any) -> None:
        super().__exit__(*reason)
        self._open.close()

    def _counted(self, run: Callable[..., Any]) -> Callable[..., Any]:
        def launch(kernel: Any, *args: Any, **options: Any) -> Any:
            self.launches.append(kernel.__name__)
            self._inside += 1
            try:
                return run(kernel, *args, **options)
            finally:
                self._inside -= 1

        return launch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = len(self.launches)
        result = func(*args, **(kwargs or {}))
        launches = not func.is_view and not any(word in func._schema.name for word in _NO_KERNEL)
        if launches and not self._inside and len(self.launches) == before:  # else an op whose kernels are listed already
            self.launches.append(str(func).rpartition(".")[0])
        return result


@dataclass
class Bytes:
    """Bytes that went one way between kernels and the memory of one name.

    total: of all active lanes. distinct: of those places that were touched; the rest are repeats.
    """

    total: int = 0
    distinct: int = 0

    @property
    def repeated(self) -> int:
        """Bytes moved again."""
        return self.total - self.distinct


@dataclass
class _Memory:
    """One storage, and which of its bytes were read and written."""

    name: str
    begin: int
    touched: dict[str, np.ndarray] = field(default_factory=dict)  # "read", "written": bool [bytes]

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> _Memory:
        storage = tensor.untyped_storage()
        marks = {way: np.zeros(storage.nbytes(), bool) for way in ("read", "written")}
        return cls(name, storage.data_ptr(), marks)

    def take(self, pointers: np.ndarray) -> np.ndarray:
        """Which of the addresses lie here."""
        return (pointers >= self.begin) & (pointers < self.begin + len(self.touched["read"]))


class Traffic(Launches):
    """A context that counts the bytes which interpreted kernels load and store, by name of the memory.

    Args:
        named: tensors by name; all of a tensor's storage bears the name. Two names may not share a storage.

    Raises:
        RuntimeError: on entering, where kernels are not interpreted.
    """

    def __init__(self, **named: Tensor | Iterable[Tensor]) -> None:
        super().__init__()
        self._memories: list[_Memory] = []
        owners: dict[int, str] = {}
        for name, tensors in named.items():
            for tensor in [tensors] if isinstance(tensors, Tensor) else tensors:
                begin = tensor.untyped_storage().data_ptr()
                if owners.setdefault(begin, name) != name:
                    raise ValueError(f"{name!r} and {owners[begin]!r} share a storage; name it once")
                if not any(m.begin == begin for m in self._memories):
                    self._memories.append(_Memory.of(name, tensor))
        self._totals = {way: dict.fromkeys([*named, OTHER], 0) for way in ("read", "written")}

    def __enter__(self) -> Traffic:
        import triton
        from triton.runtime.interpreter import interpreter_builder

        if not triton.knobs.runtime.interpret:
            raise RuntimeError("bytes are counted in the interpreter: set TRITON_INTERPRET=1 before triton is imported")
        for method, ways, mask_at in (
            ("create_masked_load", ("read",), 1),
            ("create_masked_store", ("written",), 2),
            ("create_atomic_rmw", ("read", "written"), 3),
            ("create_atomic_cas", ("read", "written"), None),
        ):
            make = self._watched(ways, mask_at, pointer_at=1 if method == "create_atomic_rmw" else 0)
            self._open.enter_context(swapped(type(interpreter_builder), method, make))
        super().__enter__()
        return self

    def _watched(self, ways: tuple[str, ...], mask_at: int | None, pointer_at: int) -> Callable[[Any], Any]:
        def make(method: Callable[..., Any]) -> Callable[..., Any]:
            def access(builder: Any, *args: Any, **options: Any) -> Any:
                pointers = args[pointer_at]
                mask = None if mask_at is None else args[mask_at].data
                size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
                for way in ways:
                    self._count(way, pointers.data, mask, size)
                return method(builder, *args, **options)

            return access

        return make

    def _count(self, way: str, pointers: np.ndarray, mask: np.ndarray | None, size: int) -> None:
        active = np.broadcast_to(True if mask is None else mask, pointers.shape)
        left = pointers[active].astype(np.int64)
        for memory in self._memories:
            here = memory.take(left)
            if not here.any():
                continue
            offsets = left[here] - memory.begin
            self._totals[way][memory.name] += len(offsets) * size
            for byte in range(size):
                memory.touched[way][offsets + byte] = True
            left = left[~here]
        self._totals[way][OTHER] += len(left) * size

    def _by_name(self, way: str) -> dict[str, Bytes]:
        found = {name: Bytes(total) for name, total in self._totals[way].items()}
        for memory in self._memories:
            found[memory.name].distinct += int(memory.touched[way].sum())
        return found

    @property
    def read(self) -> dict[str, Bytes]:
        """Bytes loaded, by name; `distinct` of "other" is not known and zero."""
        return self._by_name("read")

    @property
    def written(self) -> dict[str, Bytes]:
        """Bytes stored, by name."""
        return self._by_name("written")
