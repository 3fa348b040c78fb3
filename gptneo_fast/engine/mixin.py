"""EngineMixin: `generate`, `stream` and `generate_text` take the captured step by themselves where it can serve."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import NonFiniteLogitsError
from ..generation.loop import Request, broken_message, joined
from ..generation.session import Prompt
from ..generation.text import TextGenerationMixin
from .memory import check_memory
from .plan import Drawing, why_stepwise
from .runner import BUCKETS, Runner, broken_rows
from .speculation import Speculation, draft_length, why_not_drafts

_COLUMNS = 256  # memory is laid out for multiples of this many
_KEPT = 4  # runners that a model keeps for later requests
_REPLAYS, _REPLAYS_STREAMED = 16, 4  # steps between looks at the device


@dataclass(frozen=True)
class Generation:
    """How a model generated last.

    path: "captured" (steps are graphs on the device, the host looks now and then), "launched" (the same steps, which could
        not be captured: their kernels are launched one by one), or "stepwise" (the host draws every token).
    why: what asked for the path, or stood in the way of a capture.
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

    def release_memory(self) -> int:
        """Free what generation keeps for later calls (caches, captured steps); the bytes laid out for it, of captured steps
        without what they allocate inside."""
        held = sum(runner.nbytes for runner in self.idle_runners.runners)
        _drop(self)
        return held

    def _fast_steps(self, prompt: Prompt, request: Request, assistant: Any, streamed: bool) -> Iterator[Tensor] | None:
        why = self._why_stepwise(prompt, request, assistant)
        if why is not None:
            self.last_generation = Generation("stepwise", why)
            return None
        return self._captured(prompt, request, assistant, _REPLAYS_STREAMED if streamed else _REPLAYS)

    def _why_stepwise(self, prompt: Prompt, request: Request, assistant: Any) -> str | None:
        models: list[Any] = [self, assistant]
        for model in models:
            if model is not None and (model.backend.name != "triton" or model.device.type != "cuda"):
                return f"the {model.backend.name} backend on {model.device.type} is stepwise"
        return self._wishes(prompt, request, assistant)

    def _wishes(self, prompt: Prompt, request: Request, assistant: Any) -> str | None:
        """Which of a request's wishes needs the host, on a device that can capture."""
        if len(prompt.ids) > BUCKETS[-1]:
            return f"{len(prompt.ids)} rows are more than the {BUCKETS[-1]} that steps are captured for"
        why = why_stepwise(prompt, request)
        if why is None and (assistant is not None or request.options.prompt_lookup_num_tokens is not None):
            why = why_not_drafts(prompt, request, assistant)
        return why

    def _captured(self, prompt: Prompt, request: Request, assistant: Any, replays: int) -> Iterator[Tensor]:
        """New tokens [B, 1] int64 of each step, on the host: to send one to the device would mean to wait for the steps that
        are queued there. Raises for broken rows after the others have ended."""
        model: Any = self
        drawing = Drawing.of(prompt, request, model.config.vocab_size)
        B, P = prompt.ids.shape
        pad = request.options.pad_id or 0
        drafts = assistant is not None or request.options.prompt_lookup_num_tokens is not None
        runner = _take_drafting(model, request, assistant) if drafts else _take(model, B, request.total)
        pieces: list[Tensor] = []
        columns, broken, drawn = 0, [], torch.zeros(B, dtype=torch.int64)
        try:
            for tokens, status, drawn in runner.run(prompt.ids, prompt.mask, drawing, replays):
                if not pieces:
                    self.last_generation = _generation(runner.why_launched)
                places = torch.arange(columns, columns + tokens.shape[1])
                columns += tokens.shape[1]
                broken = broken_rows(status)
                piece = torch.where(places < drawn[:, None], tokens, pad)
                pieces.append(piece)
                yield from piece.split(1, 1)
        finally:
            _give_back(model, runner)
        if broken:
            message = broken_message(broken, [P + int(drawn[i]) for i in broken])
            raise NonFiniteLogitsError(message, rows=broken, sequences=joined(prompt.ids, pieces))


def _generation(why_launched: str | None) -> Generation:
    if why_launched is None:
        return Generation("captured", "every option runs on the device")
    return Generation("launched", f"the step could not be captured: {why_launched}")


class Idle:
    """Runners of a model that nobody uses, with the weights that their steps were captured with; a copy has none."""

    def __init__(self) -> None:
        self.weights: tuple[Any, ...] = ()
        self.runners: list[Any] = []

    def __reduce__(self) -> tuple[type[Idle], tuple[()]]:
        return Idle, ()


_lock = threading.Lock()


def _weights(model: Any) -> tuple[Any, ...]:
    """What captured steps have burnt in: addresses, shapes and dtypes of the parameters."""
    return tuple((p.data_ptr(), tuple(p.shape), p.dtype) for p in model.parameters())


def _columns(model: Any, total: int) -> int:
    return min(-(-total // _COLUMNS) * _COLUMNS, model.config.max_position_embeddings)


def _take(model: Any, B: int, total: int) -> Runner:
    """A runner for B rows of `total` columns that nobody else uses."""
    rows, columns = next(n for n in BUCKETS if n >= B), _columns(model, total)

    def make() -> Runner:
        check_memory(model, rows, columns, lambda: _drop(model))
        return Runner(model, rows, columns)

    return _kept(model, (rows, columns), make)


def _take_drafting(model: Any, request: Request, assistant: Any) -> Speculation:
    """The same for one text with drafts."""
    n, longest = draft_length(request, assistant), int(request.options.max_matching_ngram_size)
    columns = _columns(model, request.total)
    key = ("drafts", columns, n, longest, None if assistant is None else (id(assistant), _weights(assistant)))

    def make() -> Speculation:
        check_memory(model, 1, columns, lambda: _drop(model))
        helper = None if assistant is None else Runner(assistant, 1, columns)
        return Speculation(Runner(model, 1, columns), n, helper, longest, key)

    return _kept(model, key, make)


def _kept(model: Any, key: Any, make: Callable[[], Any]) -> Any:
    """What an earlier request of this kind has left, or a new one."""
    weights = _weights(model)
    with _lock:
        kept = model.idle_runners
        if kept.weights != weights:  # moved, resized or merged since
            kept.weights, kept.runners = weights, []
        for runner in kept.runners:
            if runner.key == key:
                kept.runners.remove(runner)
                return runner
    return make()


def _give_back(model: Any, runner: Any) -> None:
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
