"""Products with a weight of many rows and an odd number of them: the head's, 50257."""

from __future__ import annotations

import torch
from torch import Tensor

WHOLE = 128  # columns of a tile of the library


def logits(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """out [N, V] = x @ weight.T by the library.

    For an odd V it takes kernels that store one element at a time: 1.1 ms for 512 rows of 1.3B on an H200, of which whole tiles
    take a fifth. The last rows of the weight go alone.

    Args:
        x: [N, C]. weight: [V, C]. out: [N, V], of any row stride.
    """
    V = weight.shape[0]
    whole = V - V % WHOLE if V % 8 else V
    if whole:
        torch.mm(x, weight[:whole].t(), out=out[:, :whole])
    if whole < V:
        torch.mm(x, weight[whole:].t(), out=out[:, whole:])
