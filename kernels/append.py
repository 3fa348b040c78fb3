"""New keys and values into the slots of a cache: a kernel of its own, and a block for kernels that have just computed them."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from . import launch

_BLOCK_T = 32


class Cache(NamedTuple):
    """Where k and v go: k_cache and v_cache [B, H, R, D], lengths int32 [B], starts int32 [B] or None; T columns a row."""

    k: Tensor
    v: Tensor
    lengths: Tensor
    starts: Tensor | None
    T: int

    @staticmethod
    def arguments(cache: Cache | None) -> tuple:
        """Of kernels that use `into_slots`: cache, lengths, starts, T, R."""
        if cache is None:
            return None, None, None, 1, 1
        _, _, R, D = cache.k.shape
        return (cache.k, cache.v, cache.k.stride()[:3], cache.v.stride()[:3], D), cache.lengths, cache.starts, cache.T, R


@triton.jit
def into_slots(acc, m, n, mask, third, cache, lengths_ptr, starts_ptr, T, R):
    """Columns n of k (third 1) or v (2), of rows m = b * T + t, into the slots of their tokens, in any order of axes.

    cache: k_cache, v_cache, strides of batch, head and slot of each, head dim.
    """
    k_cache_ptr, v_cache_ptr, strides_k, strides_v, D = cache
    b, t = m // T, m % T
    token = tl.load(lengths_ptr + b, mask=mask, other=0) + t
    mask = mask & (t >= T - R)  # the newest R columns: a later one overwrites what is older
    if starts_ptr is not None:
        start = tl.load(starts_ptr + b, mask=mask, other=0)
        token -= start
        mask = mask & (t >= start)
    b, h, slot, d = b.to(tl.int64), (n // D).to(tl.int64), (token % R).to(tl.int64), n % D
    if third == 1:
        at = b * strides_k[0] + h * strides_k[1] + slot * strides_k[2] + d
        tl.store(k_cache_ptr + at, acc.to(k_cache_ptr.dtype.element_ty), mask=mask)
    else:
        at = b * strides_v[0] + h * strides_v[1] + slot * strides_v[2] + d
        tl.store(v_cache_ptr + at, acc.to(v_cache_ptr.dtype.element_ty), mask=mask)


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
    strides = (k_cache.stride()[:3], v_cache.stride()[:3], k.stride()[:3], v.stride()[:3])
    launch.run(
        _kv_append_kernel, B * H * blocks, k_cache,
        k_cache, v_cache, k, v, strides, lengths, starts, H, T, R, T - columns, blocks,
        D=D, BLOCK_T=_BLOCK_T, BLOCK_D=launch.power_of_2(D), num_warps=4,
    )  # fmt: skip


@triton.jit(do_not_specialize=["H", "T", "R", "first", "blocks", "lengths_ptr", "starts_ptr"])
def _kv_append_kernel(
    k_cache_ptr, v_cache_ptr, k_ptr, v_ptr, strides, lengths_ptr, starts_ptr, H, T, R, first, blocks,
    D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    strides_kc, strides_vc, strides_k, strides_v = strides  # of batch, head and slot or column
    pid = tl.program_id(0)
    b, h = (pid // blocks // H).to(tl.int64), (pid // blocks % H).to(tl.int64)
    offs_t = first + pid % blocks * BLOCK_T + tl.arange(0, BLOCK_T)  # columns
    offs_d = tl.arange(0, BLOCK_D)
    token = tl.load(lengths_ptr + b).to(tl.int64) + offs_t
    mask_t = offs_t < T
    if starts_ptr is not None:
        start = tl.load(starts_ptr + b)
        token -= start
        mask_t = mask_t & (offs_t >= start)
    mask = mask_t[:, None] & (offs_d < D)[None, :]
    slot, column = (token % R)[:, None], offs_t.to(tl.int64)[:, None]
    k = tl.load(k_ptr + b * strides_k[0] + h * strides_k[1] + column * strides_k[2] + offs_d[None, :], mask=mask)
    v = tl.load(v_ptr + b * strides_v[0] + h * strides_v[1] + column * strides_v[2] + offs_d[None, :], mask=mask)
    tl.store(k_cache_ptr + b * strides_kc[0] + h * strides_kc[1] + slot * strides_kc[2] + offs_d[None, :], k, mask=mask)
    tl.store(v_cache_ptr + b * strides_vc[0] + h * strides_vc[1] + slot * strides_vc[2] + offs_d[None, :], v, mask=mask)
