"""Launch Triton kernels on tensors that do not exist, for a GPU that is not there: each launch is compiled, none runs.

    with Launchpad(90) as pad, FakeTensorMode():
        kernels.layer_norm(torch.empty(2048, 768, device="cuda"), ...)
    pad.launches[0].binary              # the cubin that an H100 would have run

The launcher decides about kernel, grid, tiles and options as it does on a GPU, so that what is measured here is what runs
there. Needs a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from benchmarks.static.counting import swapped


@dataclass(frozen=True)
class Chip:
    """What limits how many warps an SM holds. sms: multiprocessors; registers, shared: of one SM; shared in bytes."""

    sms: int
    shared: int
    block_shared: int  # the most that one block may have
    warps: int = 64
    blocks: int = 32
    registers: int = 65536


CHIPS = {80: Chip(108, 164 * 1024, 163 * 1024), 90: Chip(132, 228 * 1024, 227 * 1024)}  # A100, H100


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel, compiled.

    op: which the launcher was doing, where `Launchpad.during` says so.
    grid: blocks. warps: of a block. shared: bytes of dynamic and static shared memory. binary: the cubin.
    ptx: the text it was assembled from. arguments: names of its parameters in order, members of a tuple as "w_ptrs.0".
    options: what the launcher set the tiles to. fault: why the compiler refused it, or nothing; then there is no binary.
    """

    op: str
    kernel: str
    grid: tuple[int, ...]
    warps: int
    shared: int
    binary: bytes
    ptx: str
    arguments: tuple[str, ...]
    options: dict[str, Any]
    fault: str = ""


class _Pointer:
    """What a launch needs of a tensor: its dtype and an address, aligned as the allocator would have it."""

    def __init__(self, tensor: Tensor) -> None:
        self.dtype = tensor.dtype
        self._address = (1 << 40) + tensor.storage_offset() * tensor.element_size()

    def data_ptr(self) -> int:
        return self._address


class _Driver:
    """The parts of Triton's driver that compiling a launch asks for. The device number is the capability."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0


class _Functions(TorchFunctionMode):
    """What torch cannot do on fake CUDA tensors, because it asks for a current device: indexing by slices and integers,
    copies into them, results into given memory. There are no values, so that memory which exists is all there is to it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.__setitem__, Tensor.copy_):
            return args[0]
        if isinstance((out := (kwargs or {}).get("out")), Tensor):
            return out
        if func is not Tensor.__getitem__ or args[0].device.type != "cuda":
            return func(*args, **(kwargs or {}))
        x, index = args
        index = index if isinstance(index, tuple) else (index,)
        if Ellipsis in index:
            at = index.index(Ellipsis)
            rest = x.dim() - sum(i is not None for i in index) + 1
            index = (*index[:at], *[slice(None)] * rest, *index[at + 1 :])
        dim = 0
        for i in index:
            if isinstance(i, int):
                x = torch.select(x, dim, i)
                continue
            x = torch.unsqueeze(x, dim) if i is None else torch.ops.aten.slice(x, dim, i.start, i.stop, i.step or 1)
            dim += 1
        return x


class Launchpad:
    """A context in which launches on fake CUDA tensors compile for a capability (80, 90) and are kept in `launches`.

    Raises:
        RuntimeError: on entering, where kernels are interpreted.
    """

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self.launches: list[Launch] = []
        self._op = ""
        self._open = contextlib.ExitStack()

    def during(self, op: str, launcher: Callable[..., Any]) -> Callable[..., Any]:
        """The launcher, its launches marked with the name of an op."""

        def call(*args: Any, **kwargs: Any) -> Any:
            before, self._op = self._op, op
            try:
                return launcher(*args, **kwargs)
            finally:
                self._op = before

        return call

    def __enter__(self) -> Launchpad:
        import triton
        from triton.runtime.driver import driver
        from triton.runtime.jit import JITFunction

        from gptneo_fast.kernels import launch

        if triton.knobs.runtime.interpret:
            raise RuntimeError("interpreted kernels cannot be compiled: start a process without TRITON_INTERPRET")
        chip, major, minor = CHIPS[self.capability], *divmod(self.capability, 10)
        properties = SimpleNamespace(
            multi_processor_count=chip.sms, major=major, minor=minor, shared_memory_per_block_optin=chip.block_shared
        )
        for name, value in (  # what a launcher may ask torch about the device
            ("device", contextlib.nullcontext),
            ("get_device_properties", lambda device=None: properties),
            ("get_device_capability", lambda device=None: (major, minor)),
            ("current_device", lambda: 0),
            ("is_current_stream_capturing", lambda: False),
        ):
            self._open.enter_context(swapped(torch.cuda, name, lambda _, value=value: value))
        self._open.enter_context(swapped(driver, "_active", lambda _: _Driver(self.capability)))
        self._open.enter_context(swapped(JITFunction, "run", self._compiled))
        self._open.enter_context(_Functions())
        launch.forget_devices()
        self._open.callback(launch.forget_devices)
        return self

    def __exit__(self, *reason: Any) -> None:
        self._open.close()

    def _compiled(self, run: Any) -> Any:
        def launch(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
            values = dict(zip(kernel.arg_names, args, strict=False)) | options
            blocks = tuple(grid(values) if callable(grid) else grid)
            constants = {p.name for p in kernel.params if p.is_constexpr}
            shown = {k: v for k, v in values.items() if k in constants and isinstance(v, (int, str))}
            try:
                compiled = run(kernel, *map(_as_pointer, args), grid=grid, warmup=True, **_as_pointers(options))
            except Exception as error:  # the compiler raises whatever it likes; a report goes on to the next kernel
                fault = f"{type(error).__name__}: {' '.join(str(error).split())[-300:]}"
                self.launches.append(Launch(self._op, kernel.__name__, blocks, 0, 0, b"", "", (), shown, fault))
                return
            meta, asm = compiled.metadata, compiled.asm
            shown |= {"num_stages": meta.num_stages}
            names = tuple(name for item in compiled.src.signature.items() for name in _flat(*item))
            made = (meta.num_warps, meta.shared, asm["cubin"], asm["ptx"], names)
            self.launches.append(Launch(self._op, kernel.__name__, blocks, *made, shown))

        return launch


def _as_pointer(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_as_pointer, value))
    return _Pointer(value) if isinstance(value, Tensor) else value


def _flat(name: str, kind: Any) -> Iterator[str]:
    """The names of what an argument becomes in PTX: members of a tuple are numbered, constants are none."""
    if isinstance(kind, tuple):
        for i, member in enumerate(kind):
            yield from _flat(f"{name}.{i}", member)
    elif kind != "constexpr":
        yield name


def _as_pointers(values: dict[str, Any]) -> dict[str, Any]:
    return {k: _as_pointer(v) for k, v in values.items()}


@dataclass(frozen=True)
class Machine:
    """What the assembler made of a kernel.

    registers: of a thread. stack: bytes of a thread. spills: instructions that load or store local memory.
    loads: bytes that the load instructions of global memory fetch a thread, by width of the load in bits.
    tensor_cores: "HGMMA", "HMMA" or "".
    """

    registers: int
    stack: int
    spills: int
    loads: dict[int, int]
    tensor_cores: str


def vector_share(loads: Mapping[int, int]) -> float | None:
    """Share of the bytes, given by width in bits, that come 128 bits at a time; None where nothing is loaded."""
    return loads.get(128, 0) / sum(loads.values()) if loads else None


_LOAD = re.compile(r"\b(?:LDG|LDGSTS)\.([A-Z0-9.]+)")


def inspect(binary: bytes) -> Machine:
    """Disassemble a cubin with the tools that Triton brings."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary)
        usage = tool("cuobjdump", "-res-usage", str(path))
        code = tool("nvdisasm", "-c", str(path))
    found = {k: int(v) for k, v in re.findall(r"\b(REG|STACK):(\d+)", usage)}
    loads: Counter[int] = Counter()
    for modifiers in _LOAD.findall(code):
        bits = width(modifiers.split("."))
        loads[bits] += bits // 8
    return Machine(
        registers=found["REG"],
        stack=found["STACK"],
        spills=len(re.findall(r"\b(?:LDL|STL)\b", code)),
        loads=dict(loads),
        tensor_cores=next((name for name in ("HGMMA", "HMMA") if re.search(rf"\b{name}\b", code)), ""),
    )


def width(modifiers: list[str]) -> int:
    """Bits that a load fetches: 32 where no modifier says otherwise."""
    return next((int(m.lstrip("US")) for m in modifiers if m in ("128", "64", "U16", "S16", "U8", "S8")), 32)


@functools.cache
def _path(tool: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool)


def tool(name: str, *args: str) -> str:
    done = subprocess.run([_path(name), *args], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} failed: {done.stderr.strip()[:300]}")
    return done.stdout


def warps_per_sm(capability: int, registers: int, warps: int, shared: int) -> int:
    """Warps that an SM holds at one time (CUDA C++ programming guide, compute capabilities)."""
    chip = CHIPS[capability]
    by_registers = chip.registers // (-(-registers * 32 // 256) * 256) // warps  # registers go to warps in lots of 256
    by_shared = chip.shared // (-(-shared // 1024) * 1024 + 1024)  # a block reserves 1 KB for the system
    return min(by_registers, by_shared, chip.blocks, chip.warps // warps) * warps


def digest(binary: bytes) -> str:
    """A name for a binary."""
    return hashlib.sha256(binary).hexdigest()[:16]


def versions() -> str:
    """What compiles the kernels."""
    import triton

    return f"triton {triton.__version__}, torch {torch.__version__.partition('+')[0]}"
