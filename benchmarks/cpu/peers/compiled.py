"""transformers' own model under torch.compile, with keys and values in a cache that does not grow."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import likeliest


class Compiled:
    """transformers' step, compiled for one new token; the prompt runs uncompiled.

    Only within the window: transformers takes the cache's length for the number of tokens, so that past the window a local
    layer looks at the wrong ones.
    """

    name: ClassVar[str] = "torch.compile, static cache"
    coarse: ClassVar[torch.dtype] = torch.float32

    def __init__(self, model: Any, threads: int, bits: int | None = None, backend: str = "inductor") -> None:
        torch.set_num_threads(threads)
        self.model, self.length = model, model.config.window_size
        names = inspect.signature(inspect.unwrap(type(model).forward)).parameters
        self.keyword = "cache" if "cache" in names else "past_key_values"  # the name depends on transformers' version
        self.step = torch.compile(self._logits, backend=backend)
        self.cache = self._cache()

    @staticmethod
    def why_not(dtype: torch.dtype, bits: int | None = None) -> str:
        """torch is always there."""
        return "" if bits is None else "torch.compile keeps weights as they are"

    def _cache(self) -> Any:
        from transformers import StaticCache

        return StaticCache(config=self.model.config, max_cache_len=self.length)

    def _logits(self, ids: Tensor, positions: Tensor) -> Tensor:
        """[1, V] after ids [1, T] at positions [1, T]."""
        kept = {self.keyword: self.cache}
        return self.model(ids, position_ids=positions, use_cache=True, logits_to_keep=1, **kept).logits[:, -1]

    @torch.no_grad()
    def decode(self, ids: Tensor, new: int) -> Tensor:
        """As `Peer`.

        Raises:
            ValueError: more tokens than the window has.
        """
        T, end = ids.shape[1], self.model.config.eos_token_id
        if T + new > self.length:
            raise ValueError(f"{T} + {new} tokens are past the window of {self.length}, where transformers' static cache errs")
        self.cache.reset()
        tokens = [likeliest(self._logits(ids, torch.arange(T)[None])[0], end)]
        while len(tokens) < new:
            at = torch.tensor([[T + len(tokens) - 1]])
            tokens.append(likeliest(self.step(torch.tensor([tokens[-1:]]), at)[0], end))
        return torch.cat([ids, torch.tensor([tokens])], 1)
