"""Drafts on the device: a step guesses tokens, runs them all at once and keeps those that it would have drawn anyway.

Every position draws with the noise that plain decoding would use there, and a guess is kept while it equals what was drawn.
So the text is that of plain decoding with the same seed, token for token up to rounding, whatever was guessed; an assistant
that draws with the same noise only guesses better.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ...network.cache import SLACK, lasting
from ...ops.constants import BROKEN, COUNT, FINISHED, PLACE, STATUS, TOKEN
from ..config import GenerationConfig
from ..request import Request
from . import capturing
from .capturing import Step, current_stream, event_of, on_stream
from .params import SamplingParams
from .runner import AHEAD, Runner, Snapshot, StepCache, host_copies

Guess = Callable[[], tuple[Tensor, Tensor]]  # int64 [n] tokens after the newest one, and how many of them are guesses


class Speculation:
    """One text on one runner, drafts of `n` tokens.

    Args:
        runner: of one row.
        n: tokens of a draft.
        assistant: a runner of a smaller model to guess with, or None to look the guess up in the text.
        longest: tokens of the text's end to look for, where there is no assistant.
    """

    @lasting()
    def __init__(self, runner: Runner, n: int, assistant: Runner | None = None, longest: int = 2) -> None:
        device, columns = runner.device, runner.columns
        self.key: tuple[object, ...] = ()  # which requests it can serve
        self.steps = dict[int, Step]()
        self.runner, self.n, self.assistant, self.longest = runner, n, assistant, longest
        self.text = torch.zeros(columns + n + 1, dtype=torch.int64, device=device)
        self.length = torch.zeros(1, dtype=torch.int64, device=device)  # of the text, the newest token included
        self.out = torch.zeros(columns + n + 1, dtype=torch.int32, device=device)
        self.places = torch.arange(n + 1, device=device)
        self.drawn = torch.zeros(5, n + 1, dtype=torch.int64, device=device)  # a state for every position of a draft
        self._beside = torch.zeros(n + 1, columns + n + 1, dtype=torch.int32, device=device)  # what `sample` also writes
        self._lengths = torch.zeros(n + 1, dtype=torch.int32, device=device)
        self.view = StepCache(runner.cache, runner.lengths)
        self._host_state, self._host_out, self._looks = host_copies(runner.state), host_copies(self.out), 0
        self.why_launched: str | None = None  # as a runner's

    @property
    def nbytes(self) -> int:
        """Bytes of both runners."""
        return self.runner.nbytes + (self.assistant.nbytes if self.assistant is not None else 0)

    def step(self, method: int) -> None:
        """Guess, run, keep."""
        r, n = self.runner, self.n
        guess, valid = self._assisted(method) if self.assistant is not None else self._looked_up()
        newest, place = r.state.select(0, TOKEN), r.state.select(0, PLACE)
        ids = torch.cat([newest, guess]).unsqueeze(0)
        logits = r.model.step(ids, (place + self.places).unsqueeze(0), None, self.view, keep=n + 1).squeeze(0)
        self.drawn.zero_()
        self.drawn.select(0, COUNT).copy_(r.state.select(0, COUNT) + self.places)
        seeds = r.seeds.expand(n + 1).contiguous()
        functions = r.model.transformer.functions(logits)
        functions.sample(logits, r.rates, r.counts, r.flags, seeds, None, self.drawn, self._beside, self._lengths, method)
        self._keep(guess, valid)

    def _keep(self, guess: Tensor, valid: Tensor) -> None:
        """The tokens drawn up to the first that was not guessed, that ends the text, or that could not be drawn."""
        r, n = self.runner, self.n
        tokens, status = self.drawn.select(0, TOKEN), self.drawn.select(0, STATUS)
        right = (tokens.narrow(0, 0, n) == guess) & (self.places.narrow(0, 0, n) < valid)
        reach = right.long().cumprod(0).sum() + 1  # tokens that plain decoding would have drawn, too
        broken, ends = (status & BROKEN) != 0, status == FINISHED
        first_broken = torch.where(broken, self.places, n + 1).amin()
        first_end = torch.where(ends, self.places, n + 1).amin()
        alive = (r.state.select(0, STATUS) == 0).squeeze(0)
        count = torch.minimum(torch.minimum(reach, first_end + 1), first_broken) * alive
        kept = self.places < count
        is_broken = alive & (first_broken < torch.minimum(reach, first_end + 1))
        is_over = alive & ~is_broken & (first_end < reach)
        at = r.state.select(0, COUNT) + self.places
        self.out.index_copy_(0, at, torch.where(kept, tokens, self.out.index_select(0, at)).to(torch.int32))
        at = self.length + self.places
        self.text.index_copy_(0, at, torch.where(kept, tokens, self.text.index_select(0, at)))
        newest = torch.where(count > 0, tokens.index_select(0, (count - 1).clamp(min=0).view(1)), r.state.select(0, TOKEN))
        r.state.select(0, TOKEN).copy_(newest)
        r.state.select(0, STATUS).add_(is_over * FINISHED + is_broken * (FINISHED | BROKEN))
        for counter in (r.state.select(0, PLACE), r.state.select(0, COUNT), r.lengths, self.length):
            counter.add_(count)

    def _looked_up(self) -> tuple[Tensor, Tensor]:
        """What followed the first earlier occurrence of the text's last tokens, the longest that occurs; Saxena 2023."""
        N, n = len(self.text), self.n
        columns = torch.arange(N, device=self.text.device)
        at = torch.zeros_like(self.length)
        found = torch.zeros_like(self.length, dtype=torch.bool)
        for size in range(1, self.longest + 1):  # a longer one found later replaces a shorter one
            end = self.text.index_select(0, (self.length - size + columns.narrow(0, 0, size)).clamp(min=0))
            same = (self.text.unfold(0, size, 1) == end).all(1)  # [N - size + 1], by where it begins
            here = same & (columns.narrow(0, 0, N - size + 1) + size < self.length) & (self.length > size)
            first = here.long().argmax(0, keepdim=True)
            occurs = here.any().view(1)
            at, found = torch.where(occurs, first + size, at), found | occurs
        guess = self.text.index_select(0, (at + self.places.narrow(0, 0, n)).clamp(max=N - 1))
        return guess, (self.length - at).clamp(max=n) * found

    def _assisted(self, method: int) -> tuple[Tensor, Tensor]:
        """n tokens that the assistant draws, which has then seen all of them."""
        a, r, n = self.assistant, self.runner, self.n
        assert a is not None
        a.state.copy_(r.state)
        a.lengths.copy_(r.lengths)
        tokens = []
        for _ in range(n + 1):  # the last one only shows the assistant its own last guess
            a.draw_next(method)
            tokens.append(a.state.select(0, TOKEN).clone())
        return torch.cat(tokens[:n]), torch.full_like(self.length, n)

    @torch.no_grad()
    def run(self, ids: Tensor, mask: Tensor | None, params: SamplingParams, replays: int = 1) -> Iterator[tuple[Tensor, ...]]:
        """As `Runner.run`, for one row; a look after every draft, which is as many tokens as `replays` may be."""
        stream = current_stream(self.runner.device)
        beside = nullcontext() if self.assistant is None else self.assistant.used_on(stream)
        with self.runner.used_on(stream), beside:
            yield from self._run(ids, mask, params, stream)

    def _run(self, ids: Tensor, mask: Tensor | None, params: SamplingParams, stream: Any) -> Iterator[tuple[Tensor, ...]]:
        r, most = self.runner, params.counts[2]
        looks: deque[Snapshot] = deque()
        with on_stream(stream):
            step, single = self._step_for(params.method), r.step_for(params)
            self.why_launched = step.why_launched or single.why_launched
            self._begin(ids, mask, params)
            looks.append(self._look())
        known = bound = 1  # tokens drawn that the host knows of, and at most
        sent = 0
        while True:
            with on_stream(stream):
                while len(looks) < AHEAD and known < most:
                    fits = bound + self.n + 1 <= most  # a draft must not be longer than what is left
                    if not fits and bound > known and looks:
                        break  # look first: less may have been drawn than could
                    for each in (r, self.assistant):
                        if each is not None:
                            each.require_untouched()
                    if fits:
                        step.replay()
                        bound += self.n + 1
                    else:
                        single.replay()
                        self.out.index_copy_(0, r.state[COUNT] - 1, r.state[TOKEN].int())
                        bound += 1
                    looks.append(self._look())
            look = looks.popleft()
            state = look.state_now()
            known = int(state[COUNT, 0])
            if not looks:
                bound = known
            yield look.tokens[None, sent:known].long(), state[STATUS], state[COUNT]
            sent = known
            if int(state[STATUS, 0]) != 0 or known >= most:
                return

    def _begin(self, ids: Tensor, mask: Tensor | None, params: SamplingParams) -> None:
        """Read the prompt [1, P], draw the first token, put both where guesses are looked up."""
        start = 0 if mask is None else int((mask[0] != 0).long().argmax())
        for each in (self.runner, self.assistant):
            if each is not None:
                each.begin(ids, mask, params)
        P = ids.shape[1] - start
        self.text.zero_()
        self.text[:P].copy_(ids[0, start:])
        self.text[P] = self.runner.state[TOKEN, 0]
        self.length.fill_(P + 1)
        self.out[:1].copy_(self.runner.out[0, :1])

    def _step_for(self, method: int) -> Step:
        """The step for a way of drawing, captured now if it is the first of its kind."""
        r = self.runner
        if method not in self.steps:
            for each in (r, self.assistant):
                if each is not None:
                    each.state.zero_()
                    each.state[STATUS] = FINISHED
                    each.lengths.zero_()
            self.length.fill_(self.longest + 1)
            self.steps[method] = capturing.capture(lambda: self.step(method), r.device)
        return self.steps[method]

    def _look(self) -> Snapshot:
        """Send what is new on its way to the host."""
        r, turn = self.runner, self._looks % AHEAD
        self._looks += 1
        state = self._host_state[turn].copy_(r.state, non_blocking=True)
        tokens = self._host_out[turn].copy_(self.out, non_blocking=True)
        return Snapshot(state, 0, event_of(current_stream(r.device)), tokens)


def draft_length(request: Request) -> int:
    """Tokens of a draft: what the options or the assistant's own say, and at most what a ring keeps apart."""
    if request.assistant is None:
        return min(request.options.prompt_lookup_num_tokens or 0, SLACK)
    return min(GenerationConfig.like(request.assistant.generation_config).resolved().num_assistant_tokens, SLACK)


def why_not_drafts(request: Request) -> str | None:
    """Why drafts of this request are checked on the host, or None.

    An assistant's confidence threshold and schedule only say how long a draft is; on the device that is fixed.
    """
    assistant, here = request.assistant, request.prompt.ids.device
    if len(request.prompt.ids) > 1:
        return "drafts are for one text"
    if request.options.repetition_penalty != 1:
        return "repetition_penalty with drafts runs on the host"
    if assistant is None:
        return None
    if assistant.device != here:
        return f"the assistant is on {assistant.device} and the model on {here}"
    if request.total > (limit := assistant.config.max_position_embeddings):
        return f"{request.total} tokens exceed the assistant's {limit} positions"
    return None
