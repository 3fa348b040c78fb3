"""Linear layers of many rows over copies of the weights in pieces: of halves that a CPU cannot multiply, and of few bits.

Without instructions for a dtype (AMX, AVX512-BF16 and the like) torch multiplies its matrices several times slower than those
of float32. Weights in few bits become the dtype that is multiplied, where a CPU multiplies whole matrices (AMX), faster than
integers are. No backward.
"""

from __future__ import annotations

import platform

import torch
import torch.nn.functional as F
from torch import Tensor

from .quantized import Weight

_PIECE = 1 << 20  # weights that are copied at one time: 4 MB of float32, which a cache holds


def _cannot_multiply(question: str) -> bool:
    asked = getattr(torch.ops.mkldnn, question, None)  # not there in a torch without oneDNN
    return asked is None or not asked()


DTYPES = frozenset(
    dtype
    for dtype, question in ((torch.bfloat16, "_is_mkldnn_bf16_supported"), (torch.float16, "_is_mkldnn_fp16_supported"))
    if _cannot_multiply(question)
)


def _has_matrices() -> bool:
    asked = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return platform.machine().lower() not in ("x86_64", "amd64") or asked is None or asked()


MATRICES = _has_matrices()  # whether halves are multiplied in more than vectors, and so faster than integers are


def linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None = None,
    *,
    gelu: bool = False,
    residual: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """x @ weight.T + bias, then gelu_new, then + residual.

    Products are of float32 where `DTYPES` has the dtype of x, and then all is float32 until it is stored; else of that dtype.

    Args:
        x: [..., K]. weight: [N, K]; in few bits only where the extension is. bias: [N]. residual: [..., N].
        dtype: of the result; None for that of x.

    Returns:
        [..., N]
    """
    N, K = weight.shape
    wide, dtype = x.float() if x.dtype in DTYPES else x, x.dtype if dtype is None else dtype
    step = N if torch.compiler.is_compiling() else max(1, _PIECE // max(1, K))
    if step >= N:
        return _piece(wide, weight, slice(None), bias, gelu, residual).to(dtype)
    out = x.new_empty(*x.shape[:-1], N, dtype=dtype)
    for i in range(0, N, step):
        out[..., i : i + step] = _piece(wide, weight, slice(i, i + step), bias, gelu, residual)
    return out


def _piece(x: Tensor, weight: Weight, columns: slice, bias: Tensor | None, gelu: bool, residual: Tensor | None) -> Tensor:
    """Some columns of the result, in the dtype of x unless the residual's is wider."""
    y = F.linear(x, _copy(weight, columns, x.dtype), None if bias is None else bias[columns].to(x.dtype))
    if gelu and (torch.compiler.is_compiling() or torch.jit.is_tracing()):
        y = F.gelu(y, approximate="tanh")
    elif gelu:
        torch.ops.gptneo_fast_csrc.gelu.default(y)
    return y if residual is None else y + residual[..., columns]


def _copy(weight: Weight, rows: slice, dtype: torch.dtype) -> Tensor:
    """Some rows of a weight in another dtype."""
    if isinstance(weight, Tensor):
        return weight[rows].to(dtype)
    first, last, _ = rows.indices(weight.shape[0])
    out = weight.scales.new_empty(last - first, weight.shape[1], dtype=dtype)
    torch.ops.gptneo_fast_csrc.dequantize.default(*weight.side_by_side(), first, out)
    return out
