"""Products with a weight of many rows and an odd number of them: the head's, 50257."""

from __future__ import annotations

import torch
from torch import Tensor

WHOLE = 128  # columns of a tile of the library


def logits(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """out [N, V] = x @ weight.T by the library.

    For a V that 8 does not divide its kernels are several times slower: 512 rows of 1.3B and their loss take it 1.19 ms on an
    H200, where `logprob`, with whole tiles apart from the last rows of the weight, takes 0.29
    (`benchmarks/results/gpu_h200.json`).

    Args:
        x: [N, C]. weight: [V, C]. out: [N, V], of any row stride.
    """
    V = weight.shape[0]
    whole = V - V % WHOLE if V % 8 else V
    if whole:
        torch.mm(x, weight[:whole].t(), out=out[:, :whole])
    if whole < V:
        torch.mm(x, weight[whole:].t(), out=out[:, whole:])
