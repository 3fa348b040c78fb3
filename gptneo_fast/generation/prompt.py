"""Prompt: what a generation begins with, and the checks of what a caller gives for it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import CacheError, InputError
from ..network.cache import KVCache, kind
from ..network.inputs import check_cache, check_embeds, check_ids
from .config import Options

if TYPE_CHECKING:
    from .request import LanguageModel


@dataclass
class Prompt:
    """What a generation begins with; every tensor has B rows.

    ids: int64 [B, P]. mask: int64 [B, P] or wider by the columns of `cache`, zero for padding; None for none.
    """

    ids: Tensor
    mask: Tensor | None = None
    position_ids: Tensor | None = None
    token_type_ids: Tensor | None = None
    embeds: Tensor | None = None  # [B, P', C] in place of ids, which then may be [B, 0]
    cache: KVCache | None = None
    places: list[int] | None = None  # of the rows in the caller's list; None for 0 ... B - 1

    def expand(self, times: int) -> Prompt:
        """Every row `times` times; of the cache, once a generation begins."""
        if times == 1:
            return self
        rows = torch.arange(len(self.ids), device=self.ids.device).repeat_interleave(times)

        def wide(tensor: Tensor | None) -> Tensor | None:  # one row stands for all
            return tensor if tensor is None else tensor.expand(len(self.ids), *tensor.shape[1:])[rows]

        return replace(
            self,
            ids=self.ids[rows],
            mask=wide(self.mask),
            position_ids=wide(self.position_ids),
            token_type_ids=wide(self.token_type_ids),
            embeds=wide(self.embeds),
            places=None if self.places is None else [place for place in self.places for _ in range(times)],
        )

    def leftwards(self) -> Prompt:
        """The same texts with the padding that stands behind them put before them, where a continuation can follow.

        Raises:
            InputError: some columns are in a cache, which cannot be moved.
        """
        if self.mask is None or bool((self.mask[:, -1] != 0).all()):
            return self
        if self.cache is not None:
            raise InputError("a text padded on the right cannot continue past_key_values; pad it on the left")
        T = self.mask.shape[1]
        columns = torch.arange(T, device=self.mask.device)
        behind = T - 1 - ((self.mask != 0) * columns).argmax(1)  # [B] columns of padding behind the last token
        source = (columns - behind[:, None]) % T  # [B, T]

        def moved(tensor: Tensor | None) -> Tensor | None:
            if tensor is None or tensor.shape[1] != T:
                return tensor
            tensor = tensor.expand(len(source), *tensor.shape[1:])
            return tensor.take_along_dim(source if tensor.dim() == 2 else source[..., None], 1)

        ids, mask, embeds = moved(self.ids), moved(self.mask), moved(self.embeds)
        assert ids is not None
        return replace(
            self,
            ids=ids,
            mask=mask,
            position_ids=moved(self.position_ids),
            token_type_ids=moved(self.token_type_ids),
            embeds=embeds,
        )

    @property
    def columns(self) -> int:
        """Columns of the prompt in all, those in the cache included: of the mask, or of embeddings or ids without one."""
        return (self.ids if self.embeds is None else self.embeds).shape[1] if self.mask is None else self.mask.shape[1]

    @property
    def starts(self) -> Tensor | None:
        """int64 [B], columns before the first token of each row."""
        return None if self.mask is None else (self.mask != 0).int().argmax(1)


def padding_of(ids: Tensor, columns: int, past: int, mask: Tensor | None, options: Options) -> Tensor | None:
    """The mask [B, T] of the prompts' padding, or None where there is none.

    Args:
        ids: int64 [B, P]. columns: of the prompt, which are P or those of embeddings. past: columns in a cache.

    Raises:
        InputError: another shape, values beside 0 and 1, or a row of nothing but padding.
    """
    B, embedded = len(ids), columns != ids.shape[1]
    if mask is None:
        pad = options.pad_token_id
        if embedded or pad is None or pad in options.eos_ids or not bool((ids == pad).any()):
            return None
        mask = ids != pad
    if not isinstance(mask, Tensor):
        raise InputError(f"attention_mask is {kind(mask)}; give a tensor [{B}, {columns}], zero for padding")
    if mask.dim() == 1:
        mask = mask[None]
    if mask.dim() != 2 or len(mask) != B or mask.shape[1] not in (columns, columns + past):
        wanted = f"[{B}, {columns}]" + (f", or [{B}, {columns + past}] with those cached" if past else "")
        raise InputError(f"attention_mask has shape {list(mask.shape)}, input_ids {list(ids.shape)}; expected {wanted}")
    held = (mask != 0).to(ids.device)
    if not bool((held == mask.to(ids.device)).all()):
        raise InputError(f"attention_mask holds {mask[mask != held.to(mask)][0].item()}; 0 is padding and 1 a token")
    if bool(held.all()) and held.shape[1] == columns:
        return None
    if empty := (~held.any(1)).nonzero().flatten().tolist():
        raise InputError(f"row {empty[0]} of attention_mask is all padding; a prompt needs at least one token")
    return held.long()


def prompt_of(
    model: LanguageModel,
    ids: Tensor | None,
    mask: Tensor | None,
    embeds: Tensor | None,
    options: Options,
    *,
    position_ids: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    cache: Any = None,
) -> Prompt:
    """The prompt, checked, with its padding.

    Raises:
        InputError: ids, embeddings, a mask, positions or types that will not do. CacheError: a cache that will not.
    """
    config, device = model.config, model.device
    if embeds is not None:
        embeds = check_embeds(embeds, config, model.dtype)
        ids = torch.empty(len(embeds), 0, dtype=torch.long, device=device) if ids is None else ids
    elif ids is None:
        if options.bos_token_id is None:
            raise InputError("no prompt and no bos_token_id to begin with; give input_ids")
        ids = torch.tensor([[options.bos_token_id]], device=device)
    if embeds is None or not isinstance(ids, Tensor) or ids.numel():
        ids = check_ids("input_ids", ids, config.vocab_size, device)
    if not len(ids):
        raise InputError(f"input_ids has shape {list(ids.shape)}: there is no prompt in it; give at least one row")
    cache = check_cache(cache, model.transformer, ids)
    past = 0 if cache is None else int(cache.get_seq_length())
    times = max(options.num_beams, options.num_return_sequences)
    if isinstance(cache, KVCache) and cache.batch_size not in (len(ids), len(ids) * times):
        raise CacheError(f"past_key_values holds {cache.batch_size} rows, the input has {len(ids)}")
    columns = ids.shape[1] if embeds is None else embeds.shape[1]
    found = padding_of(ids, columns, past, mask, options)
    wide = columns if found is None else found.shape[1]  # with those cached, where the mask says so
    if cache is not None and past >= wide:
        name = "input_ids" if embeds is None else "inputs_embeds"
        raise CacheError(
            f"past_key_values holds {past} columns and {name} has {columns}: nothing is left to run; give the columns that are "
            "cached, too, or an attention_mask over both"
        )
    if position_ids is not None:
        position_ids = _columns("position_ids", position_ids, len(ids), (columns, wide), config.max_position_embeddings, device)
        position_ids = F.pad(position_ids, (wide - position_ids.shape[1], 0))
    if token_type_ids is not None:
        token_type_ids = _columns("token_type_ids", token_type_ids, len(ids), (columns, wide), config.vocab_size, device)
    return Prompt(ids, found, position_ids, token_type_ids, embeds, cache)


def _columns(name: str, given: Tensor, B: int, widths: tuple[int, ...], limit: int, device: torch.device) -> Tensor:
    """Ids int64 [B or 1, one of `widths`], each from 0 to limit - 1."""
    found = check_ids(name, given, limit, device)
    if len(found) not in (1, B) or found.shape[1] not in widths:
        raise InputError(f"{name} has shape {list(given.shape)}; expected [{B} or 1, {widths[0]}], one for each column")
    return found
