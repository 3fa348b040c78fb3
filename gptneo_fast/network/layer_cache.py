"""What is seen of a KVCache: its columns, to look at and to edit; and one layer of it, for readers and for blocks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import CacheError
from ..ops import reference

if TYPE_CHECKING:
    from .cache import KVCache

Copies = dict[int, tuple[tuple[Tensor, int], tuple[Tensor, int]]]  # layer -> its keys and values, each with its version


@contextmanager
def lasting() -> Iterator[None]:
    """What is made within it may be written to in any mode later, although the caller is in torch.inference_mode now."""
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():  # tracers know no such mode
        with torch.inference_mode(False), torch.no_grad():
            yield
    else:
        yield


class Shown:
    """The columns of a KVCache, in order: views of its memory where they lie so, else copies, of which edits are taken back."""

    borrowed = False  # whether the memory is another cache's, see KVCache.rows
    lengths: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    ragged: bool
    _seen: int
    _written: int
    _ahead: list[int]
    _shown: list[int]
    _slots: list[int]
    _copies: Copies

    if TYPE_CHECKING:

        def get_seq_length(self, layer_idx: int | None = None) -> int: ...

    def past(self, layer: int, columns: int) -> tuple[Tensor, Tensor]:
        """Views [B, H, min(columns, R), D] of the slots that hold the first `columns` columns."""
        used = min(columns, self._slots[layer])
        return self.keys[layer][:, :, :used], self.values[layer][:, :, :used]

    def in_order(self, layer: int) -> tuple[Tensor, Tensor]:
        """Copies [B, H, P, D] of the newest P = min(seen, R) columns, oldest first; a padding column holds garbage."""
        index, used = self._slots_in_order(layer)
        k, v = self.past(layer, used)
        return k.gather(2, _over(index, k)), v.gather(2, _over(index, v))

    def _slots_in_order(self, layer: int) -> tuple[Tensor, int]:
        """([B, P] the slots of the newest P = min(seen, R) columns, oldest first; P)."""
        lengths = self.lengths + self._ahead[layer]
        P = min(self.get_seq_length(layer), self._slots[layer])
        token = lengths[:, None] - P + torch.arange(P, device=lengths.device)
        return token.remainder(max(P, 1)), P

    @lasting()
    def columns(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, S, D] of all S columns that a layer has seen, to look at and to edit.

        What comes later leaves them as they are. Columns that a ring has dropped are zeros; edits of such as lie in order
        count at once, of others (behind padding, in a ring) with the next step.
        """
        if (held := self._copies.get(layer)) is not None:  # whoever asks twice edits the same
            return held[0][0], held[1][0]
        seen, most = self.get_seq_length(layer), self._slots[layer]
        if not self.ragged and not self.borrowed and self._written <= most:
            self._shown[layer] = max(self._shown[layer], seen)
            return self.past(layer, seen)
        gone = max(seen - most, self._written - most, 0)
        k, v = (torch.cat([t.new_zeros(*t.shape[:2], seen - t.shape[2], t.shape[3]), t], 2) for t in self.in_order(layer))
        k[:, :, :gone] = 0
        v[:, :, :gone] = 0
        if not torch.compiler.is_compiling():
            self._copies[layer] = (k, k._version), (v, v._version)
        return k, v

    def _take_edits(self) -> None:
        """Write copies that were edited back."""
        copies, self._copies = self._copies, {}
        for layer, ((k, before_k), (v, before_v)) in copies.items():
            if k._version != before_k or v._version != before_v:
                self.replace(layer, k, v)

    def _keep_shown(self, layer: int, seen: int, T: int) -> None:
        """Before T columns are written behind `seen`: leave slots that a view shows to the view, and go on with a copy."""
        shown = self._shown[layer]
        if shown and (seen < shown or seen + T > self._slots[layer]):
            with lasting():
                self.keys[layer], self.values[layer] = self.keys[layer].clone(), self.values[layer].clone()
            self._shown[layer] = 0

    @lasting()
    def replace(self, layer: int, keys: Tensor | None = None, values: Tensor | None = None) -> None:
        """Put others in the place of a layer's `columns`; of a ring, the newest that it holds count.

        Raises:
            CacheError: another shape.
        """
        self._take_edits()
        seen = self.get_seq_length(layer)
        for name, new, slots in (("keys", keys, self.keys), ("values", values, self.values)):
            if new is None:
                continue
            B, H, _, D = slots[layer].shape
            if tuple(new.shape) != (B, H, seen, D):
                raise CacheError(
                    f"{name} of layer {layer} has shape {list(new.shape)}, expected {[B, H, seen, D]}: rows, heads, columns "
                    "seen and their size; crop() forgets columns, reorder_cache() picks rows"
                )
            index, used = self._slots_in_order(layer)
            old, new = slots[layer], new[:, :, seen - used :].to(slots[layer])
            if self.borrowed:
                old[:, :, :used].scatter_(2, _over(index, new), new)
            else:
                slots[layer] = torch.cat([old[:, :, :used].scatter(2, _over(index, new), new), old[:, :, used:]], 2)


def _over(index: Tensor, like: Tensor) -> Tensor:
    """Slots [B, P] for every head and number of [B, H, P, D]."""
    return index[:, None, :, None].expand(-1, like.shape[1], -1, like.shape[3])


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
        if (given := key_states.shape[1::2]) != (held := keys.shape[1::2]):
            raise CacheError(
                f"layer {layer} gives keys of {given[0]} heads of {given[1]}, and the cache has {held[0]} of {held[1]}, as the "
                "configuration says; use_cache=False runs without"
            )
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
