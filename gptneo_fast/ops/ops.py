"""Every op declared once: schema, shape rule, reference on the CPU; kernels register here on CUDA.

`ops.X` is called like `reference.X` and computes the same; it is a `torch.library` op, so that tracers see one node with
known shapes. Ops have no backward: training runs on the `reference` namespace.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import extension, reference
from .constants import LOGITS_ALIGN

_LIBRARY = torch.library.Library("gptneo_fast", "DEF")


def _op(schema: str, shape_rule: Callable, on_cuda: Callable | None = None) -> Callable:
    """Declare one op: its schema, what a fake tensor gives, its reference on the CPU and its kernel on CUDA."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, getattr(reference, name), "CPU")
    _LIBRARY.impl(name, on_cuda or _launcher(name), "CUDA")
    torch.library.register_fake(f"gptneo_fast::{name}", shape_rule, lib=_LIBRARY)
    return getattr(torch.ops.gptneo_fast, name).default


def _launcher(name: str) -> Callable:
    """The kernel of an op, loaded at its first call: importing the package needs no triton.

    float64 is the oracle's dtype and has no kernels: there the reference computes, on whatever device.
    """
    plain = getattr(reference, name)

    def launch(*args: Any, **keywords: Any) -> Any:
        for x in args:
            if isinstance(x, Tensor) and x.dtype == torch.float64:
                return plain(*args, **keywords)
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


def _padded_logits(x: Tensor, nw: Tensor, nb: Tensor, weight: Tensor, eps: float) -> Tensor:
    V = weight.shape[0]
    dtype = torch.promote_types(x.dtype, torch.float32)
    padded = x.new_empty(*x.shape[:-1], V + -V % LOGITS_ALIGN, dtype=dtype)
    return padded.narrow(-1, 0, V)  # indexing would ask a CUDA device to be current, which a fake tensor has not


def _four_numbers(x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    dtypes = (torch.promote_types(x.dtype, torch.float32), torch.int64)
    return tuple(x.new_empty(len(targets), dtype=dtypes[i == 1]) for i in range(4))


embed = _op(
    "embed(Tensor ids, Tensor position_ids, Tensor wte, Tensor wpe, Tensor? token_type_ids=None) -> Tensor",
    lambda ids, position_ids, wte, wpe, token_type_ids=None: wte.new_empty(*ids.shape, wte.shape[1]),
)
layer_norm = _op("layer_norm(Tensor x, Tensor weight, Tensor bias, float eps) -> Tensor", _rows)
norm_linear = _op(
    "norm_linear(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor weight, Tensor bias, float eps, bool gelu) -> Tensor",
    lambda x, nw, nb, weight, bias, eps, gelu: x.new_empty(*x.shape[:-1], weight.shape[0]),
)
norm_qkv = _op(
    "norm_qkv(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor wq, Tensor wk, Tensor wv, float eps)"
    " -> (Tensor, Tensor, Tensor)",
    lambda x, nw, nb, wq, wk, wv, eps: tuple(x.new_empty(*x.shape[:-1], w.shape[0]) for w in (wq, wk, wv)),
)
linear_add = _op(
    "linear_add(Tensor x, Tensor weight, Tensor bias, Tensor residual) -> Tensor",
    lambda x, weight, bias, residual: x.new_empty(*x.shape[:-1], weight.shape[0]),
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
)
lm_head = _op("lm_head(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor weight, float eps) -> Tensor", _padded_logits)
logprob = _op("logprob(Tensor x, Tensor weight, Tensor targets) -> (Tensor, Tensor, Tensor, Tensor)", _four_numbers)
sample = _op(
    "sample(Tensor logits, Tensor rates, Tensor counts, Tensor flags, Tensor seeds, Tensor(a!)? seen, Tensor(b!) state,"
    " Tensor(c!) out, Tensor(d!) lengths, int method) -> ()",
    lambda *_: None,
)

NAMES = (
    *("embed", "layer_norm", "norm_linear", "norm_qkv", "linear_add", "attention", "decode_attention", "kv_append"),
    *("norm_qkv_append", "lm_head", "logprob", "sample"),
)
