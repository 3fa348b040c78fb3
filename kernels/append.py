"""New keys and values into the slots of a cache."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import launch

_BLOCK_T = 32


def kv_append(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, lengths: Tensor, starts: Tensor | None = None) -> None:
    """Write the newest tokens of each row into their slots, token t into slot t mod R, keys and values in one kernel.

    Args:
        k_cache, v_cache: [B, H, R, D], changed. k, v: [B, H, T, D]; neighbours in memory along D.
        lengths: int32 [B], tokens held before. starts: int32 [B], columns of left padding, or None.

    Raises:
        InputError, SetupError: see `launch.check`.
    """
    launch.check("kv_append", k_cache, k_cache=k_cache, v_cache=v_cache, k=k, v=v)
    B, H, T, D = k.shape
    R = k_cache.shape[2]
    launch.expect("kv_append", like=k, k_cache=(k_cache, (B, H, R, D)), v_cache=(v_cache, (B, H, R, D)), v=(v, (B, H, T, D)))
    launch.expect("kv_append", like=k, lengths=(lengths, (B,)), starts=(starts, (B,)))
    columns = min(T, R)  # older ones would be overwritten by newer ones of the same call
    blocks = launch.blocks(columns, _BLOCK_T)
    strides = (s for t in (k_cache, v_cache, k, v) for s in t.stride()[:3])
    launch.run(
        _kv_append_kernel, B * H * blocks, k_cache,
        k_cache, v_cache, k, v, lengths, lengths if starts is None else starts, *strides, H, T, R, T - columns, blocks,
        D=D, STARTS=starts is not None, BLOCK_T=_BLOCK_T, BLOCK_D=launch.power_of_2(D), num_warps=4,
    )  # fmt: skip


@triton.jit(do_not_specialize=["H", "T", "R", "first", "blocks", "lengths_ptr", "starts_ptr"])
def _kv_append_kernel(
    k_cache_ptr, v_cache_ptr, k_ptr, v_ptr, lengths_ptr, starts_ptr,
    stride_kcb, stride_kch, stride_kcr, stride_vcb, stride_vch, stride_vcr,
    stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    H, T, R, first, blocks,
    D: tl.constexpr, STARTS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    b, h = (pid // blocks // H).to(tl.int64), (pid // blocks % H).to(tl.int64)
    offs_t = first + pid % blocks * BLOCK_T + tl.arange(0, BLOCK_T)  # columns
    offs_d = tl.arange(0, BLOCK_D)
    token = tl.load(lengths_ptr + b).to(tl.int64) + offs_t
    mask_t = offs_t < T
    if STARTS:
        start = tl.load(starts_ptr + b)
        token -= start
        mask_t = mask_t & (offs_t >= start)
    mask = mask_t[:, None] & (offs_d < D)[None, :]
    slot, column = (token % R)[:, None], offs_t.to(tl.int64)[:, None]
    k = tl.load(k_ptr + b * stride_kb + h * stride_kh + column * stride_kt + offs_d[None, :], mask=mask)
    v = tl.load(v_ptr + b * stride_vb + h * stride_vh + column * stride_vt + offs_d[None, :], mask=mask)
    tl.store(k_cache_ptr + b * stride_kcb + h * stride_kch + slot * stride_kcr + offs_d[None, :], k, mask=mask)
    tl.store(v_cache_ptr + b * stride_vcb + h * stride_vch + slot * stride_vcr + offs_d[None, :], v, mask=mask)
