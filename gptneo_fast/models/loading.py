"""What `from_pretrained` is asked for, and the model that weights are loaded into."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from ..config import GPTNeoConfig
from ..errors import InputError, UnknownOptionError, nearest

_HARMLESS = (  # ways of loading that mean nothing where weights go straight to their places
    "low_cpu_mem_usage trust_remote_code proxies offload_folder offload_state_dict offload_buffers max_memory resume_download "
    "use_auth_token local_dir_use_symlinks use_cache_dir mirror tp_plan key_mapping weights_only"
).split()
_QUANTISED = ("load_in_8bit", "load_in_4bit", "quantization_config")


def screen(others: dict[str, Any], attn_implementation: str | None, loader: Callable[..., Any]) -> dict[str, Any]:
    """Config overrides among the keywords of `from_pretrained`; what means nothing here is dropped or refused.

    Raises:
        InputError: what is not offered, and what to use instead. UnknownOptionError: no such option; names the nearest.
    """
    check_attention(attn_implementation)
    if asked := [k for k in _QUANTISED if others.get(k)]:
        raise InputError(f"{asked[0]} is not offered; use dtype=torch.bfloat16 or torch.float16")
    for harmless in (*_HARMLESS, *_QUANTISED):
        others.pop(harmless, None)
    if others.get("variant") is None:
        others.pop("variant", None)
    fields = {*GPTNeoConfig.__dataclass_fields__, *GPTNeoConfig.aliases, "num_labels"}
    options = inspect.signature(loader).parameters
    for name in others:
        if name not in fields:
            raise UnknownOptionError(f"from_pretrained has no option {name!r}{nearest(name, {*fields, *options})}")
    return others


def check_attention(attn_implementation: str | None) -> None:
    """Refuse kernels that are not ours.

    Raises:
        InputError: any but "eager", which ours equal.
    """
    if attn_implementation not in (None, "eager"):
        raise InputError(
            f"attn_implementation {attn_implementation!r} is not offered: gptneo_fast brings its own kernels, exact past "
            "the window; leave it out and choose with backend='auto', 'triton' or 'reference'"
        )


def built(cls: Any, config: GPTNeoConfig, backend: str) -> Any:
    """A model to load weights into: without memory where our `__init__` makes it, else as its own `__init__(config)` does."""
    if cls.__init__.__module__.startswith(f"{__package__}."):
        with torch.device("meta"):
            return cls(config, backend=backend)
    model = cls(config)
    model.base_model.requested_backend = backend
    return model
