"""The order in which a CPU has weights in few bits: words of 32 bits of 16 rows side by side, see `quantized`.

Integers are int32 [N, words] then and scales [N * groups], so that neither can be taken for those of files and GPUs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError

TILE = 16  # rows whose words lie side by side
_PIECE = 1 << 18  # words that are brought into order at one time


def is_side_by_side(values: Tensor) -> bool:
    """Whether integers lie so."""
    return values.dtype is torch.int32


def side_by_side(values: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Integers [N, bytes] and scales [N, groups] that lie row by row, in the other order; copies."""
    _check(scales, 2)
    values = values.contiguous()
    if values.storage_offset() % 4:
        values = values.clone()
    return _turned(values.view(torch.int32)), _turned(scales).flatten()


def side_by_side_(values: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """The same in their own memory, which nobody else may have."""
    words = values.view(torch.int32)
    for t in (words, scales):
        for part in t.split(max(1, _PIECE // (TILE * max(1, t.shape[1]))) * TILE):
            part.copy_(_turned(part))
    return words, scales.flatten()


def row_by_row(values: Tensor, scales: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Integers [N, bytes] of a dtype and scales [N, groups] of either order, row by row; copies where they lay otherwise."""
    if not is_side_by_side(values):
        _check(scales, 2)
        return values, scales
    return _turned_back(values).view(dtype), scales_of(scales, len(values))


def scales_of(scales: Tensor, N: int) -> Tensor:
    """Scales [N, groups], row by row, of those that lie side by side."""
    _check(scales, 1)
    return _turned_back(scales.view(N, -1))


def integers(words: Tensor, bits: int) -> Tensor:
    """int32 [n, numbers] of words [n, words] that lie row by row; without a view of another dtype, which no tracer knows."""
    if bits == 8:
        bits_before = torch.arange(0, 32, 8, device=words.device)
        return ((torch.bitwise_right_shift(words[..., None], bits_before) & 255 ^ 128) - 128).flatten(1)
    bits_before = torch.arange(0, 16, 4, device=words.device)[:, None, None] + torch.arange(0, 32, 16, device=words.device)
    blocks = words.view(len(words), words.shape[1] // 8, 1, 8, 1)
    return ((torch.bitwise_right_shift(blocks, bits_before) & 15) - 8).flatten(1)  # number 16 p + 2 i + h of a block of 64


def all_integers(words: Tensor, bits: int) -> Tensor:
    """int32 [N, numbers] of words [N, words] that lie side by side."""
    return integers(_turned_back(words), bits)


def rows(t: Tensor, ids: Tensor, N: int) -> Tensor:
    """Rows [n, W], for ids [n], of what lies side by side, words or scales of N rows."""
    W = t.numel() // N
    whole = N // TILE * TILE
    first = torch.where(ids < whole, ids // TILE * (TILE * W) + ids % TILE, whole * W + ids - whole)
    step = torch.where(ids < whole, TILE, N - whole)
    places = first[:, None] + step[:, None] * torch.arange(W, device=ids.device)
    return t.flatten().index_select(0, places.flatten()).view(-1, W)  # refuses ids below 0 and from N on


def _check(scales: Tensor, axes: int) -> None:
    if scales.dim() != axes:
        lie, others = ("side by side", "row by row")[:: 1 if axes == 1 else -1]
        raise InputError(f"integers lie {lie}, but scales {list(scales.shape)} {others}; set both, or neither")


def _turned(t: Tensor) -> Tensor:
    """[N, W], of 16 rows the columns one behind the other, of fewer at the end likewise."""
    N, W = t.shape
    whole = N // TILE * TILE
    return torch.cat([t[:whole].reshape(-1, TILE, W).mT.reshape(-1, W), t[whole:].T.reshape(-1, W)])


def _turned_back(t: Tensor) -> Tensor:
    N, W = t.shape
    whole = N // TILE * TILE
    return torch.cat([t[:whole].reshape(-1, W, TILE).mT.reshape(-1, W), t[whole:].reshape(W, -1).T.reshape(-1, W)])
