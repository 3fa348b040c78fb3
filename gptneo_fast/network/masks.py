"""What an attention mask says of each row: nothing, a range of columns (the fast form), or something only a tensor can."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import CacheError, InputError
from .cache import KVCache, kind
from .touch import is_readable


@dataclass(frozen=True)
class Rows:
    """Which of the T new columns of each row are tokens.

    starts: int32 [B], columns of left padding, or None for none.
    ends: int32 [B], one past the last token where rows are padded on the right, or None.
    mask: [B or 1, H or 1, T or 1, S] over past and new columns, boolean or additive, where a range cannot say it.
    """

    starts: Tensor | None = None
    ends: Tensor | None = None
    mask: Tensor | None = None


def rows_of(attention_mask: Tensor | None, B: int, T: int, cache: Any, position_ids: Tensor | None = None) -> Rows:
    """Read an attention mask as `transformers` means it: over the columns already cached and the T new ones.

    Args:
        attention_mask: [B, S] of zeros (padding) and others, or [B or 1, H or 1, T, S], boolean or additive, S being
            the cached columns + T; None where every new column is a token.
        position_ids: [B or 1, T] as the caller gave them; with neither mask nor cache they keep texts of one row apart.

    Raises:
        InputError: another shape or dtype.
        CacheError: the mask shows columns that were padding when they were cached, and so were never stored.
    """
    if attention_mask is None:
        return Rows(mask=_packed(position_ids) if position_ids is not None and cache is None else None)
    if not isinstance(attention_mask, Tensor):
        raise InputError(f"attention_mask is {kind(attention_mask)}; give a tensor [{B}, columns], zero for padding")
    past = cache.get_seq_length() if cache is not None else 0
    if attention_mask.dim() == 4:
        return Rows(mask=_four_dims(attention_mask, B, T, past))
    if tuple(attention_mask.shape) != (B, past + T):
        raise InputError(
            f"attention_mask has shape {list(attention_mask.shape)}; expected [{B}, {past + T}]: "
            f"{B} rows of {past} cached + {T} new columns (or 4 dimensions)"
        )
    held = attention_mask != 0  # [B, S]
    if not isinstance(cache, KVCache | None):  # another library's, which stores padding, too
        return Rows(mask=held[:, None, None])
    if not is_readable():
        return Rows(mask=held[:, None, None])
    if bool(held.all()) and (cache is None or not cache.ragged):
        return Rows()
    old, new = held[:, :past], held[:, past:]
    if cache is not None and cache.ragged:
        stored = torch.arange(past, device=held.device) >= (past - cache.lengths)[:, None]
        if bool((old & ~stored).any()):
            raise CacheError(
                "attention_mask shows columns that were left padding when they were cached and so were never stored; "
                "pass the mask of the first call, extended by ones"
            )
        uniform_past = bool((old == stored).all())
    else:
        uniform_past = bool(old.all())

    columns = torch.arange(T, device=held.device)
    any_token = new.any(1)
    starts = torch.where(any_token, new.int().argmax(1), T)
    ends = torch.where(any_token, T - new.flip(1).int().argmax(1), T)
    is_range = ((columns >= starts[:, None]) & (columns < ends[:, None])) == new
    left = bool((starts > 0).any())
    right = bool((ends < T).any())
    holes = not bool(is_range.all()) or not uniform_past
    if cache is not None and past:  # padding after tokens that are cached leaves a hole too
        holes = holes or right or bool(((starts > 0) & (cache.lengths > 0)).any())
    if holes:
        return Rows(mask=held[:, None, None])
    return Rows(starts.int() if left else None, ends.int() if right else None)


def _packed(position_ids: Tensor) -> Tensor | None:
    """What keeps apart the texts that stand one behind another in a row: boolean [B or 1, 1, T, T]; None where a row is one.

    Args:
        position_ids: [B or 1, T]; a text goes on where they go on by one.
    """
    text = (position_ids.diff(dim=1, prepend=position_ids[:, :1] - 1) != 1).cumsum(1)  # [B or 1, T], its number in the row
    if is_readable() and not bool(text.any()):
        return None
    return text[:, None, :, None] == text[:, None, None, :]


def _four_dims(mask: Tensor, B: int, T: int, past: int) -> Tensor:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise InputError(f"a 4-D attention_mask is boolean or additive (floating point), not {mask.dtype}")
    if mask.shape[0] not in (1, B) or mask.shape[2] not in (1, T) or mask.shape[3] != past + T:
        raise InputError(
            f"attention_mask has shape {list(mask.shape)}; expected [{B} or 1, heads or 1, {T}, {past + T}] "
            f"for {past} cached + {T} new columns"
        )
    return mask


def dense(rows: Rows, B: int, T: int, cache: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The additive mask [B or 1, H or 1, T or 1, S] that modules get: causality and padding, the window not among them.

    Args:
        cache: of the S - T columns before.
        dtype: of the mask: 0 where a column may be seen, else the type's least number.
    """
    past = 0 if cache is None else cache.get_seq_length()
    mask, columns = rows.mask, torch.arange(past + T, device=device)
    if mask is not None and mask.is_floating_point():
        return mask
    if mask is None:
        held = torch.ones(1, past + T, dtype=torch.bool, device=device)
        first = past if rows.starts is None else past + rows.starts[:, None]
        if isinstance(cache, KVCache) and cache.ragged and past:  # columns that were never stored may not be seen
            held = (columns >= (past - cache.lengths)[:, None]) & ((columns < past) | (columns >= first))
        elif rows.starts is not None:
            held = (columns < past) | (columns >= first)
        if rows.ends is not None:
            held = held & (columns < past + rows.ends[:, None])
        mask = held[:, None, None]
    causal = columns <= torch.arange(past, past + T, device=device)[:, None]  # [T, S]
    seen = causal & mask
    hidden = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=device)
    return torch.where(seen.expand(B, -1, -1, -1), torch.zeros_like(hidden), hidden)
