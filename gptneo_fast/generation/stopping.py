"""What ends a text beside its length: the end token, stop strings, time, and a user's criteria."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, short, warn_once
from .callbacks import ended_of
from .config import Options
from .options import check_option


class StoppingCriteria(ABC):
    """Base of criteria, ours and a user's."""

    @abstractmethod
    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor | bool:
        """Which of the texts input_ids [B, T] have ended: boolean [B], or one for all."""


class StoppingCriteriaList(list[Callable[..., Any]]):
    """Criteria of which any may end a text."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Boolean [B]: the texts that have ended.

        Raises:
            InputError: one of them returned something else.
        """
        ended = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        for criterion in self:
            ended = ended | ended_of(criterion, input_ids, scores, **kwargs)
        return ended

    @property
    def max_length(self) -> int | None:
        """Columns at which the first of the MaxLengthCriteria ends a text; None where there is none."""
        return next((criterion.max_length for criterion in self if isinstance(criterion, MaxLengthCriteria)), None)


@dataclass
class MaxLengthCriteria(StoppingCriteria):
    """Ends texts of `max_length` columns. max_position_embeddings: has no say; `generate` refuses what exceeds them."""

    max_length: int
    max_position_embeddings: int | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return _all_rows(input_ids, input_ids.shape[1] >= self.max_length)


@dataclass
class MaxTimeCriteria(StoppingCriteria):
    """Ends texts `max_time` seconds after this was made, or after initial_timestamp, of `time.time()`."""

    max_time: float
    initial_timestamp: float | None = None

    def __post_init__(self) -> None:
        self.begin(0.0 if self.initial_timestamp is None else time.time() - self.initial_timestamp)

    def begin(self, passed: float = 0.0) -> None:
        """Count from now, or as if so many seconds had passed."""
        self._ends = time.monotonic() - passed + self.max_time

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return _all_rows(input_ids, time.monotonic() > self._ends)


def validate_stopping_criteria(stopping_criteria: StoppingCriteriaList, max_length: int) -> StoppingCriteriaList:
    """The same criteria, and one for `max_length` where none is; a warning where there is one for another length."""
    held = stopping_criteria.max_length
    if held is not None and held != max_length:
        warn_once(f"stopping_criteria end a text at {held} columns and max_length is {max_length}; the first of them holds")
    return StoppingCriteriaList([*stopping_criteria, *([MaxLengthCriteria(max_length)] if held is None else [])])


class EosTokenCriteria(StoppingCriteria):
    """Ends texts whose last token is one of these."""

    def __init__(self, eos_token_id: int | list[int] | Tensor) -> None:
        if not isinstance(eos_token_id, Tensor):
            check_option("eos_token_id", eos_token_id)
        self.eos_token_id = torch.as_tensor(eos_token_id).flatten()

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.isin(input_ids[:, -1], self.eos_token_id.to(input_ids.device))


class StopStringCriteria(StoppingCriteria):
    """Ends texts in whose last token one of the strings comes to an end, prompt included.

    Raises:
        InputError: no tokenizer, or no strings.
    """

    def __init__(self, tokenizer: Any, stop_strings: str | list[str] | tuple[str, ...]) -> None:
        check_option("stop_strings", stop_strings)
        self.stop_strings = (stop_strings,) if isinstance(stop_strings, str) else tuple(stop_strings)
        self.stops = [s.encode() for s in self.stop_strings]
        self.token_bytes = _token_bytes(tokenizer)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        longest = max(map(len, self.stops))
        rows = input_ids[:, -longest:].tolist()  # a token has at least one byte
        return torch.tensor([self._ended(row) for row in rows], device=input_ids.device)

    def _ended(self, ids: list[int]) -> bool:
        last = self.token_bytes(ids[-1])
        tail = b"".join(map(self.token_bytes, ids[:-1])) + last
        return any(tail.find(stop, max(0, len(tail) - len(last) - len(stop) + 1)) >= 0 for stop in self.stops)


@dataclass
class ConfidenceCriteria(StoppingCriteria):
    """Ends a draft whose last token has a probability below `assistant_confidence_threshold`."""

    assistant_confidence_threshold: float

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> bool:
        return bool(scores[-1].softmax(-1)[0, input_ids[0, -1]] < self.assistant_confidence_threshold)


def _all_rows(ids: Tensor, ended: bool) -> Tensor:
    """Boolean [B], the same for every text of ids [B, T]."""
    return torch.full(ids.shape[:1], ended, device=ids.device)


def criteria_of(
    options: Options, total: int, tokenizer: Any, own: Sequence[Callable[..., Any]] | None, device: torch.device
) -> StoppingCriteriaList:
    """The criteria that resolved options ask for, and the user's.

    Raises:
        InputError: stop strings without a tokenizer.
    """
    out = StoppingCriteriaList([MaxLengthCriteria(total)])
    if options.max_time is not None:
        out.append(MaxTimeCriteria(options.max_time))
    if options.stops:
        out.append(StopStringCriteria(tokenizer, options.stops))
    if options.eos_ids:
        out.append(EosTokenCriteria(torch.tensor(options.eos_ids, device=device)))
    out.extend(own or [])
    return out


def _token_bytes(tokenizer: Any) -> Callable[[int], bytes]:
    from ..tokenizer.stream import bytes_of

    if not hasattr(tokenizer, "convert_ids_to_tokens"):
        given = "" if tokenizer is None else f", and {short(tokenizer)} is none"
        raise InputError(f"stop_strings needs a tokenizer{given}: set model.tokenizer, or pass tokenizer=...")
    return lambda token: bytes_of(tokenizer.convert_ids_to_tokens(token) or "")
