"""Greedy decoding and sampling: one prefill, then a token of each row a step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, NonFiniteLogitsError
from .processors import LogitsProcessorList
from .session import Session
from .stopping import EndToken, StoppingCriteriaList


@dataclass
class Record:
    """What a call wants to see of each step; None for what it does not."""

    scores: list[Tensor] | None = None  # float32 [B, V], processed
    logits: list[Tensor] | None = None  # float32 [B, V], raw
    attentions: list[Any] | None = None
    hidden_states: list[Any] | None = None

    def step(self, session: Session, logits: Tensor, scores: Tensor) -> None:
        """Keep what is wanted of one step."""
        pairs: tuple[tuple[list[Any] | None, Any], ...] = (
            (self.scores, scores),
            (self.logits, logits),
            (self.attentions, session.attentions),
            (self.hidden_states, session.hidden_states),
        )
        for kept, value in pairs:
            if kept is not None:
                kept.append(value)


@dataclass
class Request:
    """One call of `generate`, resolved.

    total: columns of prompt and continuation at most. options: a resolved GenerationConfig.
    """

    options: Any
    total: int
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    generator: torch.Generator | None = None
    record: Record = field(default_factory=Record)

    @property
    def may_end_early(self) -> bool:
        """Whether a row can end by a token, so that finished rows need filling."""
        return any(isinstance(c, EndToken) for c in self.criteria)

    def draw(self, scores: Tensor) -> Tensor:
        """Tokens [B] int64 from processed scores [B, V]: one multinomial over the softmax, or the likeliest.

        Raises:
            InputError: processors left a row without tokens.
        """
        if not self.options.do_sample:
            return scores.argmax(-1)
        try:
            return torch.multinomial(scores.softmax(-1), 1, generator=self.generator).squeeze(1)
        except RuntimeError as error:
            raise InputError(
                f"no token can be drawn: processors left scores that are all -inf or not numbers in rows "
                f"{(~scores.softmax(-1).isfinite().all(-1)).nonzero().flatten().tolist()}"
            ) from error


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
    while ids.shape[1] < request.total:
        logits = session.feed(ids)[:, -1].float()
        if not options.remove_invalid_values and not bool((finite := logits.isfinite().all(-1)).all()):
            for row in (running & ~finite).nonzero().flatten().tolist():
                broken[row] = ids.shape[1]
            running = running & finite
            if not bool(running.any()):
                break
            logits = torch.where(finite[:, None], logits, 0.0)
        scores = request.processors(ids, logits)
        request.record.step(session, logits, scores)
        token = request.draw(scores)
        if request.may_end_early or broken:
            token = torch.where(running, token, pad if pad is not None else 0)
        ids = torch.cat([ids, token[:, None]], 1)
        yield token[:, None]
        running = running & ~request.criteria(ids, request.record.scores)
        if not bool(running.any()):
            break
    if broken:
        raise NonFiniteLogitsError(broken_message(list(broken), list(broken.values())), rows=sorted(broken), sequences=ids)


def broken_message(rows: list[int], columns: list[int]) -> str:
    """What to say of rows whose logits were not finite after so many columns."""
    return (
        f"logits of row {', '.join(map(str, rows))} were NaN or infinite after {', '.join(map(str, columns))} "
        "tokens; try dtype=torch.float32, or remove_invalid_values=True to go on regardless"
    )


def joined(ids: Tensor, new: list[Tensor]) -> Tensor:
    """Prompts [B, P] and the pieces [B, n] that follow them, which may be on the host: sent to the device together."""
    tail = [torch.cat(new, 1).to(ids.device)] if new else []
    return torch.cat([ids, *tail], 1)
