"""DynamicCache: a KVCache that is made before its model is known."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..config import GPTNeoConfig
from ..errors import CacheError, InputError
from .cache import KVCache, kind


class DynamicCache(KVCache):
    """A KVCache under transformers' name and arguments: it takes its shape from the first model that it is given to.

    Args:
        ddp_cache_data: keys and values [B, H, S, D] of each layer to begin with; needs a config.
        config: of the model, for those who `update` by hand before a model has seen it.

    Raises:
        InputError: another kind of value, or offloading, which is not offered.
    """

    def __init__(
        self,
        ddp_cache_data: Iterable[Sequence[Tensor]] | None = None,
        config: GPTNeoConfig | None = None,
        offloading: bool = False,
        offload_only_non_sliding: bool = False,
    ) -> None:
        if not isinstance(config, GPTNeoConfig | None):
            raise InputError(f"config is {kind(config)}; give a GPTNeoConfig, as model.config is")
        if offloading:
            raise InputError("offloading is not offered: local layers are bounded at their window; leave it out")
        if ddp_cache_data is not None and config is None:
            raise InputError("keys and values say nothing of windows; give config=model.config, too")
        self._given = config
        vars(self).update(windows=(), keys=[], values=[], lengths=torch.zeros(0, dtype=torch.int32), ragged=False)
        vars(self).update(_seen=0, _written=0, _ahead=[], _shown=[], _copies={}, _slots=[])
        for layer, pair in enumerate(ddp_cache_data or ()):
            self.update(pair[0], pair[1], layer)

    def get_seq_length(self, layer_idx: int | None = None) -> int:
        """As KVCache.get_seq_length; 0 before there is a layer."""
        return super().get_seq_length(layer_idx) if self.windows else 0

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """As KVCache.update.

        Raises:
            CacheError: neither a model nor a config has said what is to be held.
        """
        if not self.windows:
            if self._given is None:
                raise CacheError("the cache has no shape yet; give it to a model first, or make it with config=model.config")
            self.take(KVCache(self._given, len(key_states), dtype=key_states.dtype, device=key_states.device))
        return super().update(key_states, value_states, layer_idx)

    def fits(self, rows: int) -> bool:
        """Whether it has the shape for so many rows, or holds something, so that it can take no other."""
        return bool(self.windows) and (self.batch_size == rows or bool(self._seen) or any(self._ahead))

    def take(self, other: KVCache) -> None:
        """Become what an empty cache is."""
        vars(self).update(vars(other))
