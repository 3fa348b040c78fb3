"""The ops that multiply rows with weights, and which kernel takes them:

    rows     kernel     normalised by         launches
    1        `gemv`     every program         1
    2-16     `skinny`   every program         1
    17-64    `skinny`   `layer_norm` before   2, without a norm 1
    more     `gemm`     `layer_norm` before   2, without a norm 1

More rows in 16 bits of `norm_linear` go to cuBLASLt on a GPU; of `lm_head`, all but one go to `skinny`. Weights in few bits
(`packed`) have their own `gemv` and are a variant of the other two; beyond 512 rows they are unpacked before, a launch more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gptneo_fast.ops.constants import LOGITS_ALIGN

from . import append, gemm, gemv, launch, norms, packed, skinny
from .packed import Weight


def norm_linear(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Weight, bias: Tensor, eps: float, gelu: bool
) -> Tensor:
    """LayerNorm, linear, and with `gelu` gelu_new (Hendrycks and Gimpel 2016, section 2).

    Many rows are two kernels: `layer_norm`, then a product with bias and gelu in its epilogue. In 16 bits that is cuBLASLt's
    on a GPU; in float32, where the library may take TF32 or an approximate gelu, and where kernels are interpreted it is
    `gemm`.

    Args:
        x: [..., C]. norm_weight, norm_bias: [C].
        weight: [F, C]. bias: [F].

    Returns:
        [..., F]

    Raises:
        InputError, SetupError: see `launch.check`.
    """
    weight = packed.of("norm_linear", "weight", weight, x)
    launch.check("norm_linear", x, norm_weight=norm_weight, norm_bias=norm_bias, weight=weight, bias=bias)
    C, F = x.shape[-1], weight.shape[0]
    launch.expect("norm_linear", like=x, norm_weight=(norm_weight, (C,)), norm_bias=(norm_bias, (C,)))
    launch.expect("norm_linear", like=x, weight=(weight, (F, C)), bias=(bias, (F,)))
    rows = launch.as_rows(x)
    y = launch.empty((*x.shape[:-1], F), x)
    if rows.shape[0] <= skinny.MOST_ROWS:
        norm = (norm_weight, norm_bias, eps)
        _few_rows("norm_linear", rows, (weight,), y.view(-1, F), norm=norm, bias=bias, gelu=gelu)
        return y
    rows = norms.layer_norm(rows, norm_weight, norm_bias, eps)
    if launch.INTERPRETED or rows.dtype == torch.float32 or gemm.stays_packed(weight, len(rows)):
        gemm.run(rows, (weight,), (y,), bias=bias, gelu=gelu)
    else:
        by_library(rows, packed.unpacked(weight, x), bias, gelu, y.view(-1, F))
    return y


def norm_qkv(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, wq: Weight, wk: Weight, wv: Weight, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm and the three projections, which have no bias, in two launches.

    The weights stay three parameters: a program picks one by its number.

    Args:
        x: [..., C]. norm_weight, norm_bias: [C]. wq, wk, wv: [C, C].

    Returns:
        Three of [..., C].

    Raises:
        InputError, SetupError: see `launch.check`.
    """
    wq, wk, wv = _three("norm_qkv", x, wq, wk, wv)
    launch.check("norm_qkv", x, norm_weight=norm_weight, norm_bias=norm_bias, wq=wq, wk=wk, wv=wv)
    C = x.shape[-1]
    launch.expect("norm_qkv", like=x, norm_weight=(norm_weight, (C,)), norm_bias=(norm_bias, (C,)))
    launch.expect("norm_qkv", like=x, **{name: (w, (wq.shape[0], C)) for name, w in (("wq", wq), ("wk", wk), ("wv", wv))})
    rows = launch.as_rows(x)
    q, k, v = (launch.empty((*x.shape[:-1], wq.shape[0]), x) for _ in range(3))
    gemm.run(norms.layer_norm(rows, norm_weight, norm_bias, eps), (wq, wk, wv), (q, k, v))
    return q, k, v


def norm_qkv_append(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    wq: Weight,
    wk: Weight,
    wv: Weight,
    eps: float,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    starts: Tensor | None = None,
) -> Tensor:
    """LayerNorm and the three projections; k and v go straight into the slots of their tokens.

    Of many rows it is `norm_qkv`, then `kv_append`.

    Args:
        x: [B, T, C]. norm_weight, norm_bias: [C]. wq, wk, wv: [C, C].
        k_cache, v_cache: [B, H, R, D], changed.
        lengths: int32 [B], tokens held before. starts: int32 [B], columns of left padding; None for none.

    Returns:
        q: [B, T, C]

    Raises:
        InputError, SetupError: see `launch.check`.
    """
    wq, wk, wv = _three("norm_qkv_append", x, wq, wk, wv)
    launch.check(
        "norm_qkv_append", x, norm_weight=norm_weight, norm_bias=norm_bias, wq=wq, wk=wk, wv=wv, k_cache=k_cache,
        v_cache=v_cache,
    )  # fmt: skip
    rows = launch.as_rows(x)
    if rows.shape[0] > skinny.MOST_ROWS:
        q, k, v = norm_qkv(x, norm_weight, norm_bias, wq, wk, wv, eps)
        k, v = (t.unflatten(-1, (k_cache.shape[1], k_cache.shape[3])).transpose(1, 2) for t in (k, v))
        append.kv_append(k_cache, v_cache, k, v, lengths, starts)
        return q
    q = launch.empty((*x.shape[:-1], wq.shape[0]), x)
    cache = append.Cache(k_cache, v_cache, lengths, starts, x.shape[1])
    if rows.shape[0]:
        _few_rows("qkv", rows, (wq, wk, wv), q.view(rows.shape[0], -1), norm=(norm_weight, norm_bias, eps), cache=cache)
    return q


def linear_add(x: Tensor, weight: Weight, bias: Tensor, residual: Tensor) -> Tensor:
    """residual + x @ weight.T + bias in one kernel, summed in float32.

    Args:
        x: [..., K]. weight: [C, K]. bias: [C].
        residual: [..., C].

    Returns:
        [..., C]

    Raises:
        InputError, SetupError: see `launch.check`.
    """
    weight = packed.of("linear_add", "weight", weight, x)
    launch.check("linear_add", x, weight=weight, bias=bias, residual=residual)
    C, shape = weight.shape[0], (*x.shape[:-1], weight.shape[0])
    launch.expect("linear_add", like=x, weight=(weight, (C, x.shape[-1])), bias=(bias, (C,)), residual=(residual, shape))
    rows, residual = launch.as_rows(x), launch.as_rows(residual)
    y = launch.empty(shape, x)
    if rows.shape[0] <= skinny.MOST_ROWS:
        _few_rows("linear_add", rows, (weight,), y.view(-1, C), bias=bias, residual=residual)
    else:
        gemm.run(rows, (weight,), (y,), bias=bias, residual=residual)
    return y


def lm_head(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Weight, eps: float) -> Tensor:
    """The final norm and the head, accumulated and returned in float32.

    Args:
        x: [..., C], before the final norm. norm_weight, norm_bias: [C].
        weight: [V, C].

    Returns:
        float32 logits [..., V]; in memory a row takes V rounded up to a multiple of LOGITS_ALIGN, and what stands behind V is
        not set.

    Raises:
        InputError, SetupError: see `launch.check`.
    """
    weight = packed.of("lm_head", "weight", weight, x)
    launch.check("lm_head", x, norm_weight=norm_weight, norm_bias=norm_bias, weight=weight)
    V = weight.shape[0]
    logits = launch.empty((*x.shape[:-1], V + -V % LOGITS_ALIGN), x, torch.float32)
    rows = launch.as_rows(x)
    if rows.shape[0]:
        _few_rows("lm_head", rows, (weight,), logits.view(rows.shape[0], -1), norm=(norm_weight, norm_bias, eps))
    return logits.narrow(-1, 0, V)


def _three(op: str, x: Tensor, *weights: Weight) -> tuple[Weight, ...]:
    """wq, wk and wv: three tensors, or three in one format."""
    found = tuple(packed.of(op, name, w, x) for name, w in zip(("wq", "wk", "wv"), weights, strict=True))
    kinds = {None if isinstance(w, Tensor) else (w.bits, w.group) for w in found}
    return found if len(kinds) == 1 else tuple(packed.unpacked(w, x) for w in found)  # a kernel reads one format


def _few_rows(
    kernel: str,
    rows: Tensor,
    weights: tuple[Weight, ...],
    out: Tensor,
    norm: tuple[Tensor, Tensor, float] | None = None,
    **after: Any,
) -> None:
    """Rows through `gemv` or `skinny`; arguments as those of `gemv.run`, weights of any strides."""
    if norm is not None and rows.shape[0] > skinny.NORM_ROWS:
        rows, norm = norms.layer_norm(rows, *norm), None
    if isinstance(weights[0], Tensor):
        weights = tuple(w.contiguous() for w in weights)  # as parameters are
    one = gemv.run if isinstance(weights[0], Tensor) else packed.gemv
    run = one if rows.shape[0] == 1 else skinny.run
    run(kernel, rows, weights, out, norm=norm, **after)


def by_library(rows: Tensor, weight: Tensor, bias: Tensor, gelu: bool, y: Tensor) -> None:
    """y = rows @ weight.T + bias, then gelu_new, by cuBLASLt with its epilogue, in the dtype of the rows."""
    with torch.no_grad(), torch.autocast("cuda", enabled=False):
        if gelu:
            torch._addmm_activation(bias, rows, weight.t(), use_gelu=True, out=y)  # the tanh form on CUDA, and only there
        else:
            torch.addmm(bias, rows, weight.t(), out=y)
