"""Weights in 8 and 4 bits, as `ops/quantized.py` says how they lie: what a launcher takes, one row times them, and unpacking.

A sum may be taken in any order, so that nothing is brought into order but the row x, once: a word of 32 bits holds in each
half 16 / BITS numbers, from its lowest bits up, and `in_order` gives what of x stands across from each. Integers become floats
by their bits: put in the place where a mantissa ends, an unsigned integer is what the float has too much. That is a logic
operation and a subtraction a number, and no conversion, of which an SM does a quarter as many.

2 to 64 rows are a variant of `skinny`, some hundreds one of `gemm`; for more, whose tiles would each unpack a weight again, it
is unpacked as a whole, into memory that lives for one product.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptneo_fast.errors import InputError

from . import launch
from .append import Cache, into_slots
from .blocks import finish, moments

BLOCK = 64  # numbers of a row that lie together
_GROUPS = (32, 64, 128)


class Packed(NamedTuple):
    """A weight [N, K] in few bits: values int8 [N, K padded] or uint8 [N, K padded / 2], scales [N, 1 or groups]."""

    values: Tensor
    scales: Tensor
    K: int

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight that it stands for."""
        return self.values.shape[0], self.K

    @property
    def bits(self) -> int:
        """8 or 4."""
        return 8 if self.values.dtype == torch.int8 else 4

    @property
    def blocks(self) -> int:
        """Blocks of 64 numbers of a row."""
        return self.values.shape[1] * 8 // self.bits // BLOCK

    @property
    def group(self) -> int:
        """Numbers that share a scale; 0 where a row does."""
        return 0 if self.bits == 8 else self.blocks * BLOCK // self.scales.shape[1]

    def rows(self, first: int, end: int) -> Packed:
        """Some of its rows."""
        return Packed(self.values[first:end], self.scales[first:end], self.K)


Weight = Tensor | Packed  # or a QuantizedWeight


def of(op: str, name: str, weight: Any, like: Tensor) -> Weight:
    """A weight as the kernels take it: a tensor as it is, anything else as a Packed, which is checked here.

    Args:
        op, name: of the op and its argument, for the message. like: decides the device.

    Raises:
        InputError: values or scales of another dtype, device, shape or with gaps; values that do not begin on 16 bytes.
    """
    if isinstance(weight, Tensor):
        return weight
    values, scales = weight[:2] if isinstance(weight, Packed) else weight.row_by_row()
    N, K = weight.shape
    dtypes = {torch.int8: torch.float32, torch.uint8: torch.bfloat16}
    if values.dtype not in dtypes or scales.dtype != dtypes[values.dtype]:
        raise InputError(
            f"{op}: {name} has values of {values.dtype} and scales of {scales.dtype}, expected int8 with float32 or uint8 with "
            "bfloat16; scales keep their dtype whatever that of the model is"
        )
    for part, x in (("values", values), ("scales", scales)):
        if x.device != like.device:
            raise InputError(f"{op}: {part} of {name} are on {x.device}, expected {like.device}")
        if not x.is_contiguous():
            raise InputError(f"{op}: {part} of {name} must be contiguous; they have strides {x.stride()}")
    if values.storage_offset() % 16:
        raise InputError(f"{op}: values of {name} begin at byte {values.storage_offset()} of their memory; use .clone()")
    found = Packed(values, scales, K)
    padded = values.shape[1] * 8 // found.bits
    unit = max(BLOCK, found.group)
    whole = padded == -(-K // unit) * unit and tuple(scales.shape) == (N, padded // (found.group or padded))
    if values.shape[0] != N or not whole or (found.bits == 4 and found.group not in _GROUPS):
        raise InputError(
            f"{op}: {name} [{N}, {K}] has values {list(values.shape)} and scales {list(scales.shape)}; a row of them is padded "
            f"to a multiple of {BLOCK} numbers and of the group, which is {', '.join(map(str, _GROUPS))}"
        )
    return found


@triton.jit
def number(word, PLACE: tl.constexpr, BITS: tl.constexpr):
    """The numbers in a place of the lower halves of words, int32, in float32; of 4 bits they lie there 8 too large."""
    LOW: tl.constexpr = PLACE * BITS  # its lowest bit
    MASK: tl.constexpr = ((1 << BITS) - 1) << LOW
    SIGN: tl.constexpr = 1 << (LOW + BITS - 1) if BITS == 8 else 0  # turned over, a number of two's complement is unsigned
    EXPONENT: tl.constexpr = ((127 + 23 - LOW) << 23) | SIGN  # where that lowest bit counts as one
    EXCESS: tl.constexpr = (1 << (23 - LOW)) + (1 << (BITS - 1))
    return ((word & MASK) ^ EXPONENT).to(tl.float32, bitcast=True) - EXCESS


@triton.jit
def in_order(ptr, first, K, WIDTH: tl.constexpr, BITS: tl.constexpr):
    """Elements of a row in the order of WIDTH words from word `first` on: for place p and half h a vector 2 p + h, float32.

    Words hold in half h and place p the number 64 (w // 8) + 16 p + 2 (w % 8) + h in 4 bits, 4 w + 2 h + p in 8.
    """
    found = ()
    if BITS == 4:
        unit = first // 4 + tl.arange(0, WIDTH // 4)  # 4 words: 8 neighbours for each place
        for p in tl.static_range(4):
            at = (unit // 2 * 64 + unit % 2 * 8 + 16 * p)[:, None] + tl.arange(0, 8)[None]
            x = tl.load(ptr + at, mask=at < K, other=0).to(tl.float32)
            low, high = tl.split(tl.reshape(x, (WIDTH, 2)))
            found = found + (low, high)
    else:
        at = ((first // 4 + tl.arange(0, WIDTH // 4)) * 16)[:, None] + tl.arange(0, 16)[None]
        x = tl.load(ptr + at, mask=at < K, other=0).to(tl.float32)
        even, odd = tl.split(tl.reshape(x, (WIDTH, 2, 2)))
        found = found + tl.split(even) + tl.split(odd)
    return found


@triton.jit
def columns(first, WIDTH: tl.constexpr, PLACE: tl.constexpr, HALF: tl.constexpr, BITS: tl.constexpr):
    """Which columns a vector of `in_order` has."""
    w = first + tl.arange(0, WIDTH)
    return w // 8 * 64 + 16 * PLACE + w % 8 * 2 + HALF if BITS == 4 else 4 * w + 2 * HALF + PLACE


@triton.jit
def words(ptr, rows, first, mask_n, words_of_row, MASKED: tl.constexpr, WIDTH: tl.constexpr):
    """int32 [rows, WIDTH] from word `first` of each row on, 128 bits at a time."""
    offs = first + tl.arange(0, WIDTH)
    at = ptr.to(tl.pointer_type(tl.int32), bitcast=True) + rows.to(tl.int64)[:, None] * words_of_row + offs[None]
    if MASKED:
        x = tl.load(at, mask=mask_n[:, None] & (offs < words_of_row)[None], other=0, eviction_policy="evict_first")
    else:
        x = tl.load(at, eviction_policy="evict_first")
    return x


@triton.jit
def scales_of(ptr, rows, first, mask_n, groups, MASKED: tl.constexpr, UNITS: tl.constexpr, GROUP: tl.constexpr):
    """bfloat16 [rows, UNITS], of the lower two places of 4 words and, beyond it, of the upper two in groups of 32."""
    unit = first // 4 + tl.arange(0, UNITS)
    found = ()
    for half in tl.static_range(2 if GROUP == 32 else 1):
        offs = unit // 2 * 2 + half if GROUP == 32 else unit // (GROUP // 32)
        at = ptr + rows.to(tl.int64)[:, None] * groups + offs[None]
        if MASKED:
            found = found + (tl.load(at, mask=mask_n[:, None] & (offs < groups)[None], other=0),)
        else:
            found = found + (tl.load(at),)
    return found


@triton.jit
def scales_of_blocks(ptrs, block, blocks, GROUP: tl.constexpr):
    """Of the first and the last two places of words of 4 bits in a block, float32; an axis for these words follows the others.

    ptrs: where rows have their scales. block: which; the two broadcast.
    """
    mask = block < blocks
    if GROUP == 32:
        low = tl.load(ptrs + 2 * block, mask=mask, other=0)
        high = tl.load(ptrs + 2 * block + 1, mask=mask, other=0)
    else:
        low = tl.load(ptrs + block // (GROUP // 64), mask=mask, other=0)
        high = low
    return tl.expand_dims(low.to(tl.float32), -1), tl.expand_dims(high.to(tl.float32), -1)


@triton.jit
def in_bytes(w, dtype: tl.constexpr):
    """Words of 8 bits, int32 [..., W], as numbers [..., 4 W] in their order, before their scale."""
    even = tl.join(number(w, 0, 8).to(dtype), number(w >> 16, 0, 8).to(dtype))
    odd = tl.join(number(w, 1, 8).to(dtype), number(w >> 16, 1, 8).to(dtype))
    return tl.reshape(tl.join(even, odd), w.shape[:-1] + (4 * w.shape[-1],))


@triton.jit
def in_nibbles(w, low, high, dtype: tl.constexpr):
    """Words of 4 bits, int16 [N, W] of whole blocks, as weights [N, 4 W] in their order.

    low, high: `scales_of_blocks`, [N, W / 16, 1].
    """
    N: tl.constexpr = w.shape[0]
    W: tl.constexpr = w.shape[1]
    word = tl.reshape(w, (N, W // 16, 16)).to(tl.int32)
    first = tl.join((number(word, 0, 4) * low).to(dtype), (number(word, 2, 4) * high).to(dtype))
    second = tl.join((number(word, 1, 4) * low).to(dtype), (number(word, 3, 4) * high).to(dtype))
    places = tl.permute(tl.join(first, second), (0, 1, 3, 4, 2))  # [N, blocks, 2, 2, 16]
    return tl.reshape(places, (N, 4 * W))


@triton.jit(do_not_specialize=["granules", "zero", "R", "lengths_ptr", "starts_ptr"])
def packed_gemv(
    x_ptr, norm, w_ptrs, scale_ptrs, bias_ptr, residual_ptr, out_ptr, cache, lengths_ptr, starts_ptr,
    K, N, blocks, groups, granules, zero, R, GELU: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr, CHUNKS: tl.constexpr, AHEAD: tl.constexpr, EVEN_K: tl.constexpr, EVEN_N: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """`gemv` of one row x [K] and weights [N, K] of `blocks` blocks and `groups` groups a row; arguments as there.

    A granule is ROWS rows, read as CHUNKS tiles of WIDTH words of 32 bits.
    """
    w_ptr, scale_ptr = w_ptrs[0], scale_ptrs[0]
    pid, third = tl.program_id(0), 0
    if cache is not None:
        programs = tl.num_programs(0) // 3
        third = pid // programs
        pid = pid % programs
        if third == 1:
            w_ptr, scale_ptr = w_ptrs[1], scale_ptrs[1]
        elif third == 2:
            w_ptr, scale_ptr = w_ptrs[2], scale_ptrs[2]
    PLACES: tl.constexpr = 16 // BITS
    UNITS: tl.constexpr = WIDTH // 4
    MASKED: tl.constexpr = not EVEN_N or not EVEN_K
    first = pid * granules * ROWS
    offs_n = first + tl.arange(0, ROWS)
    limit = tl.minimum(first + granules * ROWS, N)
    row = blocks * (2 * BITS)  # words

    ws, ss = (), ()
    for g in tl.static_range(AHEAD):
        rows = offs_n + g * ROWS
        for c in tl.static_range(CHUNKS):
            ws = ws + (words(w_ptr, rows, c * WIDTH, rows < limit, row, MASKED, WIDTH),)
            if BITS == 4:
                ss = ss + (scales_of(scale_ptr, rows, c * WIDTH, rows < limit, groups, MASKED, UNITS, GROUP),)
            else:
                ss = ss + ((),)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()

    xs, held = (), ()
    gate = tl.zeros([WIDTH], tl.int32)
    for c in tl.static_range(CHUNKS):
        new = in_order(x_ptr, c * WIDTH, K, WIDTH, BITS)
        xs = xs + new
        for i in tl.static_range(2 * PLACES):
            held = held + (columns(c * WIDTH, WIDTH, i // 2, i % 2, BITS) < K,)
            gate |= new[i].to(tl.int32, bitcast=True)
    gate &= zero  # as in `gemv`: who computes with it has the whole row
    if norm is not None:
        gamma_ptr, beta_ptr, eps = norm
        mean, squares, rest = moments(xs, None if EVEN_K else held, K, 0)
        scale = 1 / tl.sqrt(squares / K - rest * rest + eps)
        ys = ()
        for c in tl.static_range(CHUNKS):
            gamma, beta = in_order(gamma_ptr, c * WIDTH, K, WIDTH, BITS), in_order(beta_ptr, c * WIDTH, K, WIDTH, BITS)
            for i in tl.static_range(2 * PLACES):
                ys = ys + ((xs[c * 2 * PLACES + i] - mean - rest) * scale * gamma[i] + beta[i],)
        xs = ys

    for g in tl.range(0, granules, loop_unroll_factor=1):
        acc = tl.zeros([ROWS, UNITS], tl.float32)
        for c in tl.static_range(CHUNKS):
            w = ws[c] ^ gate[None] if norm is None else ws[c]
            total = tl.zeros([ROWS, WIDTH], tl.float32)
            for p in tl.static_range(PLACES):
                if GROUP == 32 and p == 2:
                    acc += tl.sum(tl.reshape(total, (ROWS, UNITS, 4)), 2) * ss[c][0].to(tl.float32)
                    total = tl.zeros([ROWS, WIDTH], tl.float32)
                total += number(w, p, BITS) * xs[2 * (c * PLACES + p)][None]
                total += number(w >> 16, p, BITS) * xs[2 * (c * PLACES + p) + 1][None]
            part = tl.sum(tl.reshape(total, (ROWS, UNITS, 4)), 2)
            if BITS == 4:
                part *= ss[c][len(ss[c]) - 1].to(tl.float32)
            acc += part
        later = offs_n + (g + AHEAD) * ROWS
        new_ws, new_ss = (), ()
        for c in tl.static_range(CHUNKS):
            new_ws = new_ws + (words(w_ptr, later, c * WIDTH, later < limit, row, True, WIDTH),)
            if BITS == 4:
                new_ss = new_ss + (scales_of(scale_ptr, later, c * WIDTH, later < limit, groups, True, UNITS, GROUP),)
            else:
                new_ss = new_ss + ((),)
        ws, ss = ws[CHUNKS:] + new_ws, ss[CHUNKS:] + new_ss
        rows = offs_n + g * ROWS
        result = tl.sum(acc, 1)
        if BITS == 8:
            result *= tl.load(scale_ptr + rows, mask=rows < N, other=0)
        n, m = rows[:, None], tl.zeros([1, 1], tl.int32)
        if cache is None or third == 0:
            finish(result[:, None], m, n, n < N, N, out_ptr, 0, bias_ptr, residual_ptr, GELU)
        else:
            into_slots(result[:, None], m, n, n < N, third, cache, lengths_ptr, starts_ptr, 1, R)


class Tile(NamedTuple):
    """rows x WIDTH words a load, loads of a row, `granules` of rows a program, `ahead` of them in flight, warps."""

    rows: int
    WIDTH: int
    chunks: int
    granules: int
    ahead: int
    warps: int


_MOST_X = 64  # elements of x that a thread holds
_PROGRAMS = 4  # an SM: one wave


def tile(N: int, words_of_row: int, bits: int, sms: int) -> Tile:
    """By rule, not timed yet: a thread has 16 bytes of a row; the width that leaves the fewest threads idle, then the widest.

    Args:
        N: rows of all weights. words_of_row: of 32 bits. bits: of a number.
    """
    widths = [w for w in (1024, 512, 256, 128) if launch.blocks(words_of_row, w) * 128 // bits <= _MOST_X] or [1024]
    WIDTH = min(widths, key=lambda w: (launch.blocks(words_of_row, w) * w, -w))
    rows = 4
    granules = max(1, min(8, N // (rows * _PROGRAMS * sms)))
    # One granule ahead is 8 KB of 8 bits or 4 KB of 4 a program; two spill here and there.
    return Tile(rows, WIDTH, launch.blocks(words_of_row, WIDTH), granules, 1, WIDTH // 128)


def gemv(
    kernel: str, x: Tensor, weights: tuple[Packed, ...], out: Tensor, *, norm: tuple[Tensor, Tensor, float] | None = None,
    bias: Tensor | None = None, residual: Tensor | None = None, gelu: bool = False, cache: Cache | None = None,
) -> None:  # fmt: skip
    """One row through `packed_gemv`; arguments as those of `gemv.run`."""
    weight = weights[0]
    N, K = weight.shape
    row = weight.blocks * 2 * weight.bits
    t = tile(N * len(weights), row, weight.bits, launch.multiprocessors(x))
    programs = launch.blocks(N, t.rows * t.granules)
    slots, lengths, starts, _, R = Cache.arguments(cache)
    values, scales = tuple(w.values for w in weights), tuple(w.scales for w in weights)
    launch.run(
        packed_gemv, programs * len(weights), x,
        x, norm, values, scales, bias, residual, out, slots, lengths, starts,
        K, N, weight.blocks, weight.scales.shape[1], t.granules, 0, R, GELU=gelu, BITS=weight.bits, GROUP=weight.group,
        ROWS=t.rows, WIDTH=t.WIDTH, CHUNKS=t.chunks, AHEAD=t.ahead, EVEN_K=K % BLOCK == 0 and row % t.WIDTH == 0,
        EVEN_N=N % (t.rows * t.granules) == 0, num_warps=t.warps, **launch.chained(kernel, x),
    )  # fmt: skip


_UNPACKED = 1024  # numbers of a program


@triton.jit
def _unpack(w_ptr, scale_ptr, out_ptr, K, blocks, groups, BITS: tl.constexpr, GROUP: tl.constexpr, BLOCK_K: tl.constexpr):
    """A piece of a row [N, K] in the dtype of `out`."""
    pieces = tl.cdiv(K, BLOCK_K)
    row, first = (tl.program_id(0) // pieces).to(tl.int64), tl.program_id(0) % pieces * BLOCK_K
    offs = first + tl.arange(0, BLOCK_K)
    x = unpacked_row(w_ptr, scale_ptr, row, offs, offs < K, blocks, groups, BITS, GROUP)
    tl.store(out_ptr + row * K + offs, x.to(out_ptr.dtype.element_ty), mask=offs < K)


@triton.jit
def unpacked_row(
    ptr, scale_ptr, row, offs, mask, blocks, groups, BITS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Numbers `offs` of a row in float32; in 4 bits those of a word are gathered, which caches bear."""
    scale_ptr += row * groups
    if BITS == 8:
        x = tl.load(ptr + row * (blocks * 64) + offs, mask=mask, other=0).to(tl.float32) * tl.load(scale_ptr)
    else:
        at = offs // 64 * 32 + offs % 16 * 2 + offs % 64 // 32  # byte of number 16 p + j: 2 j, and one more from p = 2 on
        byte = tl.load(ptr + row * (blocks * 32) + at, mask=mask, other=0).to(tl.int32)
        x = ((byte >> (offs % 32 // 16 * 4)) & 15).to(tl.float32) - 8
        x *= tl.load(scale_ptr + offs // GROUP, mask=mask, other=0).to(tl.float32)
    return x


def unpacked(weight: Weight, like: Tensor) -> Tensor:
    """The tensor [N, K] that a weight stands for, contiguous, in the dtype of `like`: what plain kernels and libraries take."""
    if isinstance(weight, Tensor):
        return weight.contiguous()
    (N, K), groups = weight.shape, weight.scales.shape[1]
    out = launch.empty((N, K), like)
    size = min(_UNPACKED, max(16, launch.power_of_2(K)))
    launch.run(
        _unpack, N * launch.blocks(K, size), like,
        weight.values, weight.scales, out, K, weight.blocks, groups, BITS=weight.bits, GROUP=weight.group, BLOCK_K=size,
        num_warps=4,
    )  # fmt: skip
    return out
