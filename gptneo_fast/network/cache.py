"""KVCache: the keys and values of past tokens. Global layers grow; local layers are a ring, bounded at the window."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..config import GPTNeoConfig, is_int
from ..errors import CacheError, InputError, short
from ..ops import extension
from .layer_cache import Copies, LayerCache, LayerView, Shown, lasting
from .touch import is_readable

SLACK = 128  # slots of a ring beyond its window
STEP = SLACK + 1  # longest step that may be appended before it attends: window - 1 + STEP slots
_GROWTH = 64  # slots are allocated in multiples of this
_LARGE = 8 << 20  # bytes of several pages


def windows_of(config: GPTNeoConfig) -> tuple[int, ...]:
    """Columns that a query of each layer sees; 0 for all."""
    return tuple(config.window(layer) for layer in range(config.num_layers))


def ring_slots(config: GPTNeoConfig, window: int) -> int:
    """R, the most slots that a layer ever has: window + 128 where it is local, all positions where it is global."""
    return min(window + SLACK, config.max_position_embeddings) if window else config.max_position_embeddings


def cache_bytes(config: GPTNeoConfig, batch: int, length: int, dtype: torch.dtype) -> int:
    """Bytes that keys and values of `batch` rows of `length` tokens take, after `KVCache(..., max_length=length)`."""
    slots = sum(min(length, ring_slots(config, window)) for window in windows_of(config))
    return 2 * batch * slots * config.hidden_size * dtype.itemsize


class KVCache(Shown):
    """Keys and values of the tokens that a batch has seen, per layer [B, H, slots, D].

    Token t of a row lives in slot t mod R. Slots hold real tokens only: left padding of an input is never stored, so rows
    of a batch may hold different numbers of tokens (`lengths`). The columns of the inputs, padding included, are counted
    by `get_seq_length()`; column c of row b is token `c - (get_seq_length() - lengths[b])`.

    Args:
        config: of the model.
        batch_size: rows.
        dtype, device: of the model.
        max_length: columns to allocate for at once; without it the cache grows as it fills.
        windows: columns that a query of each layer sees, 0 for all; None for those of the configuration.

    Raises:
        InputError: another kind of value.
    """

    def __init__(
        self,
        config: GPTNeoConfig,
        batch_size: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        max_length: int | None = None,
        windows: Sequence[int] | None = None,
    ) -> None:
        limit = config.max_position_embeddings
        if not is_int(batch_size) or not 0 <= batch_size < 2**31:
            raise InputError(f"batch_size {short(batch_size)} is not a number of rows")
        if max_length is not None and not (is_int(max_length) and 0 <= max_length <= limit):
            raise InputError(f"max_length {short(max_length)} is not an integer from 0 to {limit}, the model's positions")
        if not dtype.is_floating_point:
            raise InputError(f"dtype {dtype} holds no keys and values; give the model's")
        self.config = config
        self.windows = windows_of(config) if windows is None else tuple(windows)
        self.lengths = torch.zeros(batch_size, dtype=torch.int32, device=device)  # tokens of each row
        self.ragged = False  # whether any row holds fewer tokens than columns were seen
        self._seen = 0  # columns
        self._written = 0  # the most columns ever written; crop does not lower it
        self._ahead = [0] * len(self.windows)  # columns that a layer was given by hand and the others were not yet
        self._shown = [0] * len(self.windows)  # columns of which somebody may hold a view
        self._copies: Copies = {}
        self._slots = [ring_slots(config, window) for window in self.windows]
        with lasting():
            empty = torch.empty(batch_size, config.num_heads, 0, config.head_dim, dtype=dtype, device=device)
        self.keys: list[Tensor] = [empty] * len(self.windows)
        self.values: list[Tensor] = [empty] * len(self.windows)
        if max_length is not None:
            self.allocate(max_length, exact=True)

    @property
    def batch_size(self) -> int:
        """B."""
        return self.lengths.shape[0]

    @property
    def layers(self) -> tuple[LayerView, ...]:
        """The layers, under transformers' name."""
        return tuple(LayerView(self, layer) for layer in range(len(self)))

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values."""
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values))

    def get_seq_length(self, layer_idx: int | None = None) -> int:
        """Columns seen so far, left padding included: where the next input begins. The same for every layer, but while
        blocks are called by hand."""
        return self._seen + (self._ahead[layer_idx] if layer_idx is not None else 0)

    def reserve(self, T: int) -> None:
        """Make room for T more columns in every layer.

        Raises:
            CacheError: past the model's positions, or a call that failed midway has overwritten what this one needs.
        """
        end, limit = self._seen + T, self.config.max_position_embeddings
        if end > limit:
            raise CacheError(f"{self._seen} cached + {T} new tokens exceed the model's {limit} positions")
        if self._seen < self._oldest():
            raise CacheError("an earlier call failed midway and overwrote keys that are still needed; start a new cache")
        self._ahead = [0] * len(self.windows)  # a forward pass that failed midway
        self._take_edits()
        if any(self._shown):
            for layer in range(len(self)):
                self._keep_shown(layer, self._seen, T)
        self.allocate(end)
        self._written = max(self._written, end)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Append T columns to one layer, as a block that is called by hand does.

        Args:
            key_states, value_states: [B, H, T, D].

        Returns:
            Keys and values [B, H, S, D] of all columns; zeros where a ring has dropped them, which its window hides.
        """
        T, seen, limit = key_states.shape[2], self.get_seq_length(layer_idx), self.config.max_position_embeddings
        if seen + T > limit:
            raise CacheError(f"{seen} cached + {T} new tokens exceed the model's {limit} positions")
        self._take_edits()
        self._keep_shown(layer_idx, seen, T)
        self.allocate(seen + T)
        self._written = max(self._written, seen + T)
        found = LayerCache(self, layer_idx).update(key_states, value_states, layer_idx)
        self._ahead[layer_idx] += T
        if len(set(self._ahead)) == 1:  # all layers have it
            self.advance(self._ahead[layer_idx], None)
        return found

    def at(self, layer: int, starts: Tensor | None) -> LayerCache:
        """One layer, as a block gets it in a forward pass. starts: int32 [B], columns of left padding, or None."""
        return LayerCache(self, layer, starts)

    def writable(self, layer: int) -> tuple[Tensor, Tensor]:
        """Slots of keys and of values [B, H, R, D] that may be written to: copies where gradients flow through the old."""
        if torch.is_grad_enabled() and self.keys[layer].requires_grad:
            self.keys[layer], self.values[layer] = self.keys[layer].clone(), self.values[layer].clone()
        return self.keys[layer], self.values[layer]

    def advance(self, T: int, starts: Tensor | None) -> None:
        """Count T columns, of which `starts` [B] were left padding, once every layer has appended them."""
        self._seen += T
        self._ahead = [0] * len(self.windows)
        self.lengths = self.lengths + (T if starts is None else T - starts)
        self.ragged = self.ragged or starts is not None

    def crop(self, max_length: int) -> None:
        """Forget all columns from `max_length` on; a negative number forgets that many.

        Raises:
            InputError: no integer.
            CacheError: the ring of a local layer no longer holds the window before that place.
        """
        try:
            max_length = operator.index(max_length)
        except TypeError as error:
            raise InputError(
                f"max_length {short(max_length)} is no integer: columns to keep, or below 0 columns to forget"
            ) from error
        length = max_length if max_length >= 0 else self._seen + max_length
        if length >= self._seen:
            return
        if length < max(0, self._oldest()):
            raise CacheError(
                f"cannot crop to {short(length)} columns: local layers keep the newest {max(self._slots_of_rings())} of "
                f"{self._written} columns, so {self._oldest()} is the shortest; fork() before going on, or start again"
            )
        self._take_edits()
        padding = self._seen - self.lengths  # int32 [B]
        self._seen = length
        self.lengths = (length - padding).clamp(min=0)

    def reset(self) -> None:
        """Forget everything; the memory stays allocated."""
        self._seen = self._written = 0
        self._copies = {}
        self._ahead = [0] * len(self.windows)
        self.lengths = torch.zeros_like(self.lengths)
        self.ragged = False

    @lasting()
    def reorder_cache(self, rows: Tensor) -> None:
        """Keep these rows in this order, repeats allowed. rows: integer [B'], each from 0 to B - 1.

        Raises:
            InputError: another kind of tensor, or a row that there is not.
        """
        if not isinstance(rows, Tensor) or rows.dim() != 1 or rows.dtype not in (torch.int64, torch.int32):
            raise InputError(f"rows is {kind(rows)}; give an integer tensor [B'] of rows to keep")
        if is_readable() and bool(((rows < 0) | (rows >= self.batch_size)).any()):
            raise InputError(f"rows {rows.tolist()} are not all from 0 to {self.batch_size - 1}, the rows of this cache")
        self._take_edits()
        self.lengths = self.lengths.index_select(0, rows)
        self.keys = [t.index_select(0, rows) for t in self.keys]
        self.values = [t.index_select(0, rows) for t in self.values]

    def batch_select_indices(self, indices: Tensor | Sequence[int]) -> None:
        """As `reorder_cache`; rows may be a list, too."""
        try:
            rows = torch.as_tensor(indices, device=self.lengths.device)
        except (OverflowError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(f"indices {short(indices)} are no rows; give integers from 0 on") from error
        self.reorder_cache(rows)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times, one behind another."""
        self.reorder_cache(torch.arange(self.batch_size, device=self.lengths.device).repeat_interleave(repeats))

    @lasting()
    def fork(self) -> KVCache:
        """An independent copy, to continue the same past in another way."""
        self._take_edits()
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.lengths = self.lengths.clone()
        other.keys, other.values = [t.clone() for t in self.keys], [t.clone() for t in self.values]
        other._ahead, other._shown, other._copies = list(self._ahead), [0] * len(self), {}
        return other

    def rows(self, B: int, held: Sequence[int] = ()) -> KVCache:
        """A cache of B rows in the memory of the first B of this one: empty, or with `held` tokens in each row."""
        other = object.__new__(KVCache)
        other.__dict__.update(self.__dict__)
        other.keys, other.values = [t[:B] for t in self.keys], [t[:B] for t in self.values]
        other.lengths, other._shown, other.borrowed = self.lengths[:B], [0] * len(self), True
        other.reset()
        if held:
            other.lengths = torch.tensor(held, dtype=torch.int32, device=self.lengths.device)
            other._seen = other._written = max(held)
            other.ragged = min(held) < other._seen
        return other

    def copy_row(self, row: int, source: KVCache, source_row: int = 0, tokens: int | None = None) -> None:
        """Put a row of this cache, or of another of the same model, in the place of one; the other rows are not touched.

        Slots that hold tokens are copied: of a local layer its ring at most.

        Args:
            tokens: that the row holds; None to read it from `source.lengths`.

        Raises:
            CacheError: the layers of the two do not hold the same columns.
        """
        if source._slots != self._slots:
            raise CacheError(
                f"rows are copied between caches of equal layers; these have up to {source._slots} and {self._slots} slots: "
                "attention was patched in between, or the model is another one"
            )
        n = int(source.lengths[source_row]) if tokens is None else tokens
        self.allocate(n)
        for layer, most in enumerate(self._slots):
            used = min(n, most)
            self.keys[layer][row, :, :used] = source.keys[layer][source_row, :, :used]
            self.values[layer][row, :, :used] = source.values[layer][source_row, :, :used]
        self.lengths[row] = n
        self._seen = max(self._seen, n)
        self._written = max(self._written, n)
        self.ragged = True

    def _slots_of_rings(self) -> list[int]:
        return [slots for slots, window in zip(self._slots, self.windows, strict=True) if window] or [0]

    def _oldest(self) -> int:
        """The shortest length that the rings still hold the window of; a token of slot s is gone once s + R is written."""
        ring = max(self._slots_of_rings())
        if ring == 0 or self._written <= ring:
            return 0
        return self._written - ring + max(self.windows) - 1

    def allocate(self, columns: int, exact: bool = False) -> bool:
        """Lay out slots for this many columns in all, or with room to grow, where there are fewer; whether there were."""
        olds: list[tuple[list[Tensor], int]] = []
        shapes: list[tuple[int, ...]] = []
        for layer, most in enumerate(self._slots):
            old = self.keys[layer].shape[2]
            if old >= min(columns, most):
                continue
            slots = columns if exact else max(columns, old + old // 2)
            slots = min(slots if exact else -(-slots // _GROWTH) * _GROWTH, most)
            for tensors in (self.keys, self.values):
                B, H, _, D = tensors[layer].shape
                olds.append((tensors, layer))
                shapes.append((B, H, slots, D))
        with lasting():
            news = _zeros(shapes, self.keys[0]) if shapes else []
        for (tensors, layer), grown in zip(olds, news, strict=True):
            if old := tensors[layer].shape[2]:  # nothing has wrapped yet: slots are still token numbers
                grown[:, :, :old] = tensors[layer]
            tensors[layer] = grown
        return bool(news)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, layer: int) -> tuple[Tensor, Tensor]:
        return self.columns(range(len(self))[layer])

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys and values of each layer, see `columns`."""
        return (self[layer] for layer in range(len(self)))

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.batch_size} rows, {self._seen} columns, {self.nbytes / 2**20:.1f} MiB)"


def _zeros(shapes: list[tuple[int, ...]], like: Tensor) -> list[Tensor]:
    """Zeros of these shapes, of the dtype and on the device of another; on the CPU in large pages where they are worth it."""
    large = sum(map(math.prod, shapes)) * like.element_size() >= _LARGE
    if large and like.device.type == "cpu" and is_readable() and not torch.jit.is_tracing():
        wanted = [torch.empty(shape, dtype=like.dtype, device="meta") for shape in shapes]
        return [made.zero_() for made in extension.memory(wanted, like.device)]
    return [like.new_zeros(shape) for shape in shapes]


def kind(value: object) -> str:
    """What was given, for an error."""
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
