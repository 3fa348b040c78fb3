"""Runner: one batch size's memory at fixed addresses and the captured step that works on it, several times between looks."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import warn_once
from ...network.cache import KVCache
from ...network.masks import rows_of
from ...ops.sampling import BROKEN, COUNT, FINISHED, PLACE, STATUS, TOKEN
from .params import SamplingParams

BUCKETS = (1, 2, 4, 8, 16, 32, 64)  # rows that steps are captured for; a batch takes the next one
AHEAD = 2  # looks that may be under way while the device goes on

_capturing = threading.Lock()


class StepCache:
    """A KVCache as the captured step sees it: whole slots, lengths on the device, no counting in Python."""

    ragged = False

    def __init__(self, cache: KVCache, lengths: Tensor) -> None:
        self.keys, self.values, self.lengths = cache.keys, cache.values, lengths

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """More than none: a step continues."""
        return 1

    def reserve(self, T: int) -> None:
        """Nothing: all slots are there."""

    def past(self, layer: int, columns: int) -> tuple[Tensor, Tensor]:
        """All slots."""
        return self.keys[layer], self.values[layer]

    def advance(self, T: int, starts: Tensor | None) -> None:
        """Nothing: the `sample` op counts."""


def step_logits(model: Any, state: Tensor, cache: StepCache) -> Tensor:
    """Logits [B, V] after each row's newest token. Rows of the state are taken so that fake tensors can be, too."""
    ids, places = state.select(0, TOKEN).unsqueeze(1), state.select(0, PLACE).unsqueeze(1)
    logits: Tensor = model.step(ids, places, None, cache).squeeze(1)
    return logits


class EagerStep:
    """In place of a captured step where there is none: the same work, launched anew each time."""

    def __init__(self, step: Callable[[], None]) -> None:
        self.replay = step


def capture(step: Callable[[], None], device: torch.device) -> Any:
    """A CUDA graph of `step`, which must have no effect when called now; the eager step where it cannot be captured."""
    if device.type != "cuda":
        return EagerStep(step)
    try:
        with _capturing, torch.cuda.device(device):
            aside = torch.cuda.Stream(device)
            aside.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(aside):
                step()  # compiles and allocates what the first call of a kernel does
                step()
                graph = torch.cuda.CUDAGraph()
                # thread-local: what other threads do meanwhile neither breaks this capture nor is caught by it
                with torch.cuda.graph(graph, stream=aside, capture_error_mode="thread_local"):
                    step()
            torch.cuda.current_stream(device).wait_stream(aside)
            return graph
    except Exception as error:
        warn_once(f"the decode step cannot be captured and is launched kernel by kernel: {type(error).__name__}: {error}")
        return EagerStep(step)


@dataclass
class Snapshot:
    """What the host will know once `event` has happened: columns up to `end`, and the state after them.

    tokens: where they travel with the look, int32 [columns].
    """

    state: Tensor
    end: int
    event: Any
    tokens: Tensor | None = None


def on_stream(stream: Any) -> AbstractContextManager[Any]:
    """Launches go to `stream` and its device, whatever the caller does between two pieces; None for no CUDA."""
    return nullcontext() if stream is None else torch.cuda.stream(stream)


class Runner:
    """Generates for up to `rows` texts at a time.

    Args:
        model: a GPTNeoForCausalLM.
        rows: B. columns: of prompt and continuation at most.
    """

    def __init__(self, model: Any, rows: int, columns: int) -> None:
        self.model, self.rows, self.columns, self.device = model, rows, columns, model.device
        device, V = model.device, model.config.vocab_size
        self.cache = KVCache(model.config, rows, dtype=model.dtype, device=device, max_length=columns)
        self.lengths = torch.zeros(rows, dtype=torch.int32, device=device)
        self.state = torch.zeros(5, rows, dtype=torch.int64, device=device)
        self.state[STATUS] = FINISHED  # a step before the first request changes nothing
        self.out = torch.zeros(columns, rows, dtype=torch.int32, device=device)  # a look's tokens lie together
        self.rates = torch.ones(4, device=device)
        self.counts = torch.zeros(3, dtype=torch.int32, device=device)
        self.flags = torch.zeros(V, dtype=torch.uint8, device=device)
        self.seeds = torch.zeros(rows, dtype=torch.int64, device=device)
        self.seen = torch.zeros(0, dtype=torch.uint8, device=device)  # [rows, V] once some request has a penalty
        self.steps: dict[Any, Any] = {}  # captured, by what sets them apart
        self.key: tuple[object, ...] = ()  # which requests it can serve
        self.idle: Any = None  # on CUDA the event after which nobody uses this memory any more

    @torch.no_grad()
    def run(self, ids: Tensor, mask: Tensor | None, params: SamplingParams, replays: int) -> Iterator[tuple[Tensor, ...]]:
        """(new tokens int64 [B, n], status int64 [B], tokens drawn int64 [B]) on the host, until every row has finished.

        A row that has finished has nothing of its own in the columns after those drawn.

        Args:
            ids: int64 [B, P], B up to `rows`, padded on the left. mask: [B, P] or None for no padding.
            params: how tokens are drawn.
            replays: steps between looks at the device.
        """
        B, most = len(ids), params.counts[2]
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        looks: deque[Snapshot] = deque()
        try:
            with on_stream(stream):
                if stream is not None and self.idle is not None:
                    stream.wait_event(self.idle)
                step = self.step_for(params)
                self.begin(ids, mask, params)
                launched, known = 1, 0  # the first token comes of the prompt
                looks.append(self._look(launched))
            while looks:
                with on_stream(stream):
                    while len(looks) < AHEAD and launched < most:
                        n = min(replays, most - launched)
                        for _ in range(n):
                            step.replay()
                        launched += n
                        looks.append(self._look(launched))
                look = looks.popleft()
                if look.event is not None:
                    look.event.synchronize()
                status, drawn = look.state[STATUS, :B], look.state[COUNT, :B]
                end = min(look.end, int(drawn.max()))  # past it every row has finished
                yield self._host_out[known:end, :B].t().long(), status, drawn
                known = end
                if bool((status != 0).all()):
                    return
        finally:
            if stream is not None:
                self.idle = torch.cuda.Event()
                self.idle.record(stream)

    def begin(self, ids: Tensor, mask: Tensor | None, params: SamplingParams) -> None:
        """Read the prompts into the cache, set the state, draw the first tokens."""
        B, P = ids.shape
        self.rates.copy_(torch.tensor(params.rates))
        self.counts.copy_(torch.tensor(params.counts))
        self.flags.copy_(params.flags)
        self.seeds[:B].copy_(params.seeds)
        if params.penalty:
            held = torch.ones_like(ids) if mask is None else (mask != 0).long()
            self.seen.zero_()
            self.seen[:B].scatter_add_(1, ids, held.to(self.seen.dtype)).clamp_(max=1)
        fresh = self.cache.rows(B)
        positions = None if mask is None else ((mask != 0).long().cumsum(1) - 1).clamp(min=0)
        if positions is None:
            positions = torch.arange(P, device=self.device)[None]
        logits = self.model.step(ids, positions, None, fresh, rows=rows_of(mask, B, P, fresh))
        self.state.zero_()
        self.state[STATUS, B:] = FINISHED  # rows that nobody asked for
        self.state[PLACE, :B] = positions[:, -1]
        self.lengths.zero_()
        self.lengths[:B] = fresh.lengths - 1  # `sample` counts the newest token of a row, here the prompt's last
        whole = logits.new_zeros(self.rows, logits.shape[-1])
        whole[:B] = logits[:, -1]
        self._draw(whole, params.method, params.penalty)
        pinned = self.device.type == "cuda"
        self._host_out = torch.empty(self.out.shape, dtype=torch.int32, pin_memory=pinned)
        self._seen_columns = 0

    def _look(self, end: int) -> Snapshot:
        """Send what is new on its way to the host."""
        cuda = self.device.type == "cuda"
        state = torch.empty(self.state.shape, dtype=self.state.dtype, pin_memory=cuda).copy_(self.state, non_blocking=cuda)
        begin, self._seen_columns = self._seen_columns, end
        self._host_out[begin:end].copy_(self.out[begin:end], non_blocking=cuda)
        event = None
        if cuda:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self.device))
        return Snapshot(state, end, event)

    def draw_next(self, method: int, penalty: bool = False) -> None:
        """One step: run every row's newest token, draw the next one."""
        self._draw(step_logits(self.model, self.state, StepCache(self.cache, self.lengths)), method, penalty)

    def _draw(self, logits: Tensor, method: int, penalty: bool) -> None:
        seen = self.seen if penalty else None
        functions = self.model.transformer.functions(logits)
        functions.sample(
            logits, self.rates, self.counts, self.flags, self.seeds, seen, self.state, self.out.t(), self.lengths, method
        )

    def step_for(self, params: SamplingParams) -> Any:
        """The captured step for a way of drawing, captured now if it is the first of its kind."""
        kind = (params.method, params.penalty)
        if params.penalty and not len(self.seen):
            self.seen = torch.zeros(self.rows, len(self.flags), dtype=torch.uint8, device=self.device)
        if kind not in self.steps:

            def step() -> None:
                self.draw_next(*kind)

            self.state[STATUS] = FINISHED
            self.lengths.zero_()
            self.steps[kind] = capture(step, self.device)
        return self.steps[kind]

    @property
    def nbytes(self) -> int:
        """Bytes of the cache and of what else lies at fixed addresses, without what captured steps allocate."""
        return self.cache.nbytes + sum(t.numel() * t.element_size() for t in (self.out, self.seen, self.flags))


def broken_rows(status: Tensor) -> list[int]:
    """Rows whose logits were not finite. status: int64 [B]."""
    return ((status & BROKEN) != 0).nonzero().flatten().tolist()
