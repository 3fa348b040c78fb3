"""Products of many rows with a weight; bias, gelu_new and residual on the way out.

One kernel; what it adds to the product are constexprs. A norm before it is a kernel of its own: within this one every
column tile would redo the statistics of its rows. Few rows belong to `few`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import few, launch, norms, tiles

_GROUP_M = 8  # row tiles that run side by side and share the tiles of the weight in L2


def norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    gelu: bool,
    out: Tensor | None = None,
) -> Tensor:
    """LayerNorm, linear, and with `gelu` gelu_new (Hendrycks and Gimpel 2016, section 2).

    A few rows go as `few` says. More are two kernels: `layer_norm`, then a product with bias and gelu in its epilogue. In 16
    bits that is cuBLASLt's on a GPU; in float32, where the library may take TF32 or an approximate gelu, and where kernels
    are interpreted it is the kernel of this file.

    Args:
        x: [..., C]. norm_weight, norm_bias: [C].
        weight: [F, C]. bias: [F].
        out: contiguous [..., F] for the result, or None for new memory.

    Returns:
        [..., F]

    Raises:
        InputError, SetupError: see `launch.check`.
    """
    launch.check("norm_linear", x, norm_weight=norm_weight, norm_bias=norm_bias, weight=weight, bias=bias, out=out)
    C, F, shape = x.shape[-1], weight.shape[0], (*x.shape[:-1], weight.shape[0])
    launch.expect("norm_linear", like=x, norm_weight=(norm_weight, (C,)), norm_bias=(norm_bias, (C,)))
    launch.expect("norm_linear", like=x, weight=(weight, (F, C)), bias=(bias, (F,)), out=(out, shape))
    rows = launch.as_rows(x)
    y = launch.empty(shape, x) if out is None else out
    if rows.shape[0] <= few.ROWS:
        few.multiply(
            "norm_linear", rows, (weight,), y.view(-1, F), norm=(norm_weight, norm_bias), eps=eps, bias=bias, gelu=gelu
        )
        return y
    rows = norms.layer_norm(rows, norm_weight, norm_bias, eps)
    if launch.INTERPRETED or rows.dtype == torch.float32:
        _multiply(rows, (weight,), (y,), bias=bias, gelu=gelu)
    else:
        _multiply_by_library(rows, weight, bias, gelu, y.view(-1, F))
    return y


def norm_qkv(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, eps: float
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
    launch.check("norm_qkv", x, norm_weight=norm_weight, norm_bias=norm_bias, wq=wq, wk=wk, wv=wv)
    C = x.shape[-1]
    launch.expect("norm_qkv", like=x, norm_weight=(norm_weight, (C,)), norm_bias=(norm_bias, (C,)))
    launch.expect("norm_qkv", like=x, **{name: (w, (wq.shape[0], C)) for name, w in (("wq", wq), ("wk", wk), ("wv", wv))})
    rows = launch.as_rows(x)
    q, k, v = (launch.empty((*x.shape[:-1], wq.shape[0]), x) for _ in range(3))
    _multiply(norms.layer_norm(rows, norm_weight, norm_bias, eps), (wq, wk, wv), (q, k, v))
    return q, k, v


def linear_add(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, out: Tensor | None = None) -> Tensor:
    """residual + x @ weight.T + bias in one kernel, summed in float32.

    Args:
        x: [..., K]. weight: [C, K]. bias: [C].
        residual: [..., C]. out: contiguous [..., C] for the result, which may be the residual; None for new memory.

    Returns:
        [..., C]

    Raises:
        InputError, SetupError: see `launch.check`.
    """
    launch.check("linear_add", x, weight=weight, bias=bias, residual=residual, out=out)
    C, shape = weight.shape[0], (*x.shape[:-1], weight.shape[0])
    launch.expect("linear_add", like=x, weight=(weight, (C, x.shape[-1])), bias=(bias, (C,)))
    launch.expect("linear_add", like=x, residual=(residual, shape), out=(out, shape))
    rows = launch.as_rows(x)
    y = launch.empty(shape, x) if out is None else out
    if rows.shape[0] <= few.ROWS:
        few.multiply("linear_add", rows, (weight,), y.view(-1, C), bias=bias, residual=launch.as_rows(residual))
    else:
        _multiply(rows, (weight,), (y,), bias=bias, residual=launch.as_rows(residual))
    return y


def _multiply(
    rows: Tensor,
    weights: tuple[Tensor, ...],
    results: tuple[Tensor, ...],
    bias: Tensor | None = None,
    gelu: bool = False,
    residual: Tensor | None = None,
) -> None:
    """Launch the kernel. rows: contiguous [M, K]; weights: one or three of [N, K]; results: as many, contiguous [M, N]."""
    (M, K), N = rows.shape, weights[0].shape[0]
    tile = tiles.linear(rows.dtype, M, N * len(weights), launch.multiprocessors(rows))
    programs = launch.blocks(M, tile.M) * launch.blocks(N, tile.N) * len(weights)
    weights = tuple(w.contiguous() for w in weights)  # as parameters are
    w, y = (t if len(t) == 3 else t * 3 for t in (weights, results))
    others = (rows if bias is None else bias, rows if residual is None else residual)
    launch.run(
        _linear_kernel, programs, rows,
        rows, *w, *others, *y, M, N, K,
        WEIGHTS=len(weights), BIAS=bias is not None, GELU=gelu, RESIDUAL=residual is not None,
        EVEN_K=K % tile.K == 0, GROUP_M=_GROUP_M, **tile.meta,
    )  # fmt: skip


def _multiply_by_library(rows: Tensor, weight: Tensor, bias: Tensor, gelu: bool, y: Tensor) -> None:
    """y = rows @ weight.T + bias, then gelu_new, by cuBLASLt with its epilogue, in the dtype of the rows."""
    with torch.no_grad(), torch.autocast("cuda", enabled=False):
        if gelu:
            torch._addmm_activation(bias, rows, weight.t(), use_gelu=True, out=y)  # the tanh form on CUDA, and only there
        else:
            torch.addmm(bias, rows, weight.t(), out=y)


@triton.jit(do_not_specialize=["M"])
def _linear_kernel(
    x_ptr, w0_ptr, w1_ptr, w2_ptr, bias_ptr, residual_ptr, y0_ptr, y1_ptr, y2_ptr,
    M, N, K,
    WEIGHTS: tl.constexpr, BIAS: tl.constexpr, GELU: tl.constexpr, RESIDUAL: tl.constexpr,
    EVEN_K: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = GROUP_M * tiles_n * WEIGHTS  # programs of GROUP_M row tiles
    first_m = pid // group * GROUP_M
    size_m = tl.minimum(tiles_m - first_m, GROUP_M)
    pid_m = first_m + pid % group % size_m
    pid_n = pid % group // size_m
    which = pid_n // tiles_n  # of the weights
    w_ptr, y_ptr = w0_ptr, y0_ptr
    if WEIGHTS == 3:
        if which == 1:
            w_ptr, y_ptr = w1_ptr, y1_ptr
        if which == 2:
            w_ptr, y_ptr = w2_ptr, y2_ptr
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    # Rows past the edges repeat the last one, so that loads need no mask; only the store leaves them out.
    x_ptrs = x_ptr + tl.minimum(offs_m, M - 1).to(tl.int64)[:, None] * K + offs_k[None, :]  # [M, K]
    w_ptrs = w_ptr + tl.minimum(offs_n, N - 1).to(tl.int64)[:, None] * K + offs_k[None, :]  # [N, K]

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, K, BLOCK_K):
        if EVEN_K:
            x, w = tl.load(x_ptrs + k), tl.load(w_ptrs + k)
        else:
            held = offs_k[None, :] < K - k
            x, w = tl.load(x_ptrs + k, mask=held, other=0.0), tl.load(w_ptrs + k, mask=held, other=0.0)
        acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")

    rows_at = offs_m.to(tl.int64)[:, None] * N
    mask_m = (offs_m < M)[:, None]
    if BLOCK_N > 128:  # in halves: a residual as wide as the sums would not fit in the registers beside them
        HALF: tl.constexpr = BLOCK_N // 2
        first, second = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, HALF)), (0, 2, 1)))
        offs_half = pid_n % tiles_n * BLOCK_N + tl.arange(0, HALF)
        _finish(first, y_ptr, bias_ptr, residual_ptr, rows_at, mask_m, offs_half, N, BIAS, GELU, RESIDUAL)
        _finish(second, y_ptr, bias_ptr, residual_ptr, rows_at, mask_m, offs_half + HALF, N, BIAS, GELU, RESIDUAL)
    else:
        _finish(acc, y_ptr, bias_ptr, residual_ptr, rows_at, mask_m, offs_n, N, BIAS, GELU, RESIDUAL)


@triton.jit
def _finish(
    acc, y_ptr, bias_ptr, residual_ptr, rows_at, mask_m, offs_n, N,
    BIAS: tl.constexpr, GELU: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Bias, gelu_new and residual on a tile of sums, and its store."""
    mask_n = offs_n < N
    at, mask = rows_at + offs_n[None, :], mask_m & mask_n[None, :]
    if BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    if GELU:  # x/2 (1 + tanh(u)) = x / (1 + exp(-2u))
        acc = acc / (1.0 + tl.exp(-2.0 * 0.7978845608028654 * (acc + 0.044715 * acc * acc * acc)))  # sqrt(2 / pi)
    if RESIDUAL:
        acc += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, acc.to(y_ptr.dtype.element_ty), mask=mask)
