"""The ops on the CPU for inference: linear layers of a few rows through the extension, the reference for the rest.

A linear layer of one row reads its weight once and does nothing else worth the name; `csrc/linear_cpu.cpp` does so at the
rate of the memory. Same names, arguments and results as in `reference`; no backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import extension, reference
from .reference import attention, decode_attention, embed, kv_append, layer_norm, sample

_ROWS = 4  # of x that the extension takes; a blocked GEMM reads weights seldom enough with more
_INPUT = 8192  # numbers of x, which stay in the first-level cache
_DTYPES = (torch.float32, torch.bfloat16)

__all__ = [
    "attention",
    "decode_attention",
    "embed",
    "kv_append",
    "layer_norm",
    "linear_add",
    "lm_head",
    "norm_linear",
    "norm_qkv",
    "norm_qkv_append",
    "sample",
]


def _takes(x: Tensor, weight: Tensor) -> bool:
    """Whether the extension computes this layer."""
    return (
        0 < x.numel() <= min(_INPUT, _ROWS * weight.shape[1])
        and x.dtype is weight.dtype
        and x.dtype in _DTYPES
        and x.is_contiguous()
        and weight.is_contiguous()
    )


def _linear(x: Tensor, weight: Tensor, *others: Tensor | float | bool | None) -> Tensor:
    return torch.ops.gptneo_fast_csrc.linear.default(x, weight, *others)


def norm_linear(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor, eps: float, gelu: bool
) -> Tensor:
    """As `reference.norm_linear`."""
    if _takes(x, weight):
        return _linear(x, weight, bias, None, norm_weight, norm_bias, eps, gelu)
    return reference.norm_linear(x, norm_weight, norm_bias, weight, bias, eps, gelu)


def norm_qkv(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.norm_qkv`."""
    if _takes(x, wq):
        q, k, v = (_linear(x, w, None, None, norm_weight, norm_bias, eps, False) for w in (wq, wk, wv))
        return q, k, v
    return reference.norm_qkv(x, norm_weight, norm_bias, wq, wk, wv, eps)


def norm_qkv_append(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    wq: Tensor,
    wk: Tensor,
    wv: Tensor,
    eps: float,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    starts: Tensor | None = None,
) -> Tensor:
    """As `reference.norm_qkv_append`."""
    q, k, v = norm_qkv(x, norm_weight, norm_bias, wq, wk, wv, eps)
    k, v = (t.unflatten(-1, (k_cache.shape[1], -1)).transpose(1, 2) for t in (k, v))  # [B, H, T, D]
    extension.kv_append(k_cache, v_cache, k, v, lengths, starts)
    return q


def linear_add(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    """As `reference.linear_add`."""
    if _takes(x, weight) and residual.is_contiguous() and residual.dtype is x.dtype:
        return _linear(x, weight, bias, residual, None, None, 0.0, False)
    return reference.linear_add(x, weight, bias, residual)


def lm_head(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `reference.lm_head`, without its padding, which only kernels want."""
    if _takes(x, weight):
        return _linear(x, weight, None, None, norm_weight, norm_bias, eps, False).float()
    return reference.lm_head(x, norm_weight, norm_bias, weight, eps)
