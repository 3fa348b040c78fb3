"""One call of `generate`: what it begins with (Prompt), how it goes on (Request), what is kept of it (Record)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ..config import GPTNeoConfig
from ..errors import InputError
from ..network.cache import KVCache
from .config import GenerationConfig, Options
from .processors import LogitsProcessorList
from .stopping import EndToken, StoppingCriteriaList

if TYPE_CHECKING:
    from ..network.touch import Look
    from ..ops.backends import Choice
    from .session import Session


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
    def looked(self, anew: bool = False) -> Look: ...
    def prepare_inputs_for_generation(self, input_ids: Tensor, **how: Any) -> dict[str, Any]: ...
    def step(
        self, ids: Tensor, position_ids: Tensor, token_type_ids: Tensor | None, cache: Any, keep: int = 1, **how: Any
    ) -> Tensor: ...
    def __call__(self, *args: Any, **keywords: Any) -> Any: ...


@dataclass
class Prompt:
    """What a generation begins with; every tensor has B rows.

    ids: int64 [B, P]. mask: int64 [B, P] or wider by the columns of `cache`, zero for padding; None for none.
    """

    ids: Tensor
    mask: Tensor | None = None
    position_ids: Tensor | None = None
    token_type_ids: Tensor | None = None
    embeds: Tensor | None = None  # [B, P', C] in place of ids, which then may be [B, 0]
    cache: KVCache | None = None
    places: list[int] | None = None  # of the rows in the caller's list; None for 0 ... B - 1

    def expand(self, times: int) -> Prompt:
        """Every row `times` times."""
        if times == 1:
            return self
        rows = torch.arange(len(self.ids), device=self.ids.device).repeat_interleave(times)

        def wide(tensor: Tensor | None) -> Tensor | None:  # one row stands for all
            return tensor if tensor is None else tensor.expand(len(self.ids), *tensor.shape[1:])[rows]

        if self.cache is not None:
            self.cache.reorder_cache(rows)
        return Prompt(
            self.ids[rows], wide(self.mask), wide(self.position_ids), wide(self.token_type_ids), wide(self.embeds), self.cache
        )

    def leftwards(self) -> Prompt:
        """The same texts with the padding that stands behind them put before them, where a continuation can follow.

        Raises:
            InputError: some columns are in a cache, which cannot be moved.
        """
        if self.mask is None or bool((self.mask[:, -1] != 0).all()):
            return self
        if self.cache is not None:
            raise InputError("a text padded on the right cannot continue past_key_values; pad it on the left")
        T = self.mask.shape[1]
        columns = torch.arange(T, device=self.mask.device)
        behind = T - 1 - ((self.mask != 0) * columns).argmax(1)  # [B] columns of padding behind the last token
        source = (columns - behind[:, None]) % T  # [B, T]

        def moved(tensor: Tensor | None) -> Tensor | None:
            if tensor is None or tensor.shape[1] != T:
                return tensor
            tensor = tensor.expand(len(source), *tensor.shape[1:])
            return tensor.take_along_dim(source if tensor.dim() == 2 else source[..., None], 1)

        ids, mask, embeds = moved(self.ids), moved(self.mask), moved(self.embeds)
        assert ids is not None
        return replace(
            self,
            ids=ids,
            mask=mask,
            position_ids=moved(self.position_ids),
            token_type_ids=moved(self.token_type_ids),
            embeds=embeds,
        )

    @property
    def starts(self) -> Tensor | None:
        """int64 [B], columns before the first token of each row."""
        return None if self.mask is None else (self.mask != 0).int().argmax(1)


def padding_of(ids: Tensor, mask: Tensor | None, options: Options) -> Tensor | None:
    """The mask [B, T] of the prompts' padding, or None where there is none.

    Raises:
        InputError: another shape, or a row of nothing but padding.
    """
    if mask is None:
        pad = options.pad_token_id
        if pad is None or pad in options.eos_ids or not bool((ids == pad).any()):
            return None
        mask = ids != pad
    if mask.dim() == 1:
        mask = mask[None]
    if mask.dim() != 2 or len(mask) != len(ids) or mask.shape[1] < ids.shape[1]:
        raise InputError(f"attention_mask has shape {list(mask.shape)}, input_ids {list(ids.shape)}; they must agree")
    held = (mask != 0).to(ids.device)
    if bool(held.all()) and held.shape[1] == ids.shape[1]:
        return None
    if empty := (~held.any(1)).nonzero().flatten().tolist():
        raise InputError(f"row {empty[0]} of attention_mask is all padding; a prompt needs at least one token")
    return held.long()


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

    def steps(self) -> dict[str, tuple[Any, ...] | None]:
        """The fields of an output that have an entry for each step."""
        names = ("scores", "logits", "attentions", "hidden_states")
        return {name: None if (value := getattr(self, name)) is None else tuple(value) for name in names}


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


def broken_message(rows: list[int], columns: list[int]) -> str:
    """What to say of rows whose logits were not finite after so many columns."""
    return (
        f"logits of row {', '.join(map(str, rows))} were NaN or infinite after {', '.join(map(str, columns))} "
        "tokens; try dtype=torch.float32, or remove_invalid_values=True to go on regardless"
    )


def joined(ids: Tensor, new: Sequence[Tensor]) -> Tensor:
    """Prompts [B, P] and the pieces [B, n] that follow them, which may be on the host: sent to the device together."""
    tail = [torch.cat(list(new), 1).to(ids.device)] if new else []
    return torch.cat([ids, *tail], 1)
