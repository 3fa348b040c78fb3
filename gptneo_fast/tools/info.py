"""What `gptneo-fast info` says: of this machine, and of a model."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from .. import __version__
from ..device import why_no_cuda
from ..network import quantized
from ..network.cache import cache_bytes
from ..ops import backends, extension


def machine() -> dict[str, Any]:
    """Versions, devices, and for each backend whether it can be used and if not why."""

    def version_of(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    devices = [
        f"{torch.cuda.get_device_name(i)} ({torch.cuda.get_device_properties(i).total_memory / 2**30:.0f} GiB)"
        for i in range(torch.cuda.device_count())
    ]
    return {
        "gptneo_fast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "cpu threads": torch.get_num_threads(),
        "cuda devices": ", ".join(devices) or f"none: {why_no_cuda()}",
        **backends.report(),
        "C++ extension": extension.status(),
    }


def model_facts(model: Any) -> dict[str, Any]:
    """Size of a loaded model and of its cache."""
    packed = {id(weight): weight for weight in quantized.weights(model).values()}.values()
    bytes_of: dict[str, int] = {}
    for p in {id(p): p for p in (*model.parameters(), *packed)}.values():
        name = str(getattr(p, "how", p.dtype)).removeprefix("torch.")
        bytes_of[name] = bytes_of.get(name, 0) + p.nbytes
    config, longest = model.config, model.config.max_position_embeddings
    full = 2 * config.num_layers * longest * config.hidden_size * model.dtype.itemsize
    bounded = cache_bytes(config, 1, longest, model.dtype)
    return {
        "name": config.name_or_path,
        "shape": f"{config.num_layers} layers, {config.num_heads} heads x {config.head_dim}, ffn {config.ffn_size}, "
        f"vocabulary {config.vocab_size}, {longest} positions, window {config.window_size}",
        "parameters": f"{model.num_parameters():,}",
        **{f"bytes in {name}": f"{size:,}" for name, size in bytes_of.items()},
        "cache bytes per token": f"{cache_bytes(config, 1, 1, model.dtype):,} within the window",
        f"cache bytes at {longest} tokens": f"{bounded:,} ({bounded / full:.0%} of a cache without bound)",
        "device": str(model.device),
        "backend": str(model.backend),
        "tokenizer": repr(model.tokenizer) if model.tokenizer else "none",
    }
