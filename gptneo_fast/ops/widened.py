"""Linear layers of many rows in half precision on a CPU that cannot multiply it: over float32 copies of the weights, in pieces.

Without instructions for a dtype (AMX, AVX512-BF16 and the like) torch multiplies its matrices several times slower than those
of float32. No backward.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_PIECE = 1 << 20  # weights that are float32 at one time: 4 MB, which a cache holds


def _cannot_multiply(question: str) -> bool:
    asked = getattr(torch.ops.mkldnn, question, None)  # not there in a torch without oneDNN
    return asked is None or not asked()


DTYPES = frozenset(
    dtype
    for dtype, question in ((torch.bfloat16, "_is_mkldnn_bf16_supported"), (torch.float16, "_is_mkldnn_fp16_supported"))
    if _cannot_multiply(question)
)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    gelu: bool = False,
    residual: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """x @ weight.T + bias, then gelu_new, then + residual, in float32 until it is stored.

    Args:
        x: [..., K]. weight: [N, K]. bias: [N]. residual: [..., N].
        dtype: of the result; None for that of x.

    Returns:
        [..., N]
    """
    N, K = weight.shape
    out = x.new_empty(*x.shape[:-1], N, dtype=x.dtype if dtype is None else dtype)
    wide, step = x.float(), N if torch.compiler.is_compiling() else max(1, _PIECE // max(1, K))
    for i in range(0, N, step):
        columns = slice(i, i + step)
        y = F.linear(wide, weight[columns].float(), None if bias is None else bias[columns].float())
        y = F.gelu(y, approximate="tanh") if gelu else y
        out[..., columns] = y if residual is None else y + residual[..., columns]
    return out
