"""One layer of a KVCache: as its reader sees it, and as a block that calls its own modules appends to it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..ops import reference

if TYPE_CHECKING:
    from .cache import KVCache


class LayerView:
    """One layer of a KVCache to look at and to edit."""

    def __init__(self, cache: KVCache, layer: int) -> None:
        self.cache, self.layer = cache, layer

    @property
    def keys(self) -> Tensor:
        """[B, H, S, D], see `KVCache.columns`; set it to replace them."""
        return self.cache.columns(self.layer)[0]

    @keys.setter
    def keys(self, new: Tensor) -> None:
        self.cache.replace(self.layer, keys=new)

    @property
    def values(self) -> Tensor:
        """As `keys`."""
        return self.cache.columns(self.layer)[1]

    @values.setter
    def values(self, new: Tensor) -> None:
        self.cache.replace(self.layer, values=new)

    @property
    def is_sliding(self) -> bool:
        """Whether the layer keeps the newest columns only."""
        return bool(self.cache.windows[self.layer])

    def get_seq_length(self) -> int:
        """Columns seen."""
        return self.cache.get_seq_length(self.layer)

    def update(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """As KVCache.update."""
        return self.cache.update(key_states, value_states, self.layer)


class LayerCache:
    """One layer of a KVCache in the hands of a block that calls its modules: it appends, then sees all columns."""

    def __init__(self, cache: KVCache, layer: int, starts: Tensor | None = None) -> None:
        self.cache, self.layer, self.starts = cache, layer, starts

    def get_seq_length(self, layer_idx: int | None = None) -> int:
        """Columns seen before."""
        return self.cache.get_seq_length(self.layer)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int | None = None) -> tuple[Tensor, Tensor]:
        """As KVCache.update, of this layer, whatever the index; the cache counts the columns once all layers have them."""
        cache, layer = self.cache, self.layer
        keys, values = cache.in_order(layer)
        slots = cache.writable(layer)
        lengths, slot = cache.lengths + cache._ahead[layer], slots[0]  # a block may be of another dtype, or device
        reference.kv_append(*slots, key_states.to(slot), value_states.to(slot), lengths, self.starts)
        B, H, _, D = key_states.shape
        gone = cache.get_seq_length(layer) - keys.shape[2]
        hidden = [key_states.new_zeros(B, H, gone, D)] if gone else []
        return (
            torch.cat([*hidden, keys.to(key_states), key_states], 2),
            torch.cat([*hidden, values.to(value_states), value_states], 2),
        )
