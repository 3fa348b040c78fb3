"""Products of few rows: which kernel takes them.

    rows     kernel     normalised by         launches
    1        `gemv`     every program         1
    2-16     `skinny`   every program         1
    17-64    `skinny`   `layer_norm` before   2, without a norm 1

More rows belong to `linear`.
"""

from __future__ import annotations

from torch import Tensor

from . import gemv, norms, skinny
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
    if norm is not None and rows.shape[0] > skinny.NORM_ROWS:
        rows, norm = norms.layer_norm(rows, *norm, eps), None
    weights = tuple(w.contiguous() for w in weights)  # as parameters are
    run = gemv.run if rows.shape[0] == 1 else skinny.run
    run(kernel, rows, weights, out, norm=norm, eps=eps, bias=bias, residual=residual, gelu=gelu, cache=cache)
