"""LayerNorm of rows: one pass over memory, two passes over registers."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .blocks import moments

_ELEMENTS_PER_WARP = 512  # 16 a thread: two 16-byte loads in 16 bits


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last axis with biased variance, statistics in float32.

    Args:
        x: [..., C]. weight, bias: [C].

    Returns:
        [..., C]

    Raises:
        InputError, SetupError: see `launch.check`.
    """
    launch.check("layer_norm", x, weight=weight, bias=bias)
    C = x.shape[-1]
    launch.expect("layer_norm", like=x, weight=(weight, (C,)), bias=(bias, (C,)))
    rows = launch.as_rows(x)
    y = launch.empty(tuple(x.shape), x)
    BLOCK_C = max(16, launch.power_of_2(C))
    num_warps = min(16, max(1, BLOCK_C // _ELEMENTS_PER_WARP))
    launch.run(_layer_norm_kernel, rows.shape[0], x, rows, weight, bias, y, C, eps, BLOCK_C=BLOCK_C, num_warps=num_warps)
    return y


@triton.jit
def _layer_norm_kernel(x_ptr, weight_ptr, bias_ptr, y_ptr, C, eps, BLOCK_C: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offs_c = tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    x = tl.load(x_ptr + row * C + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    mean, squares, _ = moments((x,), (mask_c,), C, 0)
    rstd = tl.rsqrt(squares / C + eps)
    weight = tl.load(weight_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    y = tl.where(mask_c, x - mean, 0.0) * rstd * weight + bias  # as `moments` has it already
    tl.store(y_ptr + row * C + offs_c, y.to(y_ptr.dtype.element_ty), mask=mask_c)
