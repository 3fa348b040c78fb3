"""Beam search and beam sampling. Shape letters here: N prompts, K beams, J candidates kept each step.

The scores and the rule that ends a search are transformers': a finished text of n new tokens counts its summed
log-probability / n ** length_penalty (Wu et al. 2016, section 7, without coverage).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import Options
from .request import LanguageModel, Request, non_finite
from .session import Session

_WORST = -1e9  # of a beam that does not exist


@dataclass
class Beams:
    """K texts of each prompt with their scores, best first.

    ids: int64 [N, K, total]. scores: float32 [N, K]. parents: int32 [N, K, total - P], the row of the batch that each
    token continued, -1 where there is none. finished: boolean [N, K].
    """

    ids: Tensor
    scores: Tensor
    parents: Tensor
    finished: Tensor

    def take(self, index: Tensor) -> Beams:
        """The beams at index [N, K']."""
        wide = index[..., None]
        return Beams(
            self.ids.take_along_dim(wide, 1),
            self.scores.take_along_dim(index, 1),
            self.parents.take_along_dim(wide, 1),
            self.finished.take_along_dim(index, 1),
        )

    def join(self, other: Beams) -> Beams:
        """Both, side by side."""
        return Beams(
            torch.cat([self.ids, other.ids], 1),
            torch.cat([self.scores, other.scores], 1),
            torch.cat([self.parents, other.parents], 1),
            torch.cat([self.finished, other.finished], 1),
        )


def beams(model: LanguageModel, request: Request) -> Iterator[Tensor]:
    """The new tokens int64 [N * num_return_sequences, n] of the best texts, all at once; the record has their scores.

    Raises:
        NonFiniteLogitsError: after the other prompts have ended, names the rows whose logits were NaN or infinite.
    """
    return _search(Session.of(model, request), request)


@torch.no_grad()
def _search(session: Session, request: Request) -> Iterator[Tensor]:
    ids = request.prompt.ids  # [N * K, P], every prompt K times
    options, total, device = request.options, request.total, ids.device
    K, P = options.num_beams, ids.shape[1]
    N, length = len(ids) // K, P
    kept = min(max(2, 1 + len(options.eos_ids)) * K, K * session.model.config.vocab_size)
    fill = (options.pad_id or options.eos_ids[0]) if options.eos_ids else -1  # a pad id of 0 counts as none, as in transformers
    running = _empty(N, K, P, total, ids, fill)
    done = running.take(torch.arange(K, device=device).expand(N, K))
    running.scores = torch.zeros(N, K, device=device).index_fill(1, torch.arange(1, K, device=device), _WORST)
    improvable = torch.ones(N, 1, dtype=torch.bool, device=device)
    broken = _Broken()
    among_best = torch.arange(kept, device=device) < K
    while length < total:
        texts = running.ids[:, :, :length].flatten(0, 1)  # [N * K, length]
        logits = session.feed(texts)[:, -1].float()
        if not options.remove_invalid_values:
            logits = broken.out_of(logits, texts, improvable)
        scores = request.processors(texts, logits.log_softmax(-1))
        request.record.step(session, logits, scores)
        candidates = _continue(running, scores, kept, (length, P), improvable, request)
        candidates.finished = request.criteria(candidates.ids[:, :, : length + 1].flatten(0, 1), request.record.scores).view(
            N, kept
        )

        alive = candidates.scores + candidates.finished * _WORST
        running = Beams(candidates.ids, alive, candidates.parents, candidates.finished).take(alive.topk(K).indices)
        all_ended = bool(candidates.finished.all())
        full = done.finished.all(1, keepdim=True) & (options.early_stopping is True)
        candidates.finished = candidates.finished & among_best
        candidates.scores = candidates.scores / (length + 1 - P) ** options.length_penalty
        for ruled_out in (full, ~improvable, ~candidates.finished):
            candidates.scores = candidates.scores + ruled_out * _WORST
        merged = done.join(candidates)
        done = merged.take(merged.scores.topk(K).indices)

        session.reorder(running.parents[:, :, length - P].flatten().long())
        length += 1
        improvable = improvable & _can_improve(running, done, length - P, total - P, options)
        if (
            len(broken.texts) == N
            or all_ended
            or not bool(improvable.any())
            or (options.early_stopping is True and bool(done.finished.all()))
        ):
            break
    best = done.take(torch.arange(options.num_return_sequences, device=device).expand(N, -1))
    parents = best.parents.flatten(0, 1)
    longest = int((parents >= 0).sum(1).max())
    broken.complain(best.ids.flatten(0, 1)[:, : max(P + longest, length)], options)
    request.record.sequences_scores, request.record.beam_indices = best.scores.flatten(), parents[:, :longest]
    yield best.ids.flatten(0, 1)[:, P : P + longest]


class _Broken:
    """Prompts whose logits were NaN or infinite."""

    def __init__(self) -> None:
        self.texts: dict[int, Tensor] = {}  # prompt -> [T], its first beam when they were met

    def out_of(self, logits: Tensor, texts: Tensor, improvable: Tensor) -> Tensor:
        """Logits [N * K, V] with zeros for those that are not finite, which are noted where they matter still."""
        finite = logits.isfinite().all(-1)
        if bool(finite.all()):
            return logits
        K = len(logits) // len(improvable)
        for prompt in (~finite.view(-1, K).all(1) & improvable[:, 0]).nonzero().flatten().tolist():
            self.texts.setdefault(prompt, texts[prompt * K])
        return torch.where(finite[:, None], logits, 0.0)

    def complain(self, sequences: Tensor, options: Options) -> None:
        """Raise for the prompts that are broken; sequences [N * R, T] are the results."""
        if not self.texts:
            return
        R = options.num_return_sequences
        for prompt, text in self.texts.items():
            sequences[prompt * R : (prompt + 1) * R] = options.pad_id or 0
            sequences[prompt * R : (prompt + 1) * R, : len(text)] = text
        raise non_finite({prompt * R + i: len(text) for prompt, text in self.texts.items() for i in range(R)}, sequences)


def _empty(N: int, K: int, P: int, total: int, ids: Tensor, fill: int) -> Beams:
    texts = torch.full((N, K, total), fill, dtype=torch.int64, device=ids.device)
    texts[:, :, :P] = ids.view(N, K, P)
    return Beams(
        texts,
        torch.full((N, K), _WORST, device=ids.device),
        torch.full((N, K, total - P), -1, dtype=torch.int32, device=ids.device),
        torch.zeros(N, K, dtype=torch.bool, device=ids.device),
    )


def _continue(running: Beams, scores: Tensor, kept: int, place: tuple[int, int], wanted: Tensor, request: Request) -> Beams:
    """The `kept` best continuations of each prompt by one token, or as many drawn without replacement.

    Args:
        place: columns of texts and of prompts. wanted: boolean [N, 1], False for prompts whose search has ended.
    """
    length, P = place
    N, K = running.scores.shape
    V = scores.shape[-1]
    summed = (scores.view(N, K, V) + running.scores[:, :, None]).view(N, K * V)
    if not bool((usable := request.usable(summed)).all()):
        request.require((usable | ~wanted[:, 0]).repeat_interleave(K))
        summed = torch.where(usable[:, None], summed, _WORST)
    if request.options.do_sample:
        index = torch.multinomial(summed.softmax(-1), kept, generator=request.generator)
        best, order = summed.gather(1, index).sort(1, descending=True)  # the first K are the best, as from transformers 5.24 on
        index = index.gather(1, order)
    else:
        best, index = summed.topk(kept)
    beam = index // V
    out = running.take(beam)
    out.scores = best
    out.ids[:, :, length] = index % V
    out.parents[:, :, length - P] = (beam + torch.arange(N, device=beam.device)[:, None] * K).int()
    return out


def _can_improve(running: Beams, done: Beams, new: int, most: int, options: Options) -> Tensor:
    """Boolean [N, 1]: whether the best running beam might still beat the worst finished one.

    Its score is taken at the present length, or at the greatest where longer texts count more and early_stopping is
    "never".
    """
    early, penalty = options.early_stopping, options.length_penalty
    length = most if early == "never" and penalty > 0 else new
    best = running.scores[:, :1] / length**penalty
    worst = torch.where(done.finished, done.scores.amin(1, keepdim=True), _WORST)
    return (best > worst).any(1, keepdim=True)
