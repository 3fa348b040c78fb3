"""Which namespace computes: the kernels, or plain torch; chosen from the request, the device, the dtype and gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import ModuleType
from typing import ParamSpec

import torch

from ..errors import GPTNeoFastError, InputError, SetupError, short, warn_once
from . import cpu, extension, ops, reference

BACKENDS = ("auto", "triton", "reference")
_CAPABILITY = (8, 0)
_INSTEAD = "use backend='reference' or 'auto'"
_Args = ParamSpec("_Args")


@dataclass(frozen=True)
class Choice:
    """What computes, and why.

    name: "triton", "cpu" (few rows and attention in C++, the rest in plain torch) or "reference".
    why: the reason, for people.
    functions: the namespace; each op is a function of it, as in `reference`.
    """

    name: str
    why: str
    functions: ModuleType

    def __str__(self) -> str:
        return f"{self.name}: {self.why}"


def check(backend: str) -> None:
    """Refuse a request that no device of this machine can fulfil.

    Raises:
        InputError: no such backend.
        SetupError: kernels were asked for and cannot be had; says why and what to do.
    """
    if backend not in BACKENDS:
        raise InputError(f"backend {short(backend)} is unknown; use one of {', '.join(BACKENDS)}")
    if backend == "triton" and (
        reason := _why_no_kernels() or (_why_not_interpreted() if _interpreted() else _why_no_device())
    ):
        raise SetupError(f"backend='triton': {reason}; {_INSTEAD}")


def choose(backend: str, device: torch.device, dtype: torch.dtype, grad: bool = False) -> Choice:
    """The namespace for a model: kernels on CUDA devices of capability 8.0 and up, interpreted ones where that was asked
    for by TRITON_INTERPRET=1 and backend="triton", and `reference` elsewhere.

    Args:
        backend: "auto", "triton" or "reference".
        device, dtype: of the model.
        grad: whether gradients are required; kernels have no backward.

    Raises:
        InputError: no such backend.
        SetupError: "triton" was asked for and cannot be had; says why and what to do.
    """
    if backend not in BACKENDS:
        raise InputError(f"backend {short(backend)} is unknown; use one of {', '.join(BACKENDS)}")
    if backend == "reference":
        return Choice("reference", "asked for", reference)
    if backend == "auto" and device.type != "cuda":
        where = f"the model is on the {device.type.upper()}"
        reason = "gradients are required" if grad else why_no_extension(device.type)
        return Choice("reference", f"{where}, and {reason}", reference) if reason else Choice("cpu", where, cpu)
    reason = why_not(device.type, device.index or 0, str(dtype).removeprefix("torch."))
    if backend == "triton":
        if grad:
            reason = reason or "kernels have no backward and gradients are required; call under torch.no_grad()"
        if reason:
            raise SetupError(f"backend='triton': {reason}; {_INSTEAD}")
        if device.type == "cuda":
            return Choice("triton", "asked for", ops)
        from .. import kernels

        return Choice("triton", "asked for; the kernels are interpreted", kernels)
    if reason:
        if dtype != torch.float64:
            _warn(f"backend='auto' takes plain torch: {reason}")
        return Choice("reference", reason, reference)
    if grad:
        _warn(
            "backend='auto' takes plain torch because gradients are required and kernels have no backward; "
            "for inference call under torch.no_grad()"
        )
        return Choice("reference", "gradients are required", reference)
    return Choice("triton", "the device can run the kernels", ops)


def early_launches(choice: Choice) -> AbstractContextManager[None]:
    """A context in which kernels of a decode step start before the one before them has ended, and wait by themselves.

    Raises:
        SetupError: no kernels compute; or, from a kernel, the device cannot do it.
    """
    if choice.name != "triton":
        raise SetupError(f"early_launch=True is a way to launch kernels and {choice}; leave it off")
    from ..kernels import launch

    return launch.early_launches()


def gains_by_early_launches(choice: Choice, ids: torch.Tensor) -> bool:
    """Whether a step of these tokens is one that early launches make faster: one row, on a GPU that can."""
    return choice.name == "triton" and ids.is_cuda and ids.numel() == 1 and _starts_early(ids.device)


@functools.cache
def _starts_early(device: torch.device) -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability(device) >= (9, 0)


def _warn(message: str) -> None:
    if not torch.compiler.is_compiling():  # a warning would break the graph
        warn_once(message)


def report() -> dict[str, str]:
    """For each backend whether it can be used on this machine, and if not why."""
    devices = [("cuda", i) for i in range(torch.cuda.device_count())] or [("cpu", 0)]
    lines = {"backend reference": "usable on every device; what 'auto' takes where kernels cannot run"}
    for device, index in devices:
        where = f" on {device}:{index}" if device == "cuda" else ""
        reason = why_not(device, index, "float32")
        usable = "usable; what 'auto' takes" if where else "usable: interpreted, for backend='triton' in float32 and float16"
        lines[f"backend triton{where}"] = f"not usable: {reason}" if reason else usable
    return lines


def _constant_to_tracers(function: Callable[_Args, str]) -> Callable[_Args, str]:
    """Mark as `torch.compiler.assume_constant_result` does, which imports all of torch._dynamo, more than a second, for it."""
    vars(function)["_dynamo_marked_constant"] = True
    return function


@_constant_to_tracers
def why_not(device_type: str, index: int, dtype: str) -> str:
    """Why kernels cannot run on a device in a dtype, or nothing. Tracers see a constant."""
    if reason := _why_no_kernels() or (_why_not_interpreted() if _interpreted() else ""):
        return reason
    if dtype == "float64":
        return "kernels compute in float32, float16 and bfloat16, not in float64"
    if dtype == "bfloat16" and _interpreted():
        return "the Triton interpreter (TRITON_INTERPRET=1) computes bfloat16 wrong; take float32 or float16"
    if device_type == "cuda":
        return _why_not_on(index)
    if device_type == "cpu" and _interpreted():
        return ""
    return (
        f"kernels run on CUDA devices and the model is on the {device_type.upper()}; move it to 'cuda', or set "
        "TRITON_INTERPRET=1 before Python starts to have them interpreted on the CPU (slow; for checking)"
    )


@_constant_to_tracers
def why_no_extension(device_type: str) -> str:
    """Why the C++ extension cannot serve a device, or nothing. Tracers see a constant."""
    return extension.why_not_on(torch.device(device_type)) or ""


def _interpreted() -> bool:
    """Whether the kernels of this process are interpreted. Only after `_why_no_kernels` found nothing."""
    from ..kernels.launch import INTERPRETED

    return INTERPRETED


@functools.cache
def _why_no_kernels() -> str:
    """Why the kernels of this installation cannot be loaded, or nothing."""
    try:
        import triton
    except Exception as error:  # a broken build raises whatever it likes
        return f"triton cannot be imported ({type(error).__name__}: {error}); pip install {_pinned_triton()!r}"
    try:
        from .. import kernels
    except Exception as error:
        return f"triton {triton.__version__} cannot load the kernels ({error}); pip install {_pinned_triton()!r}"
    missing = [name for name in ops.NAMES if not hasattr(kernels, name)]
    return f"this version has no kernel for {', '.join(missing)}" if missing else ""


def _pinned_triton() -> str:
    """The requirement for triton that this torch states, or ours."""
    from importlib.metadata import PackageNotFoundError, requires

    try:
        stated = [r for r in requires("torch") or () if r.startswith("triton")]
    except PackageNotFoundError:
        stated = []
    return stated[0].partition(";")[0].strip() if stated else "triton>=3.6"


def _why_not_interpreted() -> str:
    """Why this interpreter cannot run the kernels, or nothing."""
    import numpy as np
    import triton

    old, new = (tuple(map(int, version.split(".")[:2])) for version in (triton.__version__, np.__version__))
    if old >= (3, 7) or new < (2, 4):
        return ""
    return (  # it counts loops by int() of arrays of one element, which that numpy refuses
        f"the interpreter (TRITON_INTERPRET=1) of triton {triton.__version__} fails with numpy {np.__version__}; "
        "pip install 'numpy<2.4' or 'triton>=3.7'"
    )


def _why_no_device() -> str:
    from ..device import why_no_cuda

    return "" if torch.cuda.is_available() else f"{why_no_cuda()}, and kernels run on CUDA devices"


@functools.cache
def _why_not_on(index: int) -> str:
    """Why a CUDA device cannot run kernels, or nothing; found by running one."""
    if reason := _why_no_device():
        return reason
    name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
    if capability < _CAPABILITY:
        return (
            f"{name} has compute capability {'.'.join(map(str, capability))} and kernels need "
            f"{'.'.join(map(str, _CAPABILITY))}; plain torch in float32 or float16 works there"
        )
    from .. import kernels

    x = torch.ones(1, 16, device=f"cuda:{index}")
    try:  # no C compiler, no Python.h, a driver older than this triton's code: they show at the first launch only
        kernels.layer_norm(x, x[0], x[0], 1e-5)
    except GPTNeoFastError:
        raise
    except Exception as error:
        return f"triton cannot run a kernel on {name} ({type(error).__name__}: {str(error).strip()[:300]})"
    return ""
