"""Token + position (+ token type) embeddings in one kernel."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gptneo_fast.errors import InputError

from . import launch, packed
from .packed import Packed, Weight, unpacked_row

_BLOCK_C = 1024


def embed(ids: Tensor, position_ids: Tensor, wte: Weight, wpe: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
    """Token + position (+ token type) embeddings, summed in float32.

    Args:
        ids: [B, T] int64, of any strides; from 0 to V - 1, which the caller has checked.
        position_ids: [B or 1, T] int64.
        wte: [V, C]. wpe: [P, C].
        token_type_ids: [B or 1, T] int64 or None.

    Returns:
        [B, T, C] in the dtype of `wpe`.

    Raises:
        InputError, SetupError: see `launch.check`.
    """
    wte = packed.of("embed", "wte", wte, wpe)
    launch.check("embed", wpe, wte=wte, wpe=wpe)
    B, T = ids.shape
    C = wte.shape[1]
    out = launch.empty((B, T, C), wpe)
    for name, x in (("position_ids", position_ids), ("token_type_ids", token_type_ids)):
        if x is not None and (x.shape[0] not in (1, B) or tuple(x.shape[1:]) != (T,)):
            raise InputError(f"embed: {name} has shape {list(x.shape)}, expected [{B} or 1, {T}]")
    if wpe.shape[1] != C:
        raise InputError(f"embed: wpe has rows of {wpe.shape[1]}, expected {C}")
    positions, types = (x if x is None else x.expand(B, T) for x in (position_ids, token_type_ids))
    BLOCK_C = min(_BLOCK_C, max(16, launch.power_of_2(C)))
    if isinstance(wte, Packed):
        tables = (wte.values, wpe, 0, wpe.stride(0), wte.scales, wte.blocks, wte.scales.shape[1])
        bits, group = wte.bits, wte.group
    else:
        tables, bits, group = (wte, wpe, wte.stride(0), wpe.stride(0), None, 0, 0), 0, 0
    chosen = (ids, *ids.stride(), positions, *positions.stride())
    chosen += (ids, 0, 0) if types is None else (types, *types.stride())
    programs = B * T * launch.blocks(C, BLOCK_C)
    meta = {"HAS_TYPES": types is not None, "BLOCK_C": BLOCK_C, "num_warps": max(1, BLOCK_C // 256)}
    meta |= {"BITS": bits, "GROUP": group}
    launch.run(_embed_kernel, programs, wpe, *tables, *chosen, out, T, C, **meta)
    return out


@triton.jit(
    do_not_specialize="T ids_ptr stride_ib stride_it positions_ptr stride_pb stride_pt types_ptr stride_tb stride_tt".split()
)
def _embed_kernel(
    wte_ptr, wpe_ptr, stride_wte, stride_wpe, scales_ptr, blocks_wte, groups,
    ids_ptr, stride_ib, stride_it,
    positions_ptr, stride_pb, stride_pt,
    types_ptr, stride_tb, stride_tt,
    out_ptr, T, C,
    HAS_TYPES: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(C, BLOCK_C)
    token = tl.program_id(0) // blocks
    offs_c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    b, t = (token // T).to(tl.int64), (token % T).to(tl.int64)
    token_id = tl.load(ids_ptr + b * stride_ib + t * stride_it).to(tl.int64)
    position = tl.load(positions_ptr + b * stride_pb + t * stride_pt).to(tl.int64)
    x = _row(wte_ptr, stride_wte, scales_ptr, blocks_wte, groups, token_id, offs_c, mask_c, wpe_ptr, BITS, GROUP)
    x += tl.load(wpe_ptr + position * stride_wpe + offs_c, mask=mask_c).to(tl.float32)
    if HAS_TYPES:
        token_type = tl.load(types_ptr + b * stride_tb + t * stride_tt).to(tl.int64)
        x += _row(wte_ptr, stride_wte, scales_ptr, blocks_wte, groups, token_type, offs_c, mask_c, wpe_ptr, BITS, GROUP)
    tl.store(out_ptr + token.to(tl.int64) * C + offs_c, x.to(out_ptr.dtype.element_ty), mask=mask_c)


@triton.jit
def _row(
    wte_ptr, stride_wte, scales_ptr, blocks, groups, row, offs_c, mask_c, like_ptr, BITS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Elements of a row of `wte` in float32; of a packed one what it stands for in the dtype of `like`."""
    if BITS == 0:
        x = tl.load(wte_ptr + row * stride_wte + offs_c, mask=mask_c).to(tl.float32)
    else:
        x = unpacked_row(wte_ptr, scales_ptr, row, offs_c, mask_c, blocks, groups, BITS, GROUP)
        x = x.to(like_ptr.dtype.element_ty).to(tl.float32)
    return x
