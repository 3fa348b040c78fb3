"""Runner: one batch size's memory at fixed addresses and the captured step that works on it, several times between looks."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import InputError
from ...network.cache import KVCache, lasting
from ...network.masks import rows_of
from ...ops.constants import BROKEN, COUNT, FINISHED, PLACE, STATUS, TOKEN
from . import capturing
from .capturing import Step, current_stream, event_of, on_stream
from .params import SamplingParams

BUCKETS = (1, 2, 4, 8, 16, 32, 64)  # rows that steps are captured for; a batch takes the next one
AHEAD = 2  # looks that may be under way while the device goes on


class StepCache(KVCache):
    """A KVCache as the captured step sees it: whole slots, lengths on the device, no counting in Python."""

    ragged = False

    def __init__(self, cache: KVCache, lengths: Tensor) -> None:
        self.keys, self.values, self.lengths = cache.keys, cache.values, lengths

    def get_seq_length(self, layer_idx: int | None = None) -> int:
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


@dataclass
class Snapshot:
    """What the host will know once `event` has happened: columns up to `end`, and the state after them.

    state, tokens: on the host, where a later look may write over them once this one has been read.
    """

    state: Tensor
    end: int
    event: Any
    tokens: Tensor

    def state_now(self) -> Tensor:
        """Wait for the event; the state, a copy."""
        if self.event is not None:
            self.event.synchronize()
        return self.state.clone()


class Runner:
    """Generates for up to `rows` texts at a time.

    Args:
        model: a GPTNeoForCausalLM.
        rows: B. columns: of prompt and continuation at most.
    """

    @lasting()
    def __init__(self, model: Any, rows: int, columns: int) -> None:
        self.model, self.rows, self.columns, self.device = model, rows, columns, model.device
        device, V = model.device, model.config.vocab_size
        self.cache = model.transformer.new_cache(rows, columns)
        self.lengths = torch.zeros(rows, dtype=torch.int32, device=device)
        self.state = torch.zeros(5, rows, dtype=torch.int64, device=device)
        self.state[STATUS] = FINISHED  # a step before the first request changes nothing
        self.out = torch.zeros(columns, rows, dtype=torch.int32, device=device)  # a look's tokens lie together
        self.rates = torch.ones(4, device=device)
        self.counts = torch.zeros(3, dtype=torch.int32, device=device)
        self.flags = torch.zeros(V, dtype=torch.uint8, device=device)
        self.seeds = torch.zeros(rows, dtype=torch.int64, device=device)
        self.seen = torch.zeros(0, dtype=torch.uint8, device=device)  # [rows, V] once some request has a penalty
        self._host_state = host_copies(self.state)
        self._host_out = torch.empty(self.out.shape, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._seen_columns = self._looks = 0
        self.steps: dict[Any, Step] = {}  # by what sets them apart
        self.why_launched: str | None = None  # why the steps of the last run were no graphs, if they were none
        self.key: tuple[object, ...] = ()  # which requests it can serve
        self.idle: Any = None  # on CUDA the event after which nobody uses this memory any more
        self._home = current_stream(device)  # whose launches may be given this memory when it is freed

    @contextmanager
    def used_on(self, stream: Any) -> Iterator[None]:
        """What is launched on `stream` within it comes after all earlier uses of this memory and before all later ones."""
        if stream is not None and self.idle is not None:
            stream.wait_event(self.idle)
        try:
            yield
        finally:
            self.idle = event_of(stream)
            if stream is not None and stream != self._home:
                self._home.wait_event(self.idle)

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
        stream = current_stream(self.device)
        looks: deque[Snapshot] = deque()
        with self.used_on(stream):
            with on_stream(stream):
                step = self.step_for(params)
                self.why_launched = step.why_launched
                self.begin(ids, mask, params)
                launched, known = 1, 0  # the first token comes of the prompt
                looks.append(self._look(launched))
            while looks:
                with on_stream(stream):
                    while len(looks) < AHEAD and launched < most:
                        self.require_untouched()
                        n = min(replays, most - launched)
                        for _ in range(n):
                            step.replay()
                        launched += n
                        looks.append(self._look(launched))
                look = looks.popleft()
                state = look.state_now()
                status, drawn = state[STATUS, :B], state[COUNT, :B]
                end = min(look.end, int(drawn.max()))  # past it every row has finished
                yield look.tokens[known:end, :B].t().long(), status, drawn
                known = end
                if bool((status != 0).all()):
                    return

    def require_untouched(self) -> None:
        """Refuse to go on with steps that were captured before the model was touched.

        Raises:
            InputError: says what to do instead.
        """
        if not self.model.looked():
            raise InputError(
                "a module of the model was hooked, replaced or patched while captured steps generated with it; do that "
                "before generate, or pass a logits_processor, with which the host takes every step"
            )

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
            self.seen[:B].scatter_reduce_(1, ids, held.to(self.seen.dtype), "amax")  # a sum of 256 would be none
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
        self._seen_columns = 0

    def _look(self, end: int) -> Snapshot:
        """Send what is new on its way to the host."""
        state = self._host_state[self._looks % AHEAD].copy_(self.state, non_blocking=True)
        begin, self._seen_columns, self._looks = self._seen_columns, end, self._looks + 1
        self._host_out[begin:end].copy_(self.out[begin:end], non_blocking=True)
        return Snapshot(state, end, event_of(current_stream(self.device)), self._host_out)

    def draw_next(self, method: int, penalty: bool = False) -> None:
        """One step: run every row's newest token, draw the next one."""
        self._draw(step_logits(self.model, self.state, StepCache(self.cache, self.lengths)), method, penalty)

    def _draw(self, logits: Tensor, method: int, penalty: bool) -> None:
        seen = self.seen if penalty else None
        functions = self.model.transformer.functions(logits)
        functions.sample(
            logits, self.rates, self.counts, self.flags, self.seeds, seen, self.state, self.out.t(), self.lengths, method
        )

    def step_for(self, params: SamplingParams) -> Step:
        """The step for a way of drawing, captured now if it is the first of its kind; call its `replay()`.

        Its `why_launched` is None for a CUDA graph; else it says why the kernels of the step are launched one by one.
        """
        kind = (params.method, params.penalty)
        if params.penalty and not len(self.seen):
            with lasting():
                self.seen = torch.zeros(self.rows, len(self.flags), dtype=torch.uint8, device=self.device)
        if kind not in self.steps:

            def step() -> None:
                self.draw_next(*kind)

            self.state[STATUS] = FINISHED
            self.lengths.zero_()
            self.steps[kind] = capturing.capture(step, self.device)
        return self.steps[kind]

    @property
    def nbytes(self) -> int:
        """Bytes of the cache and of what else lies at fixed addresses, without what captured steps allocate."""
        return self.cache.nbytes + sum(t.numel() * t.element_size() for t in (self.out, self.seen, self.flags))


def host_copies(x: Tensor) -> list[Tensor]:
    """Memory on the host for as many copies of x as may be under way."""
    return [torch.empty(x.shape, dtype=x.dtype, pin_memory=x.device.type == "cuda") for _ in range(AHEAD)]


def broken_rows(status: Tensor) -> list[int]:
    """Rows whose logits were not finite. status: int64 [B]."""
    return ((status & BROKEN) != 0).nonzero().flatten().tolist()
