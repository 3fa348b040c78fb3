"""What `from_pretrained` is asked for, and the model that weights are loaded into."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .. import checkpoint
from ..config import GPTNeoConfig
from ..errors import InputError, UnknownOptionError, nearest, short, warn_once
from ..files.hub import Source

if TYPE_CHECKING:
    from ..checkpoint.weight_file import Stored

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
        raise InputError(f"{asked[0]} is not offered; use quantize='int8' or 'int4', or dtype=torch.bfloat16")
    for harmless in (*_HARMLESS, *_QUANTISED):
        others.pop(harmless, None)
    for name in ("variant", "from_tf"):
        if not others.get(name):
            others.pop(name, None)
    fields = GPTNeoConfig.keywords()
    options = inspect.signature(loader).parameters
    for name in others:
        if name not in fields:
            raise UnknownOptionError(f"from_pretrained has no option {name!r}{nearest(name, {*fields, *options})}")
    return others


def origin(
    name: Any, config: GPTNeoConfig | None, state_dict: Any, overrides: dict[str, Any], **where: Any
) -> tuple[Source | None, GPTNeoConfig]:
    """Where weights come from, None for the state dict; and the configuration, with its overrides.

    Raises:
        InputError: config is none, or weights come from nowhere or from two places.
    """
    config = None if config is None else GPTNeoConfig.like(config)
    if name is not None and state_dict is not None:
        raise InputError(f"weights come from {short(name)} or from state_dict; give None in place of the one")
    if name is None and (config is None or state_dict is None):
        lacks = "config" if config is None else "state_dict"
        raise InputError(f"the model's name is None and {lacks}, too; give a folder or a hub id, or both config and state_dict")
    source = None if name is None else Source.of(name, **where)
    if config is not None:
        return source, config.replace(**overrides)
    assert source is not None
    return source, GPTNeoConfig.from_source(source, **overrides)


@contextmanager
def opened(
    source: Source | None,
    state_dict: Mapping[str, Tensor] | None,
    use_safetensors: bool | None,
    allow_pickle: bool,
    from_flax: bool,
) -> Iterator[list[Stored]]:
    """The tensors of a checkpoint, or of a state dict where there is no checkpoint."""
    if source is None:
        yield checkpoint.held(state_dict or {})
        return
    with source.reading(), checkpoint.find(source, use_safetensors, allow_pickle, from_flax).open() as tensors:
        yield tensors


def check_attention(attn_implementation: object, live: bool = False) -> None:
    """Refuse kernels that are not ours.

    Args:
        live: the model is built, where transformers takes "sdpa", too, and warns that this changes nothing.

    Raises:
        InputError: any but "eager", which ours equal.
    """
    if live and isinstance(attn_implementation, dict):  # parts of a model -> kernels; "" for the whole
        attn_implementation = attn_implementation.get("")
    if live and attn_implementation == "sdpa":
        warn_once("set_attn_implementation('sdpa') changes nothing: gptneo_fast brings its own kernels, see model.backend")
    elif attn_implementation not in (None, "eager"):
        raise InputError(
            f"attn_implementation {short(attn_implementation)} is not offered: gptneo_fast brings its own kernels, exact past "
            "the window; leave it out and choose with backend='auto', 'triton' or 'reference'"
        )


class _Blank(TorchFunctionMode):
    """Parameters are made in a dtype, of this thread alone, and functions of torch.nn.init do nothing: of tensors without
    memory, normal_ imports all of torch._dynamo, over a second."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        if func is torch.empty:
            kwargs = kwargs | {"dtype": kwargs.get("dtype") or self.dtype}
        return func(*args, **kwargs)


@contextmanager
def default_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    """Tensors are made in this dtype by themselves, in every thread; None changes nothing."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def own_arguments(cls: Any, others: dict[str, Any]) -> dict[str, Any]:
    """Keywords that an `__init__` of somebody's own names, out of those of `from_pretrained`."""
    if cls.__init__.__module__.startswith(f"{__package__}."):
        return {}
    names = inspect.signature(cls.__init__).parameters.keys() - {*GPTNeoConfig.keywords(), "config"}
    return {name: others.pop(name) for name in list(others) if name in names}


def built(cls: Any, config: GPTNeoConfig, backend: str, dtype: torch.dtype | None, own: Mapping[str, Any]) -> Any:
    """A model to load weights into: without memory where our `__init__` makes it, else as its own `__init__` does, which may
    give a tensor another dtype."""
    if cls.__init__.__module__.startswith(f"{__package__}."):
        with torch.device("meta"), _Blank(dtype):
            return cls(config, backend=backend)
    with default_dtype(dtype):
        model = cls(config, **own)
    model.base_model.requested_backend = backend
    model.tie_weights()
    return model
