"""Products of few rows: which kernel takes them, and the two ops that only a decode step has.

    rows     kernel     normalised by         launches
    1        `gemv`     every program         1
    2-16     `skinny`   every program         1
    17-64    `skinny`   `layer_norm` before   2, without a norm 1

More rows belong to `linear`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gptneo_fast.reference import LOGITS_ALIGN

from . import gemv, launch, norms, skinny
from .gemv import Cache

ROWS = 64  # not timed yet


def multiply(
    kernel: str,
    rows: Tensor,
    weights: tuple[Tensor, ...],
    out: Tensor,
    *,
    norm: tuple[Tensor, Tensor] | None = None,
    eps: float = 0.0,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    gelu: bool = False,
    cache: Cache | None = None,
) -> None:
    """out = [residual +] [gelu](norm(rows) @ weight.T [+ bias]).

    Args:
        kernel: whose tiles: qkv, norm_linear, linear_add or lm_head.
        rows: contiguous [M, K]. out: [M, N], rows of any stride.
        weights: one [N, K], or q, k and v, of which the last two go to `cache`.
        norm: gamma and beta [K]. bias: [N]. residual: contiguous [M, N].
    """
    if norm is not None and len(rows) > skinny.NORM_ROWS:
        rows, norm = norms.layer_norm(rows, *norm, eps), None
    weights = tuple(w.contiguous() for w in weights)  # as parameters are
    run = gemv.run if len(rows) == 1 else skinny.run
    run(kernel, rows, weights, out, norm=norm, eps=eps, bias=bias, residual=residual, gelu=gelu, cache=cache)


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
    """LayerNorm and the three projections; k and v go straight into the slots of their tokens.

    Args:
        x: [B, T, C]. norm_weight, norm_bias: [C]. wq, wk, wv: [C, C].
        k_cache, v_cache: [B, H, R, D], changed.
        lengths: int32 [B], tokens held before. starts: int32 [B], columns of left padding; None for none.

    Returns:
        q: [B, T, C]

    Raises:
        InputError, SetupError: see `launch.check`.
    """
    launch.check(
        "norm_qkv_append", x, norm_weight=norm_weight, norm_bias=norm_bias, wq=wq, wk=wk, wv=wv, k_cache=k_cache,
        v_cache=v_cache,
    )  # fmt: skip
    q = launch.empty((*x.shape[:-1], wq.shape[0]), x)
    rows = launch.as_rows(x)
    cache = Cache(k_cache, v_cache, lengths, starts, x.shape[1])
    if len(rows):
        multiply("qkv", rows, (wq, wk, wv), q.view(len(rows), -1), norm=(norm_weight, norm_bias), eps=eps, cache=cache)
    return q


def lm_head(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The final norm and the head, accumulated and returned in float32.

    Args:
        x: [..., C], before the final norm. norm_weight, norm_bias: [C].
        weight: [V, C].

    Returns:
        float32 logits [..., V]; in memory a row takes V rounded up to a multiple of `reference.LOGITS_ALIGN`, and what
        stands behind V is not set.

    Raises:
        InputError, SetupError: see `launch.check`.
    """
    launch.check("lm_head", x, norm_weight=norm_weight, norm_bias=norm_bias, weight=weight)
    V = weight.shape[0]
    logits = launch.empty((*x.shape[:-1], V + -V % LOGITS_ALIGN), x, torch.float32)
    rows = launch.as_rows(x)
    if len(rows):
        multiply("lm_head", rows, (weight,), logits.view(len(rows), -1), norm=(norm_weight, norm_bias), eps=eps)
    return logits.narrow(-1, 0, V)
