"""Drafts that the model verifies several tokens at a time: by an assistant model, or looked up in the text so far.

Greedy results are those of plain decoding. Sampled ones have its distribution: a drafted token x is kept with probability
min(1, p(x) / q(x)), and the first one that is not is drawn again from max(0, p - q); Leviathan et al. 2023, algorithm 1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..network.cache import SLACK
from ..ops import drawing
from .config import GenerationConfig
from .processors import MinLengthLogitsProcessor
from .prompt import Prompt
from .request import LanguageModel, Record, Request, non_finite
from .session import Session
from .stepwise import sample
from .stopping import ConfidenceCriteria, EosTokenCriteria, MaxLengthCriteria, StoppingCriteriaList


class Drafter(ABC):
    """Guesses what comes next."""

    @abstractmethod
    def draft(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """Guessed tokens [1, n] int64 after ids [1, T], n from 0 on, and the scores [1, n, V] they were drawn from, or None."""

    def learn(self, guessed: int, matched: int) -> None:  # noqa: B027 (not every drafter learns)
        """Hear how many of the guessed tokens were right."""


@dataclass
class PromptLookup(Drafter):
    """Copies what followed an earlier occurrence of the text's last tokens; Saxena 2023."""

    request: Request
    vocabulary: int

    def draft(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        options, T = self.request.options, ids.shape[1]
        nothing = ids[:, :0]
        if self.request.total <= T + 1:
            return nothing, None
        most = min(options.prompt_lookup_num_tokens or 0, SLACK)
        for size in range(min(options.max_matching_ngram_size, T - 1), 0, -1):
            matches = (ids[0].unfold(0, size, 1) == ids[0, T - size :]).all(1).nonzero().flatten().tolist()
            for at in matches:
                found = ids[:, at + size : min(at + size + most, T, self.request.total)]
                found = self._allowed(ids, found) if found.shape[1] else found
                if found.shape[1]:
                    ends = torch.isin(found[0], torch.tensor(options.eos_ids, device=ids.device)).nonzero()
                    return found[:, : int(ends[0])] if len(ends) else found, None
        return nothing, None

    def _allowed(self, ids: Tensor, found: Tensor) -> Tensor:
        """The tokens before the first one that the processors remove."""
        neutral = torch.ones(1, self.vocabulary, device=ids.device)
        for i in range(found.shape[1]):
            score = self.request.processors(torch.cat([ids, found[:, :i]], 1), neutral)[0, found[0, i]]
            if score == float("-inf") or score == torch.finfo(score.dtype).min:
                return found[:, :i]
        return found


class Assistant(Drafter):
    """A smaller model with the same tokenizer."""

    def __init__(self, model: LanguageModel, request: Request) -> None:
        prompt, own = request.prompt, GenerationConfig.like(model.generation_config).resolved()
        self.request = request
        self.count = own.num_assistant_tokens
        self.schedule = own.num_assistant_tokens_schedule
        self.threshold = own.assistant_confidence_threshold
        self.model = model
        self.processors = type(request.processors)(p for p in request.processors if not isinstance(p, MinLengthLogitsProcessor))
        self.shortest = max([p.min_length for p in request.processors if isinstance(p, MinLengthLogitsProcessor)], default=0)
        alone = Prompt(prompt.ids.to(model.device), prompt.mask, prompt.position_ids, prompt.token_type_ids)
        self.session = Session(model, alone, request.total)

    def draft(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        T = ids.shape[1]
        most = min(int(self.count), SLACK, self.request.total - T - 1)
        if most <= 0:
            return ids[:, :0], None
        self.session.crop(T - 1)
        criteria = StoppingCriteriaList([MaxLengthCriteria(T + most)])
        criteria.extend(c for c in self.request.criteria if isinstance(c, EosTokenCriteria))
        if self.threshold:
            criteria.append(ConfidenceCriteria(self.threshold))
        processors = self.processors
        if self.shortest > T:
            processors = type(processors)(
                [MinLengthLogitsProcessor(min(self.shortest, T + most), self.request.options.eos_ids), *processors]
            )
        record = Record(scores=[])
        request = replace(self.request, total=T + most, criteria=criteria, processors=processors, record=record)
        tokens = torch.cat(list(sample(self.session, ids.to(self.model.device), request)), 1)
        assert record.scores is not None
        return tokens.to(ids.device), torch.stack(record.scores, 1).to(ids.device)

    def learn(self, guessed: int, matched: int) -> None:
        if self.schedule != "constant":
            self.count = self.count + 2 if matched == guessed else max(1, self.count - 1)
        if self.schedule == "heuristic":  # transformers keeps what was learnt for the assistant's next call
            self.model.generation_config.num_assistant_tokens = self.count


def assisted(model: LanguageModel, request: Request) -> Iterator[Tensor]:
    """New tokens [1, n] int64 of each round, until the text has ended.

    Raises:
        NonFiniteLogitsError: the next token's logits were NaN or infinite.
    """
    session = Session.of(model, request)
    if request.assistant is None:
        return _verified(session, request, PromptLookup(request, model.config.vocab_size))
    return _verified(session, request, Assistant(request.assistant, request))


@torch.no_grad()
def _verified(session: Session, request: Request, drafter: Drafter) -> Iterator[Tensor]:
    ids = request.prompt.ids
    while ids.shape[1] < request.total:
        T = ids.shape[1]
        guess, drawn_from = drafter.draft(ids)
        drafted = guess.shape[1]
        whole = torch.cat([ids, guess], 1)
        logits = session.feed(whole, keep=drafted + 1).float()  # [1, n + 1, V]
        try:
            tokens, judged, scores = _judge(request, whole, logits, drawn_from)
        except BaseException:
            session.crop(T)  # the caller's cache keeps no guess that nobody judged
            raise
        matched = tokens.shape[1] - 1
        ids = torch.cat([ids, tokens], 1)
        session.crop(T + matched)
        drafter.learn(judged, matched)
        for i in range(matched + 1):
            request.record.step(session, logits[:, i], scores[:, i], drafted, i)
        yield tokens
        if bool(request.criteria(ids, request.record.scores).all()):
            break


def _judge(request: Request, whole: Tensor, logits: Tensor, drawn_from: Tensor | None) -> tuple[Tensor, int, Tensor]:
    """Tokens [1, m + 1], the m guesses that are right and the one that follows; guesses that were judged; their scores
    [1, n + 1, V].

    Args:
        whole: int64 [1, T + n], text and guesses. logits: [1, n + 1, V] behind the text and each guess.
        drawn_from: [1, n, V] scores of the drafter, or None.

    Raises:
        NonFiniteLogitsError, InputError: no token can be chosen behind the text.
    """
    options, n = request.options, logits.shape[1] - 1
    T = whole.shape[1] - n
    ids, guess = whole[:, :T], whole[:, T:]
    if not options.remove_invalid_values:
        n = min(n, _good(logits, ids) - 1)  # what breaks further on is met again, if the text gets there
    scores = torch.stack([request.processors(whole[:, : T + i], logits[:, i]) for i in range(n + 1)], 1)
    if request.processors:
        usable = int(request.usable(scores[0]).int().cumprod(0).sum())
        request.require(torch.tensor([usable > 0]))
        n = min(n, usable - 1)  # behind a guess that will not be taken nothing may be left
    scores, guess = scores[:, : n + 1], guess[:, :n]
    if options.do_sample and drawn_from is not None:
        tokens = _accept(guess, drawn_from[:, :n], scores, request.generator)
    else:
        p = scores[0].softmax(-1) if options.do_sample else None
        chosen = scores.argmax(-1) if p is None else drawing.multinomial(p, request.generator)[None]
        tokens = chosen[:, : int((guess == chosen[:, :n]).int().cumprod(1).sum()) + 1]
    tokens = tokens[:, : request.total - T]
    ends = torch.isin(tokens[0], torch.tensor(options.eos_ids, device=ids.device)).nonzero()
    return tokens[:, : int(ends[0]) + 1] if len(ends) else tokens, n, scores


def _good(logits: Tensor, ids: Tensor) -> int:
    """How many of the first logits [1, n, V] behind ids [1, T] are finite.

    Raises:
        NonFiniteLogitsError: none.
    """
    good = int(logits[0].isfinite().all(-1).int().cumprod(0).sum())
    if good == 0:
        raise non_finite({0: ids.shape[1]}, ids)
    return good


def _accept(guess: Tensor, drawn_from: Tensor, scores: Tensor, generator: torch.Generator | None) -> Tensor:
    """Tokens [1, m + 1]: the m drafted ones that are kept, and one that is drawn.

    Args:
        guess: int64 [1, n]. drawn_from: [1, n, V] scores of the drafter. scores: [1, n + 1, V] of the model.
    """
    n = guess.shape[1]
    q, p = drawn_from.softmax(-1), scores.softmax(-1)
    ratio = (p[:, :n].gather(2, guess[..., None]) / q.gather(2, guess[..., None])).squeeze(2).squeeze(0)  # [n]
    kept = torch.rand(ratio.shape, generator=generator, dtype=ratio.dtype, device=ratio.device) <= ratio
    m = int(kept.int().cumprod(0).sum())
    rest = p[:, m]
    if m < n:
        rest = (rest - q[:, m]).clamp(min=0)
        rest = rest / rest.sum()
    return torch.cat([guess[:, :m], drawing.multinomial(rest, generator)[:, None]], 1)
