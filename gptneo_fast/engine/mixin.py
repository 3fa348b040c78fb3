"""EngineMixin: `generate`, `stream` and `generate_text` take the captured step by themselves where it can serve."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import NonFiniteLogitsError
from ..generation.loop import Request, broken_message
from ..generation.session import Prompt
from ..generation.text import TextGenerationMixin
from .memory import check_memory
from .plan import Drawing, why_stepwise
from .runner import BUCKETS, Runner, broken_rows

_COLUMNS = 256  # memory is laid out for multiples of this many
_KEPT = 4  # runners that a model keeps for later requests
_REPLAYS, _REPLAYS_STREAMED = 16, 4  # steps between looks at the device


@dataclass(frozen=True)
class Generation:
    """How a model generated last.

    path: "captured" (steps run on the device, the host looks now and then) or "stepwise".
    why: what asked for the path.
    """

    path: str
    why: str


class EngineMixin(TextGenerationMixin):
    """What GPTNeoForCausalLM adds to generation: captured steps on CUDA."""

    last_generation: Generation | None = None
    _idle: Idle | None = None

    @property
    def idle_runners(self) -> Idle:
        """What earlier generations leave to later ones: memory laid out, steps captured."""
        if self._idle is None:
            self._idle = Idle()
        return self._idle

    def _fast_steps(self, prompt: Prompt, request: Request, assistant: Any, streamed: bool) -> Iterator[Tensor] | None:
        why = self._why_stepwise(prompt, request, assistant)
        self.last_generation = Generation("captured" if why is None else "stepwise", why or "every option runs on the device")
        return None if why else self._captured(prompt, request, _REPLAYS_STREAMED if streamed else _REPLAYS)

    def _why_stepwise(self, prompt: Prompt, request: Request, assistant: Any) -> str | None:
        model: Any = self
        if model.backend.name != "triton" or model.device.type != "cuda":
            return f"the {model.backend.name} backend on {model.device.type} is stepwise"
        if assistant is not None:
            return "assistant_model asks for the stepwise path"
        if len(prompt.ids) > BUCKETS[-1]:
            return f"{len(prompt.ids)} rows are more than the {BUCKETS[-1]} that steps are captured for"
        return why_stepwise(prompt, request)

    def _captured(self, prompt: Prompt, request: Request, replays: int) -> Iterator[Tensor]:
        """New tokens [B, 1] int64 of each step; raises for broken rows after the others have ended."""
        model: Any = self
        drawing = Drawing.of(prompt, request, model.config.vocab_size)
        B, P = prompt.ids.shape
        pad = request.options.pad_id or 0
        runner = _take(model, B, request.total)
        pieces: list[Tensor] = []
        columns, broken, drawn = 0, [], torch.zeros(B, dtype=torch.int64)
        try:
            for tokens, status, drawn in runner.run(prompt.ids, prompt.mask, drawing, replays):
                places = torch.arange(columns, columns + tokens.shape[1])
                columns += tokens.shape[1]
                broken = broken_rows(status)
                piece = torch.where(places < drawn[:, None], tokens, pad).to(prompt.ids.device)
                pieces.append(piece)
                yield from piece.split(1, 1)
        finally:
            _give_back(model, runner)
        if broken:
            message = broken_message(broken, [P + int(drawn[i]) for i in broken])
            raise NonFiniteLogitsError(message, rows=broken, sequences=torch.cat([prompt.ids, *pieces], 1))


class Idle:
    """Runners of a model that nobody uses, with the weights that their steps were captured with; a copy has none."""

    def __init__(self) -> None:
        self.weights: tuple[Any, ...] = ()
        self.runners: list[Runner] = []

    def __reduce__(self) -> tuple[type[Idle], tuple[()]]:
        return Idle, ()


_lock = threading.Lock()


def _weights(model: Any) -> tuple[Any, ...]:
    """What captured steps have burnt in: addresses, shapes and dtypes of the parameters."""
    return tuple((p.data_ptr(), tuple(p.shape), p.dtype) for p in model.parameters())


def _take(model: Any, B: int, total: int) -> Runner:
    """A runner for B rows of `total` columns that nobody else uses; kept ones that fit come first."""
    rows = next(n for n in BUCKETS if n >= B)
    columns = min(-(-total // _COLUMNS) * _COLUMNS, model.config.max_position_embeddings)
    weights = _weights(model)
    with _lock:
        kept = model.idle_runners
        if kept.weights != weights:  # moved, resized or merged since
            kept.weights, kept.runners = weights, []
        for runner in kept.runners:
            if runner.rows == rows and runner.columns == columns:
                kept.runners.remove(runner)
                return runner
    check_memory(model, rows, columns, lambda: _drop(model))
    return Runner(model, rows, columns)


def _give_back(model: Any, runner: Runner) -> None:
    with _lock:
        kept = model.idle_runners
        if kept.weights == _weights(model):
            kept.runners.append(runner)
            del kept.runners[:-_KEPT]


def _drop(model: Any) -> None:
    """Free the memory that kept runners hold."""
    with _lock:
        model.idle_runners.runners.clear()
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
