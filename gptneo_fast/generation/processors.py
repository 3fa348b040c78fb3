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

from ..config import is_int, is_number
from ..errors import InputError, short
from .callbacks import scores_of, tokens_of
from .config import Options
from .options import check_option, plain

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


def ids_of(value: int | Iterable[int] | Tensor) -> list[int]:
    """Token ids as a list, of one id, several, or a tensor.

    Raises:
        InputError: something else.
    """
    found = plain(value)
    ids = list(found) if isinstance(found, Iterable) else [found]
    if not all(is_int(i) and abs(i) < 2**31 for i in ids):
        raise InputError(f"{short(value)} is no token id, nor several in a list or a tensor")
    return ids


def require(owner: object, name: str, holds: bool, wanted: str) -> None:
    """Refuse the argument `name`, which `owner` keeps under that name, unless it `holds`.

    Raises:
        InputError: says the class, the argument, the value and what it may be.
    """
    if not holds:
        raise InputError(f"{type(owner).__name__}: {name}={short(getattr(owner, name))} is not {wanted}")


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
class SequenceBiasLogitsProcessor(LogitsProcessor):
    """Adds a bias to the last token of a sequence wherever the text ends in the tokens before it."""

    sequence_bias: Any  # {tuple of ids: bias} or [[ids, bias], ...]

    def __post_init__(self) -> None:
        check_option("sequence_bias", self.sequence_bias)
        pairs = self.sequence_bias.items() if isinstance(self.sequence_bias, dict) else self.sequence_bias
        self.sequence_bias = {tuple(ids): float(value) for ids, value in pairs}

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        bias = torch.zeros_like(scores)
        for ids, value in self.sequence_bias.items():
            before = torch.tensor(ids[:-1], dtype=torch.long, device=scores.device)
            if len(before) > input_ids.shape[1]:
                continue
            matches = (input_ids[:, input_ids.shape[1] - len(before) :] == before).all(1)
            bias[:, ids[-1]] += torch.where(matches, value, 0.0)
        return scores + bias


class NoBadWordsLogitsProcessor(SequenceBiasLogitsProcessor):
    """Removes the last token of a sequence of ids wherever the text ends in the tokens before it; an end token by itself
    may follow."""

    def __init__(self, bad_words_ids: list[list[int]], eos_token_id: int | list[int] | Tensor | None = None) -> None:
        check_option("bad_words_ids", bad_words_ids)
        ends = [] if eos_token_id is None else ids_of(eos_token_id)
        self.bad_word_ids = bad_words_ids  # under transformers' name
        words = [ids for ids in bad_words_ids if len(ids) > 1 or ids[0] not in ends]
        self.sequence_bias = {tuple(ids): NEVER for ids in words}


@dataclass
class RepetitionPenaltyLogitsProcessor(LogitsProcessor):
    """Divides the positive scores of tokens that occur in the text and multiplies the negative; Keskar et al. 2019, 4.1.

    prompt_ignore_length: columns whose tokens do not count, one number or int64 [B], as of left padding; or None.
    """

    penalty: float
    prompt_ignore_length: int | Tensor | None = None

    def __post_init__(self) -> None:
        require(self, "penalty", is_number(self.penalty) and self.penalty > 0, "a finite number above 0")
        ignored = self.prompt_ignore_length
        counts = ignored is None or isinstance(ignored, Tensor) or (is_int(ignored) and 0 <= ignored < 2**31)
        require(self, "prompt_ignore_length", counts, "a number of columns, or a tensor of them")

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        V = scores.shape[1]
        if self.prompt_ignore_length is not None:
            columns = torch.arange(input_ids.shape[1], device=scores.device)
            skipped = torch.as_tensor(self.prompt_ignore_length, device=scores.device).view(-1, 1)
            input_ids = input_ids.masked_fill(columns < skipped, V)
        padded = F.pad(scores, (0, 1))  # the column V takes what does not count
        seen = padded.gather(1, input_ids)
        seen = torch.where(seen < 0, seen * self.penalty, seen / self.penalty)
        return padded.scatter(1, input_ids, seen)[:, :V]


@dataclass
class NoRepeatNGramLogitsProcessor(LogitsProcessor):
    """Removes tokens that would complete a run of `ngram_size` tokens which the text has already."""

    ngram_size: int

    def __post_init__(self) -> None:
        require(self, "ngram_size", is_int(self.ngram_size) and self.ngram_size > 0, "an integer from 1")

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        T, V = input_ids.shape[1], scores.shape[1]
        if self.ngram_size > T:
            return scores
        runs = input_ids.unfold(1, self.ngram_size, 1)  # [B, n, size]
        matches = (runs[..., :-1] == input_ids[:, None, T + 1 - self.ngram_size :]).all(-1)
        banned = scores.new_zeros(len(scores), V + 1, dtype=torch.bool)
        banned.scatter_(1, torch.where(matches, runs[..., -1], V), True)
        return scores.masked_fill(banned[:, :V], NEVER)


@dataclass
class MinLengthLogitsProcessor(LogitsProcessor):
    """Removes the end tokens from texts of fewer than `min_length` tokens. device: has no say."""

    min_length: int
    eos_token_id: int | list[int] | Tensor
    device: Any = "cpu"

    def __post_init__(self) -> None:
        require(self, "min_length", is_int(self.min_length) and self.min_length >= 0, "an integer from 0")

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] >= self.min_length:
            return scores
        return scores.masked_fill(_at(scores.shape[1], ids_of(self.eos_token_id), scores), NEVER)


@dataclass
class MinNewTokensLengthLogitsProcessor(LogitsProcessor):
    """Removes the end tokens until `min_new_tokens` follow a prompt of so many columns. device: has no say."""

    prompt_length_to_skip: int
    min_new_tokens: int
    eos_token_id: int | list[int] | Tensor
    device: Any = "cpu"

    def __post_init__(self) -> None:
        for name in ("prompt_length_to_skip", "min_new_tokens"):
            value = getattr(self, name)
            require(self, name, is_int(value) and value >= 0, "an integer from 0")

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        shortest = self.prompt_length_to_skip + self.min_new_tokens
        return MinLengthLogitsProcessor(shortest, self.eos_token_id)(input_ids, scores)


@dataclass
class PrefixConstrainedLogitsProcessor(LogitsProcessor):
    """Removes all tokens but those that a function of (row of the prompts, ids [T]) returns. num_beams: rows of a prompt."""

    prefix_allowed_tokens_fn: Callable[[int, Tensor], list[int]]
    num_beams: int

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        mask = torch.full_like(scores, NEVER)
        for row, ids in enumerate(input_ids):
            mask[row, tokens_of(self.prefix_allowed_tokens_fn, row // self.num_beams, ids, scores.shape[1])] = 0
        allowed = scores + mask
        # Where all that is allowed had been removed before, what is allowed wins.
        stuck = allowed.amax(-1).isneginf().view(-1, self.num_beams).all(1)
        return torch.where(stuck.repeat_interleave(self.num_beams)[:, None], mask, allowed)


def _forced(scores: Tensor, ids: int | Iterable[int] | Tensor) -> Tensor:
    """Scores [B, V] that allow nothing but `ids`."""
    forced = torch.full_like(scores, NEVER)
    forced[:, ids_of(ids)] = 0
    return forced


@dataclass
class ForcedBOSTokenLogitsProcessor(LogitsProcessor):
    """Allows nothing but a token behind the first one."""

    bos_token_id: int

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return _forced(scores, self.bos_token_id) if input_ids.shape[1] == 1 else scores


@dataclass
class ForcedEOSTokenLogitsProcessor(LogitsProcessor):
    """Allows nothing but the end tokens where a text has one token less than `max_length`. device: has no say."""

    max_length: int
    eos_token_id: int | list[int] | Tensor
    device: Any = "cpu"

    def __post_init__(self) -> None:
        require(self, "max_length", is_int(self.max_length) and self.max_length >= 0, "an integer from 0")

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return _forced(scores, self.eos_token_id) if input_ids.shape[1] == self.max_length - 1 else scores


class InfNanRemoveLogitsProcessor(LogitsProcessor):
    """NaN becomes 0, infinities the largest numbers."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.nan_to_num(0.0)


@dataclass
class ExponentialDecayLengthPenalty(LogitsProcessor):
    """Raises the end tokens' scores by |score| * (factor ** (tokens past start) - 1).

    exponential_decay_length_penalty: (start, in tokens behind a prompt of input_ids_seq_length; factor).
    """

    exponential_decay_length_penalty: tuple[int, float]
    eos_token_id: int | list[int] | Tensor
    input_ids_seq_length: int

    def __post_init__(self) -> None:
        check_option("exponential_decay_length_penalty", self.exponential_decay_length_penalty)
        prompt = self.input_ids_seq_length
        require(self, "input_ids_seq_length", is_int(prompt) and prompt >= 0, "an integer from 0")

    @property
    def regulation_start(self) -> int:
        """Columns of a text before its end token's score grows."""
        return self.exponential_decay_length_penalty[0] + self.input_ids_seq_length

    @property
    def regulation_factor(self) -> float:
        """What each further token multiplies by."""
        return self.exponential_decay_length_penalty[1]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        factor = self.regulation_factor
        beyond, eos = input_ids.shape[1] - self.regulation_start, ids_of(self.eos_token_id)
        if beyond <= 0:
            return scores
        raised = scores.clone()
        ends = scores[:, eos]
        raised[:, eos] = torch.where(ends.isfinite(), ends + ends.abs() * (factor**beyond - 1), ends)
        return raised


@dataclass
class SuppressTokensLogitsProcessor(LogitsProcessor):
    """Removes tokens. device: has no say."""

    suppress_tokens: list[int] | Tensor
    device: Any = "cpu"

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.masked_fill(_at(scores.shape[1], ids_of(self.suppress_tokens), scores), NEVER)


@dataclass
class SuppressTokensAtBeginLogitsProcessor(LogitsProcessor):
    """Removes tokens where the text has exactly `begin_index` tokens. device: has no say."""

    begin_suppress_tokens: list[int] | Tensor
    begin_index: int
    device: Any = "cpu"

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] != self.begin_index:
            return scores
        return scores.masked_fill(_at(scores.shape[1], ids_of(self.begin_suppress_tokens), scores), NEVER)


@dataclass
class Context:
    """What processors are built from beside the options.

    prompt: columns of the prompts, padding included. total: columns at most. vocabulary: V.
    starts: int64 [B], columns of left padding, or None. embedded: columns of embeddings that stand in the place of ids.
    """

    prompt: int
    total: int
    vocabulary: int
    starts: Tensor | None = None
    embedded: int = 0
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
        out.append(SequenceBiasLogitsProcessor([[_within(ids, about, "sequence_bias"), value] for ids, value in pairs]))
    if o.repetition_penalty != 1:
        out.append(RepetitionPenaltyLogitsProcessor(o.repetition_penalty, about.starts))
    if o.no_repeat_ngram_size > 0:
        out.append(NoRepeatNGramLogitsProcessor(o.no_repeat_ngram_size))
    if o.bad_words_ids is not None:
        out.append(NoBadWordsLogitsProcessor([_within(ids, about, "bad_words_ids") for ids in o.bad_words_ids], eos))
    shortest = max(o.min_length - about.embedded, 0) if o.min_new_tokens is None else about.prompt + o.min_new_tokens
    if shortest > 0 and eos:
        out.append(MinLengthLogitsProcessor(shortest, eos))
    if about.prefix_allowed_tokens_fn is not None:
        out.append(PrefixConstrainedLogitsProcessor(about.prefix_allowed_tokens_fn, o.num_beams))
    if o.forced_bos_token_id is not None:
        out.append(ForcedBOSTokenLogitsProcessor(*_within([o.forced_bos_token_id], about, "forced_bos_token_id")))
    if o.forced_eos_token_id is not None:
        ids = o.forced_eos_token_id if isinstance(o.forced_eos_token_id, list) else [o.forced_eos_token_id]
        out.append(ForcedEOSTokenLogitsProcessor(about.total, _within(ids, about, "forced_eos_token_id")))
    if o.remove_invalid_values:
        out.append(InfNanRemoveLogitsProcessor())
    if o.exponential_decay_length_penalty is not None and eos:
        out.append(ExponentialDecayLengthPenalty(o.exponential_decay_length_penalty, eos, about.prompt))
    if o.suppress_tokens is not None:
        out.append(SuppressTokensLogitsProcessor(o.suppress_tokens))
    if o.begin_suppress_tokens is not None:
        begin = about.prompt + (about.prompt <= 1 and o.forced_bos_token_id is not None)
        out.append(SuppressTokensAtBeginLogitsProcessor(o.begin_suppress_tokens, begin))
    out.extend(about.own)
    return out


def _within(ids: Iterable[int], about: Context, name: str) -> list[int]:
    tokens = list(ids)
    if beyond := [i for i in tokens if i >= about.vocabulary]:
        raise InputError(f"{name} names token {short(beyond[0])}; the vocabulary has {about.vocabulary}")
    return tokens
