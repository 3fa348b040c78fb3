"""What ends a text beside its length: the end token, stop strings, time, and a user's criteria."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..config import short
from ..errors import InputError
from .callbacks import ended_of
from .config import Options


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


@dataclass
class MaxLength(StoppingCriteria):
    """Ends texts of `length` columns."""

    length: int

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> bool:
        return input_ids.shape[1] >= self.length


@dataclass
class MaxTime(StoppingCriteria):
    """Ends texts `seconds` after this was made."""

    seconds: float
    began: float = field(default_factory=time.monotonic)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> bool:
        return time.monotonic() - self.began > self.seconds


class EndToken(StoppingCriteria):
    """Ends texts whose last token is one of `ids`."""

    def __init__(self, ids: list[int], device: torch.device) -> None:
        self.ids = torch.tensor(ids, device=device)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.isin(input_ids[:, -1], self.ids)


class StopStrings(StoppingCriteria):
    """Ends texts in whose last token one of the strings comes to an end, prompt included.

    token_bytes: the bytes of a token id.
    """

    def __init__(self, strings: list[str], token_bytes: Callable[[int], bytes]) -> None:
        self.stops = [s.encode() for s in strings]
        self.token_bytes = token_bytes

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        longest = max(map(len, self.stops))
        rows = input_ids[:, -longest:].tolist()  # a token has at least one byte
        return torch.tensor([self._ended(row) for row in rows], device=input_ids.device)

    def _ended(self, ids: list[int]) -> bool:
        last = self.token_bytes(ids[-1])
        tail = b"".join(map(self.token_bytes, ids[:-1])) + last
        return any(tail.find(stop, max(0, len(tail) - len(last) - len(stop) + 1)) >= 0 for stop in self.stops)


@dataclass
class Unlikely(StoppingCriteria):
    """Ends a draft whose last token has a probability below `threshold`."""

    threshold: float

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> bool:
        return bool(scores[-1].softmax(-1)[0, input_ids[0, -1]] < self.threshold)


def criteria_of(
    options: Options, total: int, tokenizer: Any, own: Sequence[Callable[..., Any]] | None, device: torch.device
) -> StoppingCriteriaList:
    """The criteria that resolved options ask for, and the user's.

    Raises:
        InputError: stop strings without a tokenizer.
    """
    out = StoppingCriteriaList([MaxLength(total)])
    if options.max_time is not None:
        out.append(MaxTime(options.max_time))
    if options.stops:
        out.append(StopStrings(options.stops, _token_bytes(tokenizer)))
    if options.eos_ids:
        out.append(EndToken(options.eos_ids, device))
    out.extend(own or [])
    return out


def _token_bytes(tokenizer: Any) -> Callable[[int], bytes]:
    from ..tokenizer.stream import bytes_of

    if not hasattr(tokenizer, "convert_ids_to_tokens"):
        given = "" if tokenizer is None else f", and {short(tokenizer)} is none"
        raise InputError(f"stop_strings needs a tokenizer{given}: set model.tokenizer, or pass tokenizer=...")
    return lambda token: bytes_of(tokenizer.convert_ids_to_tokens(token) or "")
