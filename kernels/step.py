"""The two ops that only a step of decoding has: how a layer begins, and how the step ends."""

from __future__ import annotations

import torch
from torch import Tensor

from gptneo_fast.ops.constants import LOGITS_ALIGN

from . import append, few, launch, linear
from .gemv import Cache


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

    Up to `few.ROWS` rows that is what `few` says; for more it is `norm_qkv`, then `kv_append`.

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
    rows = launch.as_rows(x)
    if rows.shape[0] > few.ROWS:
        q, k, v = linear.norm_qkv(x, norm_weight, norm_bias, wq, wk, wv, eps)
        k, v = (t.unflatten(-1, (k_cache.shape[1], k_cache.shape[3])).transpose(1, 2) for t in (k, v))
        append.kv_append(k_cache, v_cache, k, v, lengths, starts)
        return q
    q = launch.empty((*x.shape[:-1], wq.shape[0]), x)
    cache = Cache(k_cache, v_cache, lengths, starts, x.shape[1])
    if rows.shape[0]:
        out, norm = q.view(rows.shape[0], -1), (norm_weight, norm_bias)
        few.multiply("qkv", rows, (wq, wk, wv), out, norm=norm, eps=eps, cache=cache)
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
    if rows.shape[0]:
        few.multiply("lm_head", rows, (weight,), logits.view(rows.shape[0], -1), norm=(norm_weight, norm_bias), eps=eps)
    return logits.narrow(-1, 0, V)
