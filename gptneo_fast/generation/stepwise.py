"""Greedy decoding and sampling: one prefill, then a token of each row a step."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from ..network.decoding import Several
from ..ops import extension
from .request import LanguageModel, Request, non_finite
from .session import Session

_STEPS, _SECONDS = 32, 0.05  # the most that runs in one call, which nothing can interrupt


def stepwise(model: LanguageModel, request: Request) -> Iterator[Tensor]:
    """New tokens [B, 1] int64 of each step; errors as of `sample`."""
    return sample(Session.of(model, request), request.prompt.ids, request)


@torch.no_grad()
def sample(session: Session, ids: Tensor, request: Request) -> Iterator[Tensor]:
    """New tokens [B, 1] int64 of each step, until every row has ended.

    Args:
        ids: int64 [B, T], the prompts.

    Raises:
        NonFiniteLogitsError: after the other rows have ended, names the rows whose logits were NaN or infinite.
    """
    options, pad = request.options, request.options.pad_id
    running = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    broken: dict[int, int] = {}  # row -> columns that it had
    plain = not options.do_sample and not request.processors
    steps = 1
    while ids.shape[1] < request.total:
        T, begin = ids.shape[1], time.monotonic()
        found = session.several(ids, _several(request, T, running, steps)) if request.alone else None
        if found is not None:
            steps = min(_STEPS, 1 + int(_SECONDS * found.shape[1] / (time.monotonic() - begin)))
        if found is not None and found.shape[1]:
            tokens, running = _settled(request, found, running, T, broken)
            ids = torch.cat([ids, tokens], 1)
            if tokens.shape[1]:
                yield tokens
            if not bool(running.any()):
                break
            continue
        logits = session.feed(ids)[:, -1].float()
        best = extension.likeliest(logits)
        if not options.remove_invalid_values and min(best.tolist()) < 0:
            finite = best >= 0
            for row in (running & ~finite).nonzero().flatten().tolist():
                broken[row] = ids.shape[1]
            running = running & finite
            if not bool(running.any()):
                break
            logits = torch.where(finite[:, None], logits, 0.0)
        chosen = best if plain else request.choose(logits, T)
        scores = logits if chosen is not None else request.processors(ids, logits)
        request.record.step(session, logits, scores)
        token = request.draw(scores, running) if chosen is None else chosen
        if request.may_end_early or broken:
            token = torch.where(running, token, pad if pad is not None else 0)
        ids = torch.cat([ids, token[:, None]], 1)
        yield token[:, None]
        if (ended := request.ended(ids)) is not None:
            running = running & ~ended
            if not bool(running.any()):
                break
    if broken:
        raise non_finite(broken, ids)


def _several(request: Request, columns: int, running: Tensor, steps: int) -> Several:
    """How up to `steps` steps of rows [B] go on after so many columns."""
    most, least = min(steps, request.total - columns), max(0, request.least - columns)
    return Several(running, sorted(request.ends or ()), request.options.pad_id or 0, least, most, request.draws)


def _settled(request: Request, tokens: Tensor, running: Tensor, columns: int, broken: dict[int, int]) -> tuple[Tensor, Tensor]:
    """The tokens [B, n] of several steps as `sample` gives them, and which rows [B] go on; adds to `broken`."""
    rows, runs, pad, ends = tokens.tolist(), running.tolist(), request.options.pad_id or 0, request.ends or ()
    shown = False  # whether the last column has a token of a row that was running
    for b, row in enumerate(rows):
        for n, token in enumerate(row):
            if not runs[b]:
                break
            shown = shown or (token >= 0 and n == len(row) - 1)
            runs[b] = token >= 0 and token not in ends
            if token < 0:
                broken[b], row[n] = columns + n, pad
    n = tokens.shape[1] - (not shown)
    return torch.tensor(rows, device=tokens.device)[:, :n], torch.tensor(runs, device=tokens.device)
