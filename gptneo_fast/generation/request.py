"""One call of `generate`: how it goes on (Request), what is kept of it (Record)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ..config import GPTNeoConfig
from ..errors import InputError, NonFiniteLogitsError
from ..network.cache import KVCache
from ..ops.drawing import Draws, choose, draws_alike, multinomial
from .callbacks import named
from .config import GenerationConfig, Options
from .processors import LogitsProcessorList, MinLengthLogitsProcessor, ids_of
from .prompt import Prompt
from .stopping import EosTokenCriteria, MaxLengthCriteria, StoppingCriteriaList
from .warpers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

if TYPE_CHECKING:
    from ..network.decoding import Several
    from ..network.touch import Look
    from ..ops.backends import Choice
    from .session import Session


_DRAWN: dict[type, str] = {  # in the order in which options make them
    TemperatureLogitsWarper: "temperature",
    TopKLogitsWarper: "top_k",
    TopPLogitsWarper: "top_p",
}
_CALLS = {kind: kind.__call__ for kind in (MinLengthLogitsProcessor, *_DRAWN)}


@dataclass(frozen=True)
class Generation:
    """How a model generated last.

    path: "captured" (steps are graphs on the device, the host looks now and then), "launched" (the same steps, which could
        not be captured: their kernels are launched one by one), or "stepwise" (the host draws every token).
    why: what asked for the path, or stood in the way of a capture.
    """

    path: str
    why: str


class LanguageModel(Protocol):
    """What generation asks of a GPTNeoForCausalLM."""

    config: GPTNeoConfig
    generation_config: GenerationConfig
    tokenizer: Any
    transformer: Any
    idle_runners: Any  # captured.Pool
    last_generation: Generation | None

    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def backend(self) -> Choice: ...
    def parameters(self) -> Any: ...
    def buffers(self) -> Any: ...
    def looked(self, anew: bool = False) -> Look: ...
    def forward(self, *args: Any, **keywords: Any) -> Any: ...
    def prepare_inputs_for_generation(self, input_ids: Tensor, **how: Any) -> dict[str, Any]: ...
    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], is_encoder_decoder: bool = False, num_new_tokens: int = 1
    ) -> dict[str, Any]: ...
    def step(
        self, ids: Tensor, position_ids: Tensor, token_type_ids: Tensor | None, cache: Any, keep: int = 1, rows: Any = ...
    ) -> Tensor: ...
    def several(self, ids: Tensor, position_ids: Tensor, cache: KVCache, how: Several) -> Tensor | None: ...
    def __call__(self, *args: Any, **keywords: Any) -> Any: ...


@dataclass
class Record:
    """What a call wants to see of each step, None for what it does not; and what its strategy leaves."""

    scores: list[Tensor] | None = None  # float32 [B, V], processed
    logits: list[Tensor] | None = None  # float32 [B, V], raw
    attentions: list[Any] | None = None
    hidden_states: list[Any] | None = None
    cache: KVCache | None = None
    sequences_scores: Tensor | None = None  # of beams, as in GenerateBeamDecoderOnlyOutput
    beam_indices: Tensor | None = None

    def step(self, session: Session, logits: Tensor, scores: Tensor, drafted: int = 0, taken: int = 0) -> None:
        """Keep what is wanted of one step.

        Args:
            drafted: tokens at the end of the session's last call that were guessed; taken: how many of them precede the step.
        """
        pairs: tuple[tuple[list[Any] | None, Any], ...] = (
            (self.scores, scores),
            (self.logits, logits),
            (self.attentions, _rows_of(session.attentions, drafted, taken, drafted - taken)),
            (self.hidden_states, _rows_of(session.hidden_states, drafted, taken)),
        )
        for kept, value in pairs:
            if kept is not None:
                kept.append(value)

    def steps(self) -> dict[str, tuple[Any, ...] | None]:
        """The fields of an output that have an entry for each step."""
        names = ("scores", "logits", "attentions", "hidden_states")
        return {name: None if (value := getattr(self, name)) is None else tuple(value) for name in names}


def _rows_of(layers: tuple[Tensor, ...] | None, drafted: int, taken: int, unseen: int = 0) -> tuple[Tensor, ...] | None:
    """Of [..., T, S] a layer the rows of one step, without the last `unseen` columns; as of a call without drafts."""
    if layers is None or not drafted:
        return layers
    end = layers[0].shape[-2] - drafted + taken
    return tuple(t[..., end - 1 if taken else 0 : end, : t.shape[-1] - unseen] for t in layers)


@dataclass
class Request:
    """One call of `generate`, settled.

    prompt: of as many rows as there are texts to find (of beams, as there are beams).
    total: columns of prompt and continuation at most.
    own: the user's among the processors.
    assistant: a smaller model that drafts tokens.
    streamed: whether somebody reads along.
    """

    prompt: Prompt
    options: Options
    total: int
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    own: Sequence[Callable[..., Any]] = ()
    generator: torch.Generator | None = None
    record: Record = field(default_factory=Record)
    assistant: LanguageModel | None = None
    streamed: bool = False

    @property
    def drafts(self) -> bool:
        """Whether tokens are guessed and then checked."""
        return self.assistant is not None or self.options.prompt_lookup_num_tokens is not None

    @property
    def may_end_early(self) -> bool:
        """Whether a row can end by a token, so that finished rows need filling."""
        return any(isinstance(c, EosTokenCriteria) for c in self.criteria)

    @cached_property
    def ends(self) -> frozenset[int] | None:
        """Tokens that end a text, where nothing else does before `total`; None where something may."""
        ends: set[int] = set()
        for criterion in self.criteria:
            if type(criterion) is EosTokenCriteria:
                ends.update(criterion.eos_token_id.tolist())
            elif type(criterion) is not MaxLengthCriteria or criterion.max_length < self.total:
                return None
        return frozenset(ends)

    def ended(self, ids: Tensor) -> Tensor | None:
        """Boolean [B]: which of the texts ids [B, T] have ended; None where none has."""
        if self.ends is None:
            return self.criteria(ids, self.record.scores)
        last = ids[:, -1].tolist()
        if self.ends.isdisjoint(last):
            return None
        return torch.tensor([token in self.ends for token in last], device=ids.device)

    @property
    def criteria_of_others(self) -> bool:
        """Whether somebody's own criteria look at each step."""
        return any(type(c).__module__ != StoppingCriteriaList.__module__ for c in self.criteria)

    @cached_property
    def alone(self) -> bool:
        """Whether nothing looks at a step or has a say in it but the end tokens, and where tokens are drawn `draws`."""
        o, r = self.options, self.record
        watched = any(kept is not None for kept in (r.scores, r.logits, r.attentions, r.hidden_states))
        if o.remove_invalid_values or self.streamed or watched or self.ends is None:
            return False
        if o.do_sample:
            return self.draws is not None
        return len(self.processors) <= 1 and all(map(self._ends_late, self.processors))

    @cached_property
    def draws(self) -> Draws | None:
        """How tokens are drawn, where temperature, top_k and top_p, and a least length, are all that has a say."""
        rest = list(self.processors)
        if rest and self._ends_late(rest[0]):
            rest.pop(0)
        found: dict[str, Any] = {}
        for kind, name in _DRAWN.items():
            if rest and _is_plain(rest[0], kind) and rest[0] == kind(value := getattr(rest[0], name)):
                found[name] = value
                rest.pop(0)
        usual = self.options.do_sample and self.options.num_beams == 1 and self.prompt.ids.device.type == "cpu"
        return Draws(**found, generator=self.generator) if usual and not rest and draws_alike() else None

    @cached_property
    def least(self) -> int:
        """Columns before which no end token comes, where a processor says so."""
        return max((p.min_length for p in self.processors if type(p) is MinLengthLogitsProcessor), default=0)

    def _ends_late(self, processor: Any) -> bool:
        return _is_plain(processor, MinLengthLogitsProcessor) and set(ids_of(processor.eos_token_id)) == self.ends

    def choose(self, logits: Tensor, columns: int) -> Tensor | None:
        """Tokens [B] drawn at once from finite logits [B, V] after so many columns; None where processors must see them, or
        somebody asks for scores."""
        if self.record.scores is not None or columns < self.least or self.draws is None:
            return None
        return choose(logits, self.draws)

    def draw(self, scores: Tensor, running: Tensor) -> Tensor:
        """Tokens [B] int64 from processed scores [B, V]: one multinomial over the softmax, or the likeliest.

        Args:
            running: boolean [B]; of the other rows nothing is expected.

        Raises:
            InputError: processors left a running row without tokens.
        """
        if self.processors and not bool((usable := self.usable(scores)).all()):
            self.require(usable | ~running)
            scores = torch.where(usable[:, None], scores, 0.0)
        if not self.options.do_sample:
            return scores.argmax(-1)
        return multinomial(scores.softmax(-1), self.generator)

    def usable(self, scores: Tensor) -> Tensor:
        """Boolean [...]: where a token can be chosen of processed scores [..., V]."""
        best = scores.amax(-1)  # NaN where one is
        return best.isfinite() if self.options.do_sample else best > float("-inf")

    def require(self, usable: Tensor) -> None:
        """Raise for rows [B] of which no token can be chosen.

        Raises:
            InputError: names the rows, and what may have left them so.
        """
        if rows := (~usable).nonzero().flatten().tolist():
            rows = rows if self.prompt.places is None else sorted(self.prompt.places[row] for row in rows)
            names = ", ".join(dict.fromkeys(map(named, self.processors)))
            raise InputError(
                f"no token can be chosen for row {', '.join(map(str, rows))}: {names} left scores that are all -inf, or not "
                "numbers; remove fewer tokens, or end such texts with a stopping criterion"
            )


def _is_plain(processor: Any, kind: type) -> bool:
    """Whether a processor is one of ours and does what it was made to do: somebody may have put another call in its place."""
    return type(processor) is kind and kind.__call__ is _CALLS[kind]


def non_finite(broken: dict[int, int], sequences: Tensor | None, texts: list[str] | None = None) -> NonFiniteLogitsError:
    """The error for rows (of prompts, where there are texts) whose logits were not finite: row -> columns that it had."""
    rows = sorted(broken)
    columns = [broken[row] for row in rows]
    message = (
        f"logits of {'row' if texts is None else 'prompt'} {', '.join(map(str, rows))} were NaN or infinite after "
        f"{', '.join(map(str, columns))} tokens; try dtype=torch.float32, or remove_invalid_values=True to go on regardless"
    )
    return NonFiniteLogitsError(message, rows, sequences, columns, texts)


def joined(ids: Tensor, new: Sequence[Tensor]) -> Tensor:
    """Prompts [B, P] and the pieces [B, n] that follow them, which may be on the host: sent to the device together."""
    tail = [torch.cat(list(new), 1).to(ids.device)] if new else []
    return torch.cat([ids, *tail], 1)
