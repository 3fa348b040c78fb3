"""What changes the scores before a token is chosen, in transformers' order; warpers, which only sampling has, follow them.

A processor takes ids [B, T] (prompt and continuation) and scores [B, V] in float32, and returns scores [B, V]. Removed
tokens have -inf.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from .callbacks import scores_of, tokens_of
from .config import Options

NEVER = float("-inf")


class LogitsProcessor(ABC):
    """Base of processors, ours and a user's."""

    @abstractmethod
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [B, V] for ids [B, T]."""


class LogitsProcessorList(list[Callable[[Tensor, Tensor], Tensor]]):
    """Processors that run one after the other."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [B, V] after every processor.

        Raises:
            InputError: one of them returned something else.
        """
        for processor in self:
            scores = scores_of(processor, input_ids, scores)
        return scores


def _at(vocabulary: int, ids: Iterable[int], like: Tensor) -> Tensor:
    """Boolean [V], True at `ids`; those beyond the vocabulary are ignored."""
    found = torch.zeros(vocabulary, dtype=torch.bool)
    found[[i for i in ids if 0 <= i < vocabulary]] = True
    return found.to(like.device)


@dataclass
class ClassifierFreeGuidance(LogitsProcessor):
    """scale * (log p - log p_unconditional) + log p_unconditional; Sanchez et al. 2023, equation 7.

    unconditional: the model's logits [B, V] for the ids of the unconditional prompt extended by what was generated.
    """

    scale: float
    unconditional: Callable[[Tensor], Tensor]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        without = self.unconditional(input_ids).float().log_softmax(-1)
        return self.scale * (scores.log_softmax(-1) - without) + without


@dataclass
class SequenceBias(LogitsProcessor):
    """Adds a bias to the last token of a sequence wherever the text ends in the tokens before it."""

    biases: list[tuple[list[int], float]]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        bias = torch.zeros_like(scores)
        for ids, value in self.biases:
            before = torch.tensor(ids[:-1], device=scores.device)
            if len(before) > input_ids.shape[1]:
                continue
            matches = (input_ids[:, input_ids.shape[1] - len(before) :] == before).all(1)
            bias[:, ids[-1]] += torch.where(matches, value, 0.0)
        return scores + bias


@dataclass
class RepetitionPenalty(LogitsProcessor):
    """Divides the positive scores of tokens that occur in the text and multiplies the negative; Keskar et al. 2019, 4.1.

    starts: int64 [B], columns of left padding whose tokens do not count, or None.
    """

    penalty: float
    starts: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        V = scores.shape[1]
        if self.starts is not None:
            columns = torch.arange(input_ids.shape[1], device=scores.device)
            input_ids = input_ids.masked_fill(columns < self.starts[:, None], V)
        padded = F.pad(scores, (0, 1))  # the column V takes what does not count
        seen = padded.gather(1, input_ids)
        seen = torch.where(seen < 0, seen * self.penalty, seen / self.penalty)
        return padded.scatter(1, input_ids, seen)[:, :V]


@dataclass
class NoRepeatNGram(LogitsProcessor):
    """Removes tokens that would complete a run of `size` tokens which the text has already."""

    size: int

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        T, V = input_ids.shape[1], scores.shape[1]
        if self.size > T:
            return scores
        runs = input_ids.unfold(1, self.size, 1)  # [B, n, size]
        matches = (runs[..., :-1] == input_ids[:, None, T + 1 - self.size :]).all(-1)
        banned = scores.new_zeros(len(scores), V + 1, dtype=torch.bool)
        banned.scatter_(1, torch.where(matches, runs[..., -1], V), True)
        return scores.masked_fill(banned[:, :V], NEVER)


@dataclass
class MinLength(LogitsProcessor):
    """Removes the end tokens from texts of fewer than `length` tokens."""

    length: int
    eos_ids: list[int]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] >= self.length:
            return scores
        return scores.masked_fill(_at(scores.shape[1], self.eos_ids, scores), NEVER)


@dataclass
class PrefixAllowedTokens(LogitsProcessor):
    """Removes all tokens but those that `allowed(row of the prompts, ids [T])` returns."""

    allowed: Callable[[int, Tensor], list[int]]
    rows_per_prompt: int

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        mask = torch.full_like(scores, NEVER)
        for row, ids in enumerate(input_ids):
            mask[row, tokens_of(self.allowed, row // self.rows_per_prompt, ids, scores.shape[1])] = 0
        allowed = scores + mask
        # Where all that is allowed had been removed before, what is allowed wins.
        stuck = allowed.amax(-1).isneginf().view(-1, self.rows_per_prompt).all(1)
        return torch.where(stuck.repeat_interleave(self.rows_per_prompt)[:, None], mask, allowed)


@dataclass
class ForcedTokens(LogitsProcessor):
    """Allows nothing but `ids` once the text has `length` tokens."""

    length: int
    ids: list[int]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] != self.length:
            return scores
        forced = torch.full_like(scores, NEVER)
        forced[:, self.ids] = 0
        return forced


class RemoveInvalidValues(LogitsProcessor):
    """NaN becomes 0, infinities the largest numbers."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.nan_to_num(0.0)


@dataclass
class ExponentialDecay(LogitsProcessor):
    """Raises the end tokens' scores by |score| * (factor ** (tokens past start) - 1)."""

    start: int
    factor: float
    eos_ids: list[int]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        beyond = input_ids.shape[1] - self.start
        if beyond <= 0:
            return scores
        raised = scores.clone()
        ends = scores[:, self.eos_ids]
        raised[:, self.eos_ids] = torch.where(ends.isfinite(), ends + ends.abs() * (self.factor**beyond - 1), ends)
        return raised


@dataclass
class SuppressTokens(LogitsProcessor):
    """Removes `ids`, always or only when the text has exactly `length` tokens."""

    ids: list[int]
    length: int | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.length is not None and input_ids.shape[1] != self.length:
            return scores
        return scores.masked_fill(_at(scores.shape[1], self.ids, scores), NEVER)


@dataclass
class Context:
    """What processors are built from beside the options.

    prompt: columns of the prompts, padding included. total: columns at most. vocabulary: V.
    starts: int64 [B], columns of left padding, or None.
    """

    prompt: int
    total: int
    vocabulary: int
    starts: Tensor | None = None
    unconditional: Callable[[Tensor], Tensor] | None = None
    prefix_allowed_tokens_fn: Callable[[int, Tensor], list[int]] | None = None
    own: Sequence[Callable[..., Any]] = ()  # the user's


def processors_of(options: Options, about: Context) -> LogitsProcessorList:
    """The processors that resolved options ask for, and the user's last.

    Raises:
        InputError: a token id beyond the vocabulary.
    """
    out, o = LogitsProcessorList(), options
    eos = [i for i in o.eos_ids if 0 <= i < about.vocabulary]  # a configuration's may lie beyond a small vocabulary
    if o.guidance_scale is not None and o.guidance_scale != 1 and about.unconditional is not None:
        out.append(ClassifierFreeGuidance(o.guidance_scale, about.unconditional))
    if o.sequence_bias is not None:
        pairs = o.sequence_bias.items() if isinstance(o.sequence_bias, dict) else o.sequence_bias
        biases = {tuple(_within(ids, about, "sequence_bias")): float(value) for ids, value in pairs}  # of two, the last
        out.append(SequenceBias([(list(ids), value) for ids, value in biases.items()]))
    if o.repetition_penalty != 1:
        out.append(RepetitionPenalty(o.repetition_penalty, about.starts))
    if o.no_repeat_ngram_size > 0:
        out.append(NoRepeatNGram(o.no_repeat_ngram_size))
    if o.bad_words_ids is not None:
        words = [ids for ids in o.bad_words_ids if len(ids) > 1 or ids[0] not in eos]
        out.append(SequenceBias([(_within(ids, about, "bad_words_ids"), NEVER) for ids in words]))
    shortest = o.min_length if o.min_new_tokens is None else about.prompt + o.min_new_tokens
    if shortest > 0 and eos:
        out.append(MinLength(shortest, eos))
    if about.prefix_allowed_tokens_fn is not None:
        out.append(PrefixAllowedTokens(about.prefix_allowed_tokens_fn, o.num_beams))
    if o.forced_bos_token_id is not None:
        out.append(ForcedTokens(1, _within([o.forced_bos_token_id], about, "forced_bos_token_id")))
    if o.forced_eos_token_id is not None:
        ids = o.forced_eos_token_id if isinstance(o.forced_eos_token_id, list) else [o.forced_eos_token_id]
        out.append(ForcedTokens(about.total - 1, _within(ids, about, "forced_eos_token_id")))
    if o.remove_invalid_values:
        out.append(RemoveInvalidValues())
    if o.exponential_decay_length_penalty is not None and eos:
        start, factor = o.exponential_decay_length_penalty
        out.append(ExponentialDecay(about.prompt + start, factor, eos))
    if o.suppress_tokens is not None:
        out.append(SuppressTokens(o.suppress_tokens))
    if o.begin_suppress_tokens is not None:
        begin = about.prompt + (about.prompt <= 1 and o.forced_bos_token_id is not None)
        out.append(SuppressTokens(o.begin_suppress_tokens, begin))
    out.extend(about.own)
    return out


def _within(ids: Iterable[int], about: Context, name: str) -> list[int]:
    tokens = list(ids)
    if beyond := [i for i in tokens if i >= about.vocabulary]:
        raise InputError(f"{name} names token {beyond[0]}; the vocabulary has {about.vocabulary}")
    return tokens
