"""Every op declared once: schema, shape rule, reference on the CPU; kernels register here on CUDA.

`ops.X` is called like `reference.X` and computes the same; it is a `torch.library` op, so that tracers see one node with
known shapes. Ops have no backward: training runs on the `reference` namespace.

A schema knows tensors only. A weight in few bits goes through it as two, its values in the place of the weight and its scales
behind all other arguments, and is one again on the other side: a QuantizedWeight for the reference, a Packed for the kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import extension, reference
from .constants import LOGITS_ALIGN
from .quantized import Format, QuantizedWeight

_LIBRARY = torch.library.Library("gptneo_fast", "DEF")


def _op(schema: str, shape_rule: Callable, on_cuda: Callable | None = None, weights: tuple[str, ...] = ()) -> Callable:
    """Declare one op: its schema, what a fake tensor gives, its reference on the CPU and its kernel on CUDA.

    weights: its arguments that may be in few bits; each has an argument for its scales.
    """
    name = schema.partition("(")[0]
    before, arrow, results = schema.rpartition(") -> ")
    places = tuple(_names(before).index(weight) for weight in weights)
    at = len(_names(before))  # of the first scales
    _LIBRARY.define(before + "".join(f", Tensor? {_scales(weight)}=None" for weight in weights) + arrow + results)
    on_cpu, on_cuda = getattr(reference, name), on_cuda or _launcher(name)
    _LIBRARY.impl(name, _joined(on_cpu, places, at, _quantized) if weights else on_cpu, "CPU")
    _LIBRARY.impl(name, _joined(on_cuda, places, at, _packed) if weights else on_cuda, "CUDA")
    torch.library.register_fake(f"gptneo_fast::{name}", shape_rule, lib=_LIBRARY)
    overload = getattr(torch.ops.gptneo_fast, name).default
    return _taken_apart(overload, places, tuple(map(_scales, weights))) if weights else overload


def _names(schema: str) -> list[str]:
    """Of the arguments of a schema that ends with them."""
    return [argument.split()[-1].partition("=")[0] for argument in schema.partition("(")[2].split(", ")]


def _scales(weight: str) -> str:
    return "scales" if weight in ("weight", "wte") else f"{weight}_scales"


def _taken_apart(overload: Callable, places: tuple[int, ...], names: tuple[str, ...]) -> Callable:
    """The op, whose weights at `places` may be in few bits; `names`: of the arguments that take their scales."""
    place = places[0]

    def call(*args: Any, **keywords: Any) -> Any:
        if len(places) == 1 and (len(args) <= place or isinstance(args[place], Tensor)):
            return overload(*args, **keywords)
        given = list(args)
        for i, name in zip(places, names, strict=True):
            if i < len(given) and not isinstance(weight := given[i], Tensor):
                given[i], keywords[name] = weight.row_by_row()
        return overload(*given, **keywords)

    return call


def _joined(function: Callable, places: tuple[int, ...], at: int, join: Callable) -> Callable:
    """What an op calls: `function`, given weights whose scales came along as one thing each, without further arguments."""

    def call(*args: Any) -> Any:
        if len(args) <= at:
            return function(*args)
        given = list(args[:at])
        for i, scales in zip(places, args[at:], strict=False):
            if scales is not None:
                given[i] = join(given[i], scales, _numbers(given))
        return function(*given)

    return call


def _numbers(args: list[Any]) -> int:
    """Numbers of a row of an op's weight: as its activations or, for embeddings, which have none, the positions' have."""
    return int((args[0] if args[0].is_floating_point() else args[3]).shape[-1])


def _quantized(values: Tensor, scales: Tensor, K: int) -> QuantizedWeight:
    bits = 8 if values.dtype == torch.int8 else 4
    group = values.shape[1] * 2 // scales.shape[1] if bits == 4 else None
    return QuantizedWeight(values, scales, K, Format(bits, group))


def _packed(values: Tensor, scales: Tensor, K: int) -> Any:
    from ..kernels import Packed

    return Packed(values, scales, K)


def _launcher(name: str) -> Callable:
    """The kernel of an op, loaded at its first call: importing the package needs no triton.

    float64 is the oracle's dtype and has no kernels: there the reference computes, on whatever device.
    """
    plain = getattr(reference, name)

    def launch(*args: Any, **keywords: Any) -> Any:
        for x in args:
            if isinstance(x, Tensor) and x.dtype == torch.float64:
                return plain(*(_quantized(*y) if isinstance(y, tuple) else y for y in args), **keywords)  # a Packed
        from .. import kernels

        return getattr(kernels, name)(*args, **keywords)

    return launch


def _append(k_cache: Tensor, *args: Tensor | None, **keywords: Tensor | None) -> None:
    """`kv_append` on CUDA: the extension's kernel where it can run on the device, else the Triton one."""
    ours = extension.why_not_on(k_cache.device) is None
    (extension.kv_append if ours else _launcher("kv_append"))(k_cache, *args, **keywords)  # type: ignore[arg-type]


def _rows(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _heads_merged(q: Tensor, *_: object, **__: object) -> Tensor:
    B, H, T, D = q.shape
    return q.new_empty(B, T, H * D)


def _padded_logits(x: Tensor, nw: Tensor, nb: Tensor, weight: Tensor, eps: float, scales: Tensor | None = None) -> Tensor:
    V = weight.shape[0]
    dtype = torch.promote_types(x.dtype, torch.float32)
    padded = x.new_empty(*x.shape[:-1], V + -V % LOGITS_ALIGN, dtype=dtype)
    return padded.narrow(-1, 0, V)  # indexing would ask a CUDA device to be current, which a fake tensor has not


def _four_numbers(x: Tensor, weight: Tensor, targets: Tensor, scales: Tensor | None = None) -> tuple[Tensor, ...]:
    dtypes = (torch.promote_types(x.dtype, torch.float32), torch.int64)
    return tuple(x.new_empty(len(targets), dtype=dtypes[i == 1]) for i in range(4))


embed = _op(
    "embed(Tensor ids, Tensor position_ids, Tensor wte, Tensor wpe, Tensor? token_type_ids=None) -> Tensor",
    lambda ids, position_ids, wte, wpe, token_type_ids=None, scales=None: wpe.new_empty(*ids.shape, wpe.shape[1]),
    weights=("wte",),
)
layer_norm = _op("layer_norm(Tensor x, Tensor weight, Tensor bias, float eps) -> Tensor", _rows)
norm_linear = _op(
    "norm_linear(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor weight, Tensor bias, float eps, bool gelu) -> Tensor",
    lambda x, nw, nb, weight, bias, eps, gelu, scales=None: x.new_empty(*x.shape[:-1], weight.shape[0]),
    weights=("weight",),
)
norm_qkv = _op(
    "norm_qkv(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor wq, Tensor wk, Tensor wv, float eps)"
    " -> (Tensor, Tensor, Tensor)",
    lambda x, nw, nb, wq, wk, wv, eps, *_, **__: tuple(x.new_empty(*x.shape[:-1], w.shape[0]) for w in (wq, wk, wv)),
    weights=("wq", "wk", "wv"),
)
linear_add = _op(
    "linear_add(Tensor x, Tensor weight, Tensor bias, Tensor residual) -> Tensor",
    lambda x, weight, bias, residual, scales=None: x.new_empty(*x.shape[:-1], weight.shape[0]),
    weights=("weight",),
)
attention = _op(
    "attention(Tensor q, Tensor k, Tensor v, int window, Tensor? starts=None, Tensor? ends=None,"
    " Tensor? k_cache=None, Tensor? v_cache=None, Tensor? lengths=None) -> Tensor",
    _heads_merged,
)
decode_attention = _op(
    "decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, int window, Tensor? starts=None) -> Tensor",
    _heads_merged,
)
kv_append = _op(
    "kv_append(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor lengths, Tensor? starts=None) -> ()",
    lambda *_: None,
    _append,
)
norm_qkv_append = _op(
    "norm_qkv_append(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor wq, Tensor wk, Tensor wv, float eps,"
    " Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor lengths, Tensor? starts=None) -> Tensor",
    lambda x, nw, nb, wq, *_, **__: x.new_empty(*x.shape[:-1], wq.shape[0]),
    weights=("wq", "wk", "wv"),
)
lm_head = _op(
    "lm_head(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor weight, float eps) -> Tensor",
    _padded_logits,
    weights=("weight",),
)
logprob = _op(
    "logprob(Tensor x, Tensor weight, Tensor targets) -> (Tensor, Tensor, Tensor, Tensor)", _four_numbers, weights=("weight",)
)
sample = _op(
    "sample(Tensor logits, Tensor rates, Tensor counts, Tensor flags, Tensor seeds, Tensor(a!)? seen, Tensor(b!) state,"
    " Tensor(c!) out, Tensor(d!) lengths, int method) -> ()",
    lambda *_: None,
)

NAMES = (
    *("embed", "layer_norm", "norm_linear", "norm_qkv", "linear_add", "attention", "decode_attention", "kv_append"),
    *("norm_qkv_append", "lm_head", "logprob", "sample"),
)
