"""What only sampling does to the scores: temperature, and the removal of unlikely tokens. Same calls as processors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import is_int, is_number
from .config import Options
from .processors import NEVER, LogitsProcessor, LogitsProcessorList, require


@dataclass
class TemperatureLogitsWarper(LogitsProcessor):
    """Divides the scores."""

    temperature: float

    def __post_init__(self) -> None:
        require(
            self,
            "temperature",
            is_number(self.temperature) and self.temperature > 0,
            "a finite number above 0 (do_sample=False is greedy)",
        )

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores / self.temperature


@dataclass
class TopHLogitsWarper(LogitsProcessor):
    """Keeps the likeliest of the first 100 tokens while their entropy stays below `share` of the entropy of the 100."""

    top_h: float
    filter_value: float = NEVER

    def __post_init__(self) -> None:
        require(self, "top_h", is_number(self.top_h) and 0 < self.top_h <= 1, "a number above 0 and up to 1")
        _require_rest(self)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        top, ids = scores.topk(min(100, scores.shape[1]))  # sorted
        p = (top - top.logsumexp(-1, keepdim=True)).softmax(-1)
        entropy = -(p * p.log())  # NaN where p is 0: not kept
        kept = entropy.cumsum(-1) <= self.top_h * _entropy(top)[:, None]
        kept[:, 0] = True
        return scores.masked_fill(~torch.zeros_like(scores, dtype=torch.bool).scatter(1, ids, kept), self.filter_value)


@dataclass
class TopKLogitsWarper(LogitsProcessor):
    """Keeps the k likeliest tokens, and what ties with the last of them."""

    top_k: int
    filter_value: float = NEVER
    min_tokens_to_keep: int = 1

    def __post_init__(self) -> None:
        require(self, "top_k", is_int(self.top_k) and self.top_k > 0, "an integer from 1")
        _require_rest(self)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        last = scores.topk(min(max(self.top_k, self.min_tokens_to_keep), scores.shape[1])).values[:, -1:]
        return scores.masked_fill(scores < last, self.filter_value)


@dataclass
class TopPLogitsWarper(LogitsProcessor):
    """Keeps the likeliest tokens whose probabilities sum up to p; Holtzman et al. 2020, section 3.1."""

    top_p: float
    filter_value: float = NEVER
    min_tokens_to_keep: int = 1

    def __post_init__(self) -> None:
        require(self, "top_p", is_number(self.top_p) and 0 <= self.top_p <= 1, "a number from 0 to 1")
        _require_rest(self)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rising, order = scores.sort()
        removed = rising.softmax(-1).cumsum(-1) <= 1 - self.top_p
        removed[:, -self.min_tokens_to_keep :] = False
        return scores.masked_fill(removed.scatter(1, order, removed), self.filter_value)


@dataclass
class MinPLogitsWarper(LogitsProcessor):
    """Removes tokens less likely than p times the likeliest; Nguyen et al. 2024."""

    min_p: float
    filter_value: float = NEVER
    min_tokens_to_keep: int = 1

    def __post_init__(self) -> None:
        require(self, "min_p", is_number(self.min_p) and 0 <= self.min_p <= 1, "a number from 0 to 1")
        _require_rest(self)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        probs = scores.softmax(-1)
        removed = probs < self.min_p * probs.amax(-1, keepdim=True)
        removed.scatter_(1, probs.topk(min(self.min_tokens_to_keep, scores.shape[1])).indices, False)
        return scores.masked_fill(removed, self.filter_value)


@dataclass
class TypicalLogitsWarper(LogitsProcessor):
    """Keeps the tokens whose information is nearest to the entropy, up to a mass of p; Meister et al. 2022, equation 10."""

    mass: float = 0.9
    filter_value: float = NEVER
    min_tokens_to_keep: int = 1

    def __post_init__(self) -> None:
        require(self, "mass", is_number(self.mass) and 0 < self.mass < 1, "a number above 0 and below 1")
        _require_rest(self)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        log_p = scores.log_softmax(-1)
        entropy = -(log_p * log_p.exp()).nansum(-1, keepdim=True)
        distance, order = (-log_p - entropy).abs().sort()
        mass = scores.gather(1, order).softmax(-1).cumsum(-1)
        last = (mass < self.mass).sum(1, keepdim=True).clamp(max=scores.shape[1] - 1)
        removed = distance > distance.gather(1, last)
        removed[:, : self.min_tokens_to_keep] = False
        return scores.masked_fill(removed.scatter(1, order, removed), self.filter_value)


@dataclass
class EpsilonLogitsWarper(LogitsProcessor):
    """Removes tokens less likely than epsilon.

    Hewitt et al. 2022, "Truncation sampling as language model desmoothing", as is EtaLogitsWarper.
    """

    epsilon: float
    filter_value: float = NEVER
    min_tokens_to_keep: int = 1

    def __post_init__(self) -> None:
        require(self, "epsilon", is_number(self.epsilon) and 0 < self.epsilon < 1, "a number above 0 and below 1")
        _require_rest(self)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        kept = scores.topk(min(self.min_tokens_to_keep, scores.shape[1])).values[:, -1:]
        return scores.masked_fill((scores.softmax(-1) < self._limit(scores)) & (scores < kept), self.filter_value)

    def _limit(self, scores: Tensor) -> Tensor:
        """The least probability that stays, [] or [B, 1]."""
        return torch.tensor(self.epsilon, device=scores.device)


@dataclass
class EtaLogitsWarper(EpsilonLogitsWarper):
    """Removes tokens less likely than min(epsilon, sqrt(epsilon) * exp(-entropy)). device: has no say."""

    device: Any = "cpu"

    def _limit(self, scores: Tensor) -> Tensor:
        limit = super()._limit(scores)
        return torch.minimum(limit, limit.sqrt() * (-_entropy(scores)).exp())[:, None]


class LogitNormalization(LogitsProcessor):
    """Scores become log-probabilities."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.log_softmax(-1)


def _require_rest(warper: Any) -> None:
    """Refuse what the removal of tokens cannot work with beside its own threshold."""
    fills, keep = warper.filter_value, vars(warper).get("min_tokens_to_keep", 1)
    require(warper, "filter_value", isinstance(fills, float) or is_number(fills), "a number")
    require(warper, "min_tokens_to_keep", is_int(keep) and keep > 0, "an integer from 1")


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
            out.append(TemperatureLogitsWarper(o.temperature))
        if o.top_h is not None:
            out.append(TopHLogitsWarper(o.top_h))
        if o.top_k:
            out.append(TopKLogitsWarper(o.top_k, min_tokens_to_keep=keep))
        if o.top_p < 1:
            out.append(TopPLogitsWarper(o.top_p, min_tokens_to_keep=keep))
        if o.min_p is not None:
            out.append(MinPLogitsWarper(o.min_p, min_tokens_to_keep=keep))
        if o.typical_p < 1:
            out.append(TypicalLogitsWarper(o.typical_p, min_tokens_to_keep=keep))
        if o.epsilon_cutoff:
            out.append(EpsilonLogitsWarper(o.epsilon_cutoff, min_tokens_to_keep=keep))
        if o.eta_cutoff:
            out.append(EtaLogitsWarper(o.eta_cutoff, min_tokens_to_keep=keep))
    if o.renormalize_logits:
        out.append(LogitNormalization())
    return out
