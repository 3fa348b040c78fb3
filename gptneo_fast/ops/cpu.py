"""The ops on the CPU for inference: a few rows through the extension, the reference for the rest.

A linear layer of one row reads its weight once and does nothing else worth the name; `csrc/decode_lanes.cpp` does so at the
rate of the memory, for a layer alone and for a whole step (`Plan`). Same names, arguments and results as in `reference`; no
backward.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from . import extension, quantized, reference, widened
from .drawing import Draws, advanced
from .extension import kv_append
from .quantized import QuantizedWeight, Weight
from .reference import embed, layer_norm, sample

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Of x, that the extension takes: torch's GEMM is faster with more, and where it has instructions for halves with fewer of them
ROWS = {dtype: 32 if dtype is torch.float32 or dtype in widened.DTYPES else 16 for dtype in DTYPES}
_PACKED_ROWS = 64  # the same for weights in few bits, where a CPU multiplies matrices of halves; else there is no end

__all__ = [
    "attention",
    "decode_attention",
    "embed",
    "kv_append",
    "layer_norm",
    "linear_add",
    "lm_head",
    "logprob",
    "norm_linear",
    "norm_qkv",
    "norm_qkv_append",
    "sample",
]


class Plan:
    """A run of blocks, named by its parameters for `gptneo_fast_csrc::decode`, which reads them where they stand at each call.

    Args:
        embeddings: wte [V, C] and wpe [P, C], or nothing. A weight in few bits stands here, and below, as its integers.
        blocks: of each block ln_1's weight and bias [C], wq, wk, wv [C, C], out_proj's weight [C, C] and bias [C], ln_2's
            weight and bias, c_fc's weight [F, C] and bias [F], c_proj's weight [C, F] and bias [C].
        last: ln_f's weight and bias, then the head's weight [V, C]; or the first two; or nothing.
        scales: of weights in few bits, in the order of all these.
        windows: of each block, keys that a query sees; 0 for all.
        eps: of ln_1 and ln_2 of each block, then of ln_f.
    """

    # Floats of the widest vectors that may compute, 4, 8, or 16 without VNNI; 0 for what the CPU has
    max_lanes: ClassVar[int] = 0

    def __init__(
        self,
        embeddings: list[Tensor],
        blocks: list[Tensor],
        last: list[Tensor],
        scales: list[Tensor],
        windows: list[int],
        eps: list[float],
    ) -> None:
        self._number = torch.ops.gptneo_fast_csrc.plan.default(embeddings, blocks, last, scales, windows, eps)
        weakref.finalize(self, torch.ops.gptneo_fast_csrc.forget_plan.default, self._number).atexit = False

    def __call__(
        self,
        x: Tensor,
        positions: Tensor | None,
        types: Tensor | None,
        keys: list[Tensor],
        values: list[Tensor],
        lengths: Tensor,
        starts: Tensor | None,
        keep: int,
    ) -> Tensor | None:
        """Run the blocks on T new tokens of B rows, which are appended to the cache and then attended to.

        Sums are float32 and so is everything between the blocks; of what was given, or kept, the dtype is the parameters'.
        A row's result has the same bits whatever rows are beside it and however many threads there are.

        Args:
            x: int64 [B, T], ids, or without embeddings hidden states [B, T, C]; contiguous, at most `ROWS`
                rows B * T.
            positions: int64 [B or 1, T]. types: int64 [B, T] or None; they index wte.
            keys, values: of each block [B, H, R, D], changed. lengths: int32 [B], tokens held before.
            starts: int32 [B], columns of left padding among the T; None for none.
            keep: columns that are wanted, the last ones.

        Returns:
            Hidden states [B, keep, C], or with a head logits float32 [B, keep, V]; None where a tensor is not of the kind that
            is taken (another dtype, strides, shape), and then nothing has been written.
        """
        decode = torch.ops.gptneo_fast_csrc.decode.default
        return _or_none(decode, self._number, x, positions, types, keys, values, lengths, starts, keep, self.max_lanes)

    def several(
        self,
        ids: Tensor,
        positions: Tensor,
        keys: list[Tensor],
        values: list[Tensor],
        lengths: Tensor,
        running: Tensor,
        ends: list[int],
        pad: int,
        least: int,
        steps: int,
        draws: Draws | None = None,
    ) -> Tensor | None:
        """Up to `steps` steps, each on the tokens that the one before it gave; from ids on, to a head.

        Args:
            ids: int64 [B, 1]. positions, keys, values, lengths: as of a call; the cache has room for `steps` tokens.
            running: boolean [B]; the other rows get `pad`.
            ends: tokens of which the first is a row's last; `pad` follows it. least: steps in which they are not chosen.
            draws: how tokens are drawn; None for the likeliest.

        Returns:
            Tokens int64 [B, n], fewer than `steps` where all rows have ended, or where the next draw is for torch; -1 where a
            row's logits were not finite, which ends it. None as of a call.
        """
        many = torch.ops.gptneo_fast_csrc.several.default
        how = (self._number, ids, positions, keys, values, lengths, running, ends, pad, least, steps)
        if draws is None:
            return _or_none(many, *how, None, *Draws().settings, self.max_lanes)
        taken = advanced(draws.generator, lambda state: (_or_none(many, *how, state, *draws.settings, self.max_lanes),))
        return ids.new_empty(len(ids), 0) if taken is None else taken[0]


def _or_none(op: Callable[..., Tensor], *args: Any) -> Tensor | None:
    """What an op of the extension gives; None for arguments that it does not take."""
    try:
        return op(*args)
    except RuntimeError as error:
        if str(error).startswith("gptneo_fast_csrc: "):
            return None
        raise


def _is_ours(x: Tensor) -> bool:
    """Whether the extension may compute with x, which nobody traces."""
    return x.dtype in DTYPES and not torch.compiler.is_compiling() and not torch.jit.is_tracing()


def _takes(x: Tensor, weight: Weight) -> bool:
    """Whether the extension computes this layer."""
    if not x.is_contiguous() or not x.numel() or torch.jit.is_tracing():
        return False
    if isinstance(weight, QuantizedWeight):
        few = x.numel() <= _PACKED_ROWS * weight.shape[1]
        return _is_ours(x) and (few or x.dtype is torch.float32 or x.dtype in widened.DTYPES or not widened.MATRICES)
    return (
        x.dtype is weight.dtype
        and x.dtype in DTYPES
        and x.numel() <= ROWS[x.dtype] * weight.shape[1]
        and weight.is_contiguous()
    )


def _copies(weight: Weight, x: Tensor) -> bool:
    """Whether a layer that the extension does not take is computed over copies of the weight, piece by piece."""
    if isinstance(weight, QuantizedWeight):
        return _is_ours(x)
    return x.dtype in widened.DTYPES and weight.dtype is x.dtype


def linear(x: Tensor, weight: Weight) -> Tensor:
    """x @ weight.T. x: [..., K]; weight: [N, K]; returns [..., N]."""
    if _takes(x, weight):
        return _linear(x, weight, None, None, None, None, 0.0, False)
    return widened.linear(x, weight) if _copies(weight, x) else quantized.linear(x, weight)


def _linear(x: Tensor, weight: Weight, *others: Tensor | float | bool | None) -> Tensor:
    own, scales = (weight, None) if isinstance(weight, Tensor) else weight.side_by_side()
    given = [t.contiguous() if isinstance(t, Tensor) else t for t in (own, *others, scales)]  # as parameters are, nearly always
    return torch.ops.gptneo_fast_csrc.linear.default(x, *given, Plan.max_lanes)


def norm_linear(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Weight, bias: Tensor, eps: float, gelu: bool
) -> Tensor:
    """As `reference.norm_linear`."""
    if _takes(x, weight):
        return _linear(x, weight, bias, None, norm_weight, norm_bias, eps, gelu)
    y = layer_norm(x, norm_weight, norm_bias, eps)
    if _copies(weight, x):
        return widened.linear(y, weight, bias, gelu=gelu)
    y = quantized.linear(y, weight, bias)
    if gelu and _is_ours(y):
        torch.ops.gptneo_fast_csrc.gelu.default(y, Plan.max_lanes)
        return y
    return F.gelu(y, approximate="tanh") if gelu else y


def norm_qkv(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, wq: Weight, wk: Weight, wv: Weight, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.norm_qkv`."""
    if _takes(x, wq):
        q, k, v = (_linear(x, w, None, None, norm_weight, norm_bias, eps, False) for w in (wq, wk, wv))
        return q, k, v
    y = layer_norm(x, norm_weight, norm_bias, eps)
    return linear(y, wq), linear(y, wk), linear(y, wv)


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
    """As `reference.norm_qkv_append`."""
    q, k, v = norm_qkv(x, norm_weight, norm_bias, wq, wk, wv, eps)
    k, v = (t.unflatten(-1, (k_cache.shape[1], -1)).transpose(1, 2) for t in (k, v))  # [B, H, T, D]
    extension.kv_append(k_cache, v_cache, k, v, lengths, starts)
    return q


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    starts: Tensor | None = None,
    ends: Tensor | None = None,
    k_cache: Tensor | None = None,
    v_cache: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """As `reference.attention`; weights stay float32."""
    args = (q, k, v, window, starts, ends, k_cache, v_cache, lengths)
    found = _or_none(torch.ops.gptneo_fast_csrc.attention.default, *args, Plan.max_lanes) if _is_ours(q) else None
    return reference.attention(*args) if found is None else found


def decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, window: int, starts: Tensor | None = None
) -> Tensor:
    """As `reference.decode_attention`; weights stay float32."""
    args = (q, k_cache, v_cache, lengths, window, starts)
    found = _or_none(torch.ops.gptneo_fast_csrc.decode_attention.default, *args, Plan.max_lanes) if _is_ours(q) else None
    return reference.decode_attention(*args) if found is None else found


def linear_add(x: Tensor, weight: Weight, bias: Tensor, residual: Tensor) -> Tensor:
    """As `reference.linear_add`."""
    if _takes(x, weight) and residual.is_contiguous() and residual.dtype is x.dtype:
        return _linear(x, weight, bias, residual, None, None, 0.0, False)
    if _copies(weight, x):
        return widened.linear(x, weight, bias, residual=residual)
    return reference.linear_add(x, weight, bias, residual)


def lm_head(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Weight, eps: float) -> Tensor:
    """As `reference.lm_head`, without its padding, which only kernels want."""
    if _takes(x, weight):
        return _linear(x, weight, None, None, norm_weight, norm_bias, eps, False).float()
    if _copies(weight, x):
        return widened.linear(layer_norm(x, norm_weight, norm_bias, eps), weight, dtype=torch.float32)
    return reference.lm_head(x, norm_weight, norm_bias, weight, eps)


_CHUNK = 64 << 20  # bytes of logits that exist at one time
_COLUMNS = 2048  # of them that one product makes: the library's products are slower where a row of the result is long


def logprob(x: Tensor, weight: Weight, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `reference.logprob`, without more than a chunk of the logits."""
    rows, found = max(1, _CHUNK // (4 * max(1, weight.shape[0]))), []
    for i in range(0, max(1, len(x)), rows):
        piece, own = x[i : i + rows], targets[i : i + rows]
        # whatever the number of rows, logits are rounded alike
        if _takes(piece, weight) or not isinstance(weight, Tensor):
            logits = [linear(piece, weight)]
        else:
            product = partial(widened.linear, dtype=torch.float32) if _copies(weight, piece) else linear
            logits = [product(piece, some) for some in weight.split(_COLUMNS)]
        found.append(statistics(logits, own))
    own, rank, entropy, variance = (torch.cat(parts) for parts in zip(*found, strict=True))
    return own, rank, entropy, variance


def statistics(logits: Sequence[Tensor], targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `reference.statistics`, of logits [N, V] in pieces [N, n]."""
    if not all(map(_is_ours, logits)):
        return reference.statistics(torch.cat(list(logits), 1), targets)
    found: tuple[Tensor, Tensor, Tensor, Tensor] = torch.ops.gptneo_fast_csrc.statistics.default(
        [piece.float() for piece in logits], targets, Plan.max_lanes
    )
    return found
