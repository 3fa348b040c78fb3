"""What a model's generations leave to later ones: memory laid out, steps captured."""

from __future__ import annotations

import threading
from typing import cast

import torch
from torch import nn

from ...network.modules import walk
from ...ops.quantized import QuantizedWeight
from ..request import LanguageModel, Request
from .memory import check_memory
from .runner import BUCKETS, Runner
from .speculation import Speculation, draft_length

_COLUMNS = 256  # memory is laid out for multiples of this many
_KEPT = 4  # runners that a model keeps for later requests

Weights = tuple[tuple[int, torch.Size, torch.dtype] | float, ...]


class Pool:
    """Runners of a model that nobody uses, with the weights that their steps were captured with; a copy has none."""

    def __init__(self) -> None:
        self.weights: Weights = ()
        self.runners: list[Runner | Speculation] = []
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[Pool], tuple[()]]:
        return Pool, ()

    @property
    def nbytes(self) -> int:
        """Bytes laid out, of captured steps without what they allocate inside."""
        return sum(runner.nbytes for runner in self.runners)

    def take(self, model: LanguageModel, request: Request) -> Runner | Speculation:
        """A runner for a request that nobody else uses: one that an earlier request of its kind has left, or a new one.

        Raises:
            OutOfMemoryError: a new one has no room.
        """
        limit = model.config.max_position_embeddings
        columns = min(-(-request.total // _COLUMNS) * _COLUMNS, limit)
        rows = next(n for n in BUCKETS if n >= len(request.prompt.ids))
        key: tuple[object, ...] = (rows, columns)
        if request.drafts:
            helper = request.assistant
            key += (draft_length(request), request.options.max_matching_ngram_size)
            key += (None,) if helper is None else (id(helper), weights_of(helper))
        weights = weights_of(model)
        with self._lock:
            if self.weights != weights:  # moved, resized or merged since
                self.weights, self.runners = weights, []
            for runner in self.runners:
                if runner.key == key:
                    self.runners.remove(runner)
                    return runner
        check_memory(model, rows, columns, lambda: self.drop(model.device))
        made: Runner | Speculation = Runner(model, rows, columns)
        if isinstance(made, Runner) and request.drafts:
            guesser = None if request.assistant is None else Runner(request.assistant, 1, columns)
            made = Speculation(made, draft_length(request), guesser, request.options.max_matching_ngram_size)
        made.key = key
        return made

    def give_back(self, model: LanguageModel, runner: Runner | Speculation) -> None:
        """Keep a runner for later, as long as the model's weights are those that it was captured with."""
        weights = weights_of(model)
        with self._lock:
            if self.weights == weights:
                self.runners.append(runner)
                del self.runners[:-_KEPT]

    def drop(self, device: torch.device) -> None:
        """Free the memory that kept runners hold."""
        with self._lock:
            self.runners.clear()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def weights_of(model: LanguageModel) -> Weights:
    """What captured steps have burnt in: addresses, shapes and dtypes of the parameters, and the norms' epsilons."""
    found: list[tuple[int, torch.Size, torch.dtype] | float] = []
    for module in walk(cast(nn.Module, model)):
        found += [(p.data_ptr(), p.shape, p.dtype) for p in module._parameters.values() if p is not None]
        if isinstance(module, QuantizedWeight):
            found += [(t.data_ptr(), t.shape, t.dtype) for t in module._buffers.values() if t is not None]
        if "eps" in vars(module):
            found.append(vars(module)["eps"])
    return tuple(found)
