"""Rows: requests that decode together, each a row of one cache."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..generation.request import LanguageModel
from ..network.cache import KVCache
from ..network.decoding import Several
from ..ops import extension
from .graphs import Graphs
from .job import Job
from .reading import require_read

_STEPS, _SECONDS = 32, 0.05  # the most that runs in one call


class Rows:
    """Up to `most` requests. Their rows are the first of the cache; when one leaves, the last takes its place.

    Args:
        model: a GPTNeoForCausalLM. columns: of prompt and continuation at most.
    """

    def __init__(self, model: LanguageModel, most: int, columns: int) -> None:
        self.model, self.most, self.columns = model, most, columns
        self.jobs: list[Job] = []
        self._lay_out()
        self._view: KVCache | None = None  # of the rows in use; None after one joined or left
        self._ended: list[Job] = []  # in this step
        self._steps = 1

    def _lay_out(self) -> None:
        fixed = self.columns if self.model.device.type == "cuda" else None  # graphs see addresses
        self.cache: KVCache = self.model.transformer.new_cache(self.most, fixed)
        self._graphs = Graphs(self.model, self.cache)

    def fit(self) -> bool:
        """Whether requests that are read now can join: layers hold what attention, which may have been patched, looks at."""
        held = self.cache.keys[0]
        moved = (held.dtype, held.device) != (self.model.dtype, self.model.device)
        if moved or self.cache.windows != self.model.transformer.windows():
            if self.jobs:
                return False
            self._lay_out()
        return True

    def join(self, job: Job, past: KVCache | None, row: int = 0) -> None:
        """Add a request whose tokens but the last are in a row of `past`; None where it has but one."""
        if past is not None:
            self.cache.copy_row(len(self.jobs), past, row, tokens=len(job.ids) - 1)
        self.jobs.append(job)
        self._view = None

    def drop(self, job: Job) -> None:
        """Let a request's row go to the next one."""
        i, last = self.jobs.index(job), len(self.jobs) - 1
        if i < last:
            self.cache.copy_row(i, self.cache, last, tokens=len(self.jobs[last].ids) - 1)
            self.jobs[i] = self.jobs[last]
        self.jobs.pop()
        self._view = None

    def clear(self) -> None:
        """Forget all requests."""
        self.jobs, self._view, self._ended = [], None, []

    def step(self) -> None:
        """At least one token more for every request, or its end.

        A processor or a criterion that raises ends its own request; what the model raises ends this call, and then nothing
        is known of the cache.
        """
        ids = torch.tensor([[job.ids[-1]] for job in self.jobs], device=self.model.device)
        began, found = time.monotonic(), self._several(ids)
        if found is not None:
            n = len(found[0])
            self._steps = min(_STEPS, 1 + int(_SECONDS * n / (time.monotonic() - began)))
            for job, tokens in zip(self.jobs, found, strict=True):
                with self._answering(job):
                    self._take(job, tokens)
        else:
            logits = self._logits(ids).float()
            best = extension.likeliest(logits).tolist()
            for i, job in enumerate(self.jobs):
                with self._answering(job):
                    self._take(job, [self._next(job, logits[i : i + 1], best[i])])
        for job in self._ended:  # now that all rows count what the cache holds
            self.drop(job)
        self._ended = []

    def _next(self, job: Job, logits: Tensor, best: int) -> int:
        """The next token, -1 for logits [1, V] that are not finite. best: the likeliest."""
        request = job.request
        if job.plain and (best not in (request.ends or ()) or job.least <= 0):
            return best
        if best < 0 and not request.options.remove_invalid_values:
            return -1
        ids = torch.tensor([job.ids], device=logits.device)
        running = torch.ones(1, dtype=torch.bool, device=logits.device)
        token = request.choose(logits, ids.shape[1])
        return int(request.draw(request.processors(ids, logits), running) if token is None else token)

    def _take(self, job: Job, tokens: list[int]) -> None:
        """Tokens up to the one that ends the request; -1 stands for logits that were not finite."""
        request, kept, over, ends = job.request, list[int](), False, job.request.ends
        for token in tokens:
            if token < 0:
                break
            kept.append(token)
            over = len(job.ids) + len(kept) >= request.total or (ends is not None and token in ends)
            if ends is None:
                over = job.meets(torch.tensor([job.ids + kept], device=self.model.device)) or over
            if over:
                break
        job.take(kept)
        if over:
            self._ended.append(job)
            job.finish()
        elif len(kept) < len(tokens):
            self._ended.append(job)
            job.fail(job.broken())

    @contextmanager
    def _answering(self, job: Job) -> Iterator[None]:
        """What is raised within it is the request's answer."""
        try:
            yield
        except BaseException as error:  # sys.exit() in somebody's processor, too
            if job not in self._ended:
                self._ended.append(job)
            job.fail(error)

    def _several(self, ids: Tensor) -> list[list[int]] | None:
        """Tokens of several greedy steps in one call; None where they must be taken one by one. ids: [B, 1]."""
        ends = self.jobs[0].request.ends
        if ends is None or self.model.device.type != "cpu" or not self.model.looked():
            return None
        if not all(job.plain and job.request.ends == ends for job in self.jobs):
            return None
        steps = min(self._steps, min(job.request.total - len(job.ids) for job in self.jobs))
        least = [job.least for job in self.jobs if job.least > 0]
        if least and len(least) < len(self.jobs):  # some may end and others may not
            return None
        steps = min([steps, *least])
        running = torch.ones(len(ids), dtype=torch.bool)
        how = Several(running, sorted(ends), 0, steps if least else 0, steps)
        found = self.model.several(ids, self._places(), self._view_of(steps), how)
        return None if found is None else found.tolist()

    def _logits(self, ids: Tensor) -> Tensor:
        """Logits [B, V] after the newest tokens [B, 1]."""
        model, held = self.model, self._held()
        if self._graphs.serve():
            self._view = None  # which would not know of this step
            return self._graphs.logits(ids, held)
        view = self._view_of(1)
        if model.looked().forward:  # nothing to check: these are tokens of our own
            return model.step(ids, self._places(), None, view)[:, -1]
        seen = view.get_seq_length()
        held_by = torch.tensor(held, device=ids.device)[:, None]
        mask = torch.arange(seen + 1, device=ids.device) >= seen - held_by
        how = {"attention_mask": mask.long(), "position_ids": self._places(), "logits_to_keep": 1, "return_dict": True}
        logits: Tensor = model(ids, past_key_values=view, use_cache=True, **how).logits
        require_read(view, seen + 1)
        return logits[:, -1]

    def _held(self) -> list[int]:
        """Tokens of each row that the cache holds: all but the newest."""
        return [len(job.ids) - 1 for job in self.jobs]

    def _places(self) -> Tensor:
        """Positions [B, 1] of the newest tokens."""
        return torch.tensor([[n] for n in self._held()], device=self.model.device)

    def _view_of(self, steps: int) -> KVCache:
        """The cache of the rows in use, with room for so many tokens more."""
        held = self._held()
        if self.cache.allocate(max(held) + steps) or self._view is None or self._view.get_seq_length() != max(held):
            self._view = self.cache.rows(len(held), held)
        return self._view
