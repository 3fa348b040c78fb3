"""logprob: what the head's distribution says of one token a row, without more than a chunk of the logits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptneo_fast.ops import vocabulary
from gptneo_fast.ops.constants import LOGITS_ALIGN

from . import launch, packed
from .packed import Packed, Weight

CHUNK = 128 << 20  # bytes of logits that exist at one time
UNPACKED = 32 << 20  # bytes of rows of a packed weight that are unpacked at one time
BLOCK = 2048


@triton.jit
def _statistics(logits_ptr, stride, targets_ptr, logprob_ptr, rank_ptr, entropy_ptr, variance_ptr, V, BLOCK: tl.constexpr):
    """One row a program, read twice: for the largest, then for the sums."""
    row = tl.program_id(0)
    target = tl.load(targets_ptr + row).to(tl.int32)
    logits_ptr += row.to(tl.int64) * stride
    own = tl.load(logits_ptr + target).to(tl.float32)
    lanes = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    for i in range(0, V, BLOCK):
        ids = i + lanes
        best = tl.maximum(best, tl.load(logits_ptr + ids, mask=ids < V, other=float("-inf")).to(tl.float32))
    top = tl.max(best)
    # squares are summed about a number near the mean, that of the first few: about 0 little of their sum would be the variance
    few = lanes < V
    d = tl.where(few, tl.load(logits_ptr + lanes, mask=few, other=0.0).to(tl.float32) - top, 0.0)
    e = tl.where(few, tl.exp(d), 0.0)
    weight = tl.sum(e)
    centre = tl.where(weight > 0, tl.sum(e * d) / tl.maximum(weight, 1e-30), 0.0)
    total = tl.zeros((BLOCK,), tl.float32)
    first = tl.zeros((BLOCK,), tl.float32)
    second = tl.zeros((BLOCK,), tl.float32)
    above = tl.zeros((BLOCK,), tl.int32)
    for i in range(0, V, BLOCK):
        ids = i + lanes
        inside = ids < V
        x = tl.load(logits_ptr + ids, mask=inside, other=float("-inf")).to(tl.float32)
        d = tl.where(inside, x - top, 0.0)
        e = tl.where(inside, tl.exp(d), 0.0)
        d -= centre
        total += e
        first += e * d
        second += e * d * d
        above += (inside & ((x > own) | ((x == own) & (ids < target)))).to(tl.int32)
    sum_of_e = tl.sum(total)
    shift = tl.sum(first) / sum_of_e
    tl.store(logprob_ptr + row, own - top - tl.log(sum_of_e))
    tl.store(rank_ptr + row, tl.sum(above).to(tl.int64))
    tl.store(entropy_ptr + row, tl.log(sum_of_e) - (centre + shift))
    tl.store(variance_ptr + row, tl.sum(second) / sum_of_e - shift * shift)


def logprob(x: Tensor, weight: Weight, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the head's distribution over the vocabulary says of one token of each row, see `reference.statistics`.

    Args:
        x: [N, C], after the final norm. weight: [V, C].
        targets: int64 [N].

    Returns:
        Log-probability, rank (int64), entropy and variance, each [N].

    Raises:
        InputError, SetupError: see `launch.check`.
    """
    weight = packed.of("logprob", "weight", weight, x)
    launch.check("logprob", x, weight=weight)
    N, V = x.shape[0], weight.shape[0]
    width = V + -V % LOGITS_ALIGN
    rank = launch.empty((N,), x, torch.int64)
    own, entropy, variance = (launch.empty((N,), x, torch.float32) for _ in range(3))
    rows = max(1, CHUNK // (width * x.element_size()))
    logits = launch.empty((min(N, rows), width), x)
    for i in range(0, N, rows):
        piece = slice(i, min(i + rows, N))
        part = logits[: piece.stop - i, :V]
        _multiply(x[piece], weight, part)
        results = own[piece], rank[piece], entropy[piece], variance[piece]
        launch.run(_statistics, len(part), x, part, width, targets[piece].contiguous(), *results, V, BLOCK=BLOCK)
    return own, rank, entropy, variance


def _multiply(x: Tensor, weight: Weight, out: Tensor) -> None:
    """out = x @ weight.T; of a packed weight some rows are unpacked at a time."""
    if not isinstance(weight, Packed):
        vocabulary.logits(x, weight, out)
        return
    V, C = weight.shape
    rows = max(1, UNPACKED // (C * x.element_size()))
    for i in range(0, V, rows):
        some = packed.unpacked(weight.rows(i, min(i + rows, V)), x)
        torch.mm(x, some.t(), out=out[:, i : i + len(some)])
