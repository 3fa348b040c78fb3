"""What only sampling does to the scores: temperature, and the removal of unlikely tokens. Same calls as processors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .config import Options
from .processors import NEVER, LogitsProcessor, LogitsProcessorList


@dataclass
class Temperature(LogitsProcessor):
    """Divides the scores."""

    temperature: float

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores / self.temperature


@dataclass
class TopH(LogitsProcessor):
    """Keeps the likeliest of the first 100 tokens while their entropy stays below `share` of the entropy of the 100."""

    share: float

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        top, ids = scores.topk(min(100, scores.shape[1]))  # sorted
        p = (top - top.logsumexp(-1, keepdim=True)).softmax(-1)
        entropy = -(p * p.log())  # NaN where p is 0: not kept
        kept = entropy.cumsum(-1) <= self.share * _entropy(top)[:, None]
        kept[:, 0] = True
        return scores.masked_fill(~torch.zeros_like(scores, dtype=torch.bool).scatter(1, ids, kept), NEVER)


@dataclass
class TopK(LogitsProcessor):
    """Keeps the k likeliest tokens, and what ties with the last of them."""

    k: int

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        last = scores.topk(min(self.k, scores.shape[1])).values[:, -1:]
        return scores.masked_fill(scores < last, NEVER)


@dataclass
class TopP(LogitsProcessor):
    """Keeps the likeliest tokens whose probabilities sum up to p; Holtzman et al. 2020, section 3.1."""

    p: float
    keep: int = 1

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rising, order = scores.sort()
        removed = rising.softmax(-1).cumsum(-1) <= 1 - self.p
        removed[:, -self.keep :] = False
        return scores.masked_fill(removed.scatter(1, order, removed), NEVER)


@dataclass
class MinP(LogitsProcessor):
    """Removes tokens less likely than p times the likeliest; Nguyen et al. 2024."""

    p: float
    keep: int = 1

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        probs = scores.softmax(-1)
        removed = probs < self.p * probs.amax(-1, keepdim=True)
        removed.scatter_(1, probs.topk(min(self.keep, scores.shape[1])).indices, False)
        return scores.masked_fill(removed, NEVER)


@dataclass
class TypicalP(LogitsProcessor):
    """Keeps the tokens whose information is nearest to the entropy, up to a mass of p; Meister et al. 2022, equation 10."""

    p: float
    keep: int = 1

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        log_p = scores.log_softmax(-1)
        entropy = -(log_p * log_p.exp()).nansum(-1, keepdim=True)
        distance, order = (-log_p - entropy).abs().sort()
        mass = scores.gather(1, order).softmax(-1).cumsum(-1)
        last = (mass < self.p).sum(1, keepdim=True).clamp(max=scores.shape[1] - 1)
        removed = distance > distance.gather(1, last)
        removed[:, : self.keep] = False
        return scores.masked_fill(removed.scatter(1, order, removed), NEVER)


@dataclass
class Cutoff(LogitsProcessor):
    """Removes tokens less likely than epsilon, or with `eta` than min(epsilon, sqrt(epsilon) * exp(-entropy)).

    Hewitt et al. 2022, "Truncation sampling as language model desmoothing".
    """

    epsilon: float
    eta: bool = False
    keep: int = 1

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        limit = torch.tensor(self.epsilon, device=scores.device)
        if self.eta:
            limit = torch.minimum(limit, limit.sqrt() * (-_entropy(scores)).exp())[:, None]
        kept = scores.topk(min(self.keep, scores.shape[1])).values[:, -1:]
        return scores.masked_fill((scores.softmax(-1) < limit) & (scores < kept), NEVER)


class Renormalize(LogitsProcessor):
    """Scores become log-probabilities."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.log_softmax(-1)


def _entropy(scores: Tensor) -> Tensor:
    """Entropy [B] in nats; a removed token counts with the smallest number in place of -inf, as torch.distributions does."""
    log_p = scores - scores.logsumexp(-1, keepdim=True)
    return -(log_p.clamp(min=torch.finfo(scores.dtype).min) * log_p.softmax(-1)).sum(-1)


def warpers_of(options: Options) -> LogitsProcessorList:
    """The warpers that resolved options ask for; with beams they keep a token that does not end the text."""
    out, o = LogitsProcessorList(), options
    keep = max(1, len(o.eos_ids)) + 1 if o.num_beams > 1 else 1
    if o.do_sample:
        if o.temperature != 1:
            out.append(Temperature(o.temperature))
        if o.top_h is not None:
            out.append(TopH(o.top_h))
        if o.top_k:
            out.append(TopK(max(o.top_k, keep)))
        if o.top_p < 1:
            out.append(TopP(o.top_p, keep))
        if o.min_p is not None:
            out.append(MinP(o.min_p, keep))
        if o.typical_p < 1:
            out.append(TypicalP(o.typical_p, keep))
        if o.epsilon_cutoff:
            out.append(Cutoff(o.epsilon_cutoff, keep=keep))
        if o.eta_cutoff:
            out.append(Cutoff(o.eta_cutoff, eta=True, keep=keep))
    if o.renormalize_logits:
        out.append(Renormalize())
    return out
