"""Graphs: one token of every row in one launch, on devices that can capture it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..generation.captured import capturing
from ..generation.captured.pool import weights_of
from ..generation.captured.runner import BUCKETS, StepCache
from ..generation.request import LanguageModel
from ..network.cache import KVCache, lasting


class Graphs:
    """The forward pass of one token a row over the first rows of a cache, captured once for each bucket of rows.

    Rows of a bucket that nobody uses write into their own first slot. What a step draws with is the host's.
    """

    def __init__(self, model: LanguageModel, cache: KVCache) -> None:
        self.model, self.cache = model, cache
        self._steps: dict[int, tuple[capturing.Step, Tensor]] = {}
        self._weights: object = weights_of(model)
        with lasting():
            self._ids = torch.zeros(cache.batch_size, 1, dtype=torch.int64, device=model.device)
            self._places = torch.zeros_like(self._ids)
            self._lengths = torch.zeros(cache.batch_size, dtype=torch.int32, device=model.device)

    def serve(self) -> bool:
        """Whether steps are taken here: of kernels on CUDA, and while nobody has touched the model."""
        model = self.model
        return model.device.type == "cuda" and model.backend.name == "triton" and bool(model.looked())

    def _is_stale(self) -> bool:
        """Whether weights were moved, resized or merged since the steps were captured, which are then forgotten."""
        weights = weights_of(self.model)
        if weights == self._weights:
            return False
        self._weights, self._steps = weights, {}
        return True

    def logits(self, ids: Tensor, held: list[int]) -> Tensor:
        """Logits [B, V] after the newest tokens [B, 1] of rows that hold so many tokens before them; written over by the
        next call."""
        B = len(held)
        counts = torch.tensor(held, device=ids.device)
        self._ids[:B], self._places[:B, 0], self._lengths[:B] = ids, counts, counts.int()
        rows = min((n for n in BUCKETS if n >= B), default=B)
        rows = min(rows, self.cache.batch_size)
        self._ids[B:rows], self._places[B:rows], self._lengths[B:rows] = 0, 0, 0
        step, logits = self._steps.get(rows) or self._captured(rows)
        step.replay()
        if self._is_stale():  # asked while the device computes; the same slots are written over
            step, logits = self._captured(rows)
            step.replay()
        return logits[:B]

    def _captured(self, rows: int) -> tuple[capturing.Step, Tensor]:
        cache = StepCache(self.cache.rows(rows), self._lengths[:rows])
        ids, places = self._ids[:rows], self._places[:rows]
        with lasting():
            out = torch.zeros(rows, self.model.config.vocab_size, device=ids.device)

        def step() -> None:  # its effect on the cache is that of the replay which follows
            out.copy_(self.model.step(ids, places, None, cache)[:, -1])

        self._steps[rows] = capturing.capture(step, ids.device), out
        return self._steps[rows]
