"""Devices and dtypes by name, and why one cannot be had on this machine."""

from __future__ import annotations

import os
from typing import Any

import torch

from .errors import DeviceError, InputError, short

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}


def as_dtype(dtype: torch.dtype | str) -> torch.dtype | None:
    """A torch dtype from itself or its name; None for "auto".

    Raises:
        InputError: not a floating-point dtype that models run in.
    """
    if dtype == "auto":
        return None
    found = _DTYPES.get(str(dtype).removeprefix("torch.")) if isinstance(dtype, (str, torch.dtype)) else None
    if found is None:
        raise InputError(f"dtype {short(dtype)} is unknown; use 'auto', {', '.join(_DTYPES)}")
    return found


def as_device(device: Any) -> torch.device:
    """One device from a device, its name, "auto", or a `device_map` with one entry for the whole model.

    Raises:
        InputError: a map that splits the model.
        DeviceError: a device that is not there, with the reason; or "meta".
    """
    if isinstance(device, dict):
        if len(set(device.values())) != 1:
            raise InputError(f"device_map {short(device)} splits the model; give one device, or {{'': device}}")
        device = next(iter(device.values()))
    if device is None:
        return torch.device("cpu")
    if device in ("auto", "balanced", "sequential"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"device {short(device)} is unknown; use 'cpu', 'cuda', 'cuda:1', ...") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise DeviceError(f"device {str(found)!r} was asked for, but {why_no_cuda()}; use device='cpu'")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise DeviceError(f"device {str(found)!r} was asked for, but there are {torch.cuda.device_count()} CUDA devices")
    if found.type == "meta":
        raise DeviceError("device 'meta' has no memory for weights; use 'cpu' or 'cuda'")
    if found.type not in ("cpu", "cuda"):
        try:
            torch.empty(0, device=found)
        except (RuntimeError, AssertionError) as error:  # NotImplementedError is one
            reason = str(error).partition("\n")[0].partition(". ")[0]
            raise DeviceError(f"device {str(found)!r} was asked for, but torch has none here ({reason}); use 'cpu'") from error
    return found


def why_no_cuda() -> str:
    """The reason that torch sees no CUDA device."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return 'CUDA_VISIBLE_DEVICES="" hides every device'
    return "torch finds no NVIDIA driver or device"
