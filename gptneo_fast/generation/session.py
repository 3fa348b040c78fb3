"""Session: the model's side of a generation. It holds cache, mask and positions, and feeds the columns that are new."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ..network.cache import KVCache
from ..network.decoding import Several
from ..network.masks import Rows, rows_of
from .prompt import Prompt
from .request import LanguageModel, Request

_BY_COLUMN = ("attention_mask", "position_ids", "token_type_ids")


class Session:
    """Logits for texts that grow. Column c of `ids` is column c + offset of the cache.

    Args:
        model: a GPTNeoForCausalLM.
        prompt: what begins.
        total: columns at most.
        use_cache: False computes every column again at each call.
        chunk: tokens of the prompt that run at one time; None for all.
        trace: "attentions", "hidden_states": what to keep of each call.
        prepares: whether steps go through `prepare_inputs_for_generation` where that is somebody's own.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompt: Prompt,
        total: int,
        *,
        use_cache: bool = True,
        chunk: int | None = None,
        trace: Sequence[str] = (),
        prepares: bool = True,
    ) -> None:
        self.model, self.prompt, self.chunk, self.trace = model, prompt, chunk, trace
        self.cache = prompt.cache
        self.use_cache = use_cache or self.cache is not None
        self.prepares = not model.looked(anew=True).prepare and prepares
        self.begun = False  # whether some call has filled the cache
        self.watched = False  # whether somebody's code runs between steps, and may change a layer
        B, P = prompt.ids.shape
        self.offset = prompt.columns - P
        self.seen = -self.offset  # columns of ids that the cache holds; below 0 where some of embeddings are to come
        if self.cache is not None:
            self.seen += self.cache.get_seq_length()
        elif use_cache and not self.prepares and hasattr(model.transformer, "new_cache"):  # else it comes with the first call
            self.cache = model.transformer.new_cache(B, total + self.offset - 1)
        self.hides = prompt.mask is not None  # whether some column must be hidden at every call
        # Output, keywords and columns of the last call that was prepared for
        self.last: tuple[Any, dict[str, Any], int] | None = None
        self.attentions: tuple[Tensor, ...] | None = None
        self.hidden_states: tuple[Tensor, ...] | None = None

    @classmethod
    def of(cls, model: LanguageModel, request: Request) -> Session:
        """The session of a request, whose cache its record shows."""
        o, record = request.options, request.record
        trace = [name for name in ("attentions", "hidden_states") if getattr(record, name) is not None]
        made = cls(model, request.prompt, request.total, use_cache=o.use_cache, chunk=o.prefill_chunk_size, trace=trace)
        record.cache = made.cache
        made.watched = request.streamed or bool(request.own) or request.criteria_of_others
        return made

    def feed(self, ids: Tensor, keep: int = 1) -> Tensor:
        """Logits [B, keep, V] of the last columns of ids [B, T], which begin with the ids of the calls before."""
        T = ids.shape[1]
        if self.watched and self.begun:
            self.model.looked(anew=True)
        if self.begun and self.hides and self.cache is not None and not self.trace and not self.prepares:
            self.hides = not self._is_ragged_only()
        if self.prepares:
            logits = self._prepared(ids, keep)
        elif self._is_plain() and self.model.looked().forward:
            logits = self._step(ids[:, self.seen :], keep)  # nothing to check: these are tokens of our own, or a checked prompt
        else:
            logits = self._call(ids, keep)
        self.seen, self.begun = (T, True) if self.cache is not None else (-self.offset, False)
        return logits

    def several(self, ids: Tensor, how: Several) -> Tensor | None:
        """Tokens [B, n] that follow ids [B, T], of several steps at once; none where the next is for torch to draw, None where
        they must be fed one by one."""
        T = ids.shape[1]
        if not (self.begun and self.seen == T - 1) or self.cache is None or self.hides or self.prepares or self.trace:
            return None
        if type(self.cache) is not KVCache or self.prompt.token_type_ids is not None:
            return None
        found = self.model.several(ids[:, -1:], self._positions(T, 1), self.cache, how)
        if found is not None:
            self.seen += found.shape[1]
        return found

    def _is_plain(self) -> bool:
        """Whether new columns are tokens, and nothing but logits is asked for: every draw sees these as `step` gives them, in
        float32, those of the prompt, too."""
        if self.cache is None or self.trace:
            return False
        if self.begun:
            return not self.hides
        fresh = self.prompt.cache is None and self.prompt.embeds is None and self.chunk is None
        return fresh and type(self.cache) is KVCache

    def _step(self, ids: Tensor, keep: int) -> Tensor:
        T, (B, new) = self.seen + ids.shape[1], ids.shape
        rows = Rows() if self.begun else rows_of(self._mask(T), B, T, self.cache)
        return self.model.step(ids, self._positions(T, new), self._types(T, new), self.cache, keep, rows)

    def _prepared(self, ids: Tensor, keep: int) -> Tensor:
        """Through the model's own `prepare_inputs_for_generation`."""
        T = ids.shape[1]
        new = T - self.seen
        embeds = None if self.begun or self.prompt.embeds is None else self.prompt.embeds[:, -new:]
        mask, names = self._mask(T), inspect.signature(self.model.forward).parameters
        given: dict[str, Any] = {
            "attention_mask": self._ones(T) if mask is None else mask,
            "position_ids": self._positions(T, new) if "position_ids" in names else None,
            "token_type_ids": self._types(T, new),
            "use_cache": self.use_cache,
        }
        if self.last is not None:
            before, kept, columns = self.last
            given |= self.model._update_model_kwargs_for_generation(
                before, kept, is_encoder_decoder=False, num_new_tokens=T - columns
            )
        given["past_key_values"] = self.cache
        inputs = self.model.prepare_inputs_for_generation(
            ids, next_sequence_length=new, inputs_embeds=embeds, is_first_iteration=not self.begun, **given
        )
        asked = {f"output_{name}": True for name in self.trace}
        out = self.model(**(asked | inputs | {"return_dict": True}))
        self.last = out, given, T
        self.cache = out.past_key_values if self.use_cache else None
        self.attentions, self.hidden_states = out.attentions, out.hidden_states
        return cast(Tensor, out.logits[:, -keep:])

    def _call(self, ids: Tensor, keep: int) -> Tensor:
        T, first = ids.shape[1], self.seen
        ends = [T] if self.chunk is None else [*range(first + self.chunk, T, self.chunk), T]
        for end in ends:
            new = end - first
            embeds = None if self.begun else self._embeds(end, new)
            asked = {
                "inputs_embeds": embeds,
                "past_key_values": self.cache,
                "attention_mask": self._mask(end),
                "position_ids": self._positions(end, new),
                "token_type_ids": self._types(end, new),
                "logits_to_keep": keep,
                "use_cache": self.use_cache,
                "output_attentions": "attentions" in self.trace,
                "output_hidden_states": "hidden_states" in self.trace,
                "return_dict": True,
            }
            out = self.model(None if embeds is not None else ids[:, first:end], **self._named(asked, end))
            first = end
            if self.use_cache and self.cache is None:
                self.cache = out.past_key_values
        self.attentions, self.hidden_states = out.attentions, out.hidden_states
        return out.logits[:, -keep:]

    def _named(self, asked: dict[str, Any], T: int) -> dict[str, Any]:
        """Keywords for `forward`: where it is somebody's own, those that transformers would give it."""
        if self.model.looked().forward:
            return asked
        names = inspect.signature(self.model.forward).parameters
        if asked["attention_mask"] is None and "attention_mask" in names:
            asked["attention_mask"] = self._ones(T)
        unless_named = ("logits_to_keep", "position_ids")
        return {k: v for k, v in asked.items() if k in names or (v is not None and v is not False and k not in unless_named)}

    def _ones(self, T: int) -> Tensor:
        """A mask of T columns of ids, and of the offset's, that hides nothing."""
        return torch.ones(len(self.prompt.ids), T + self.offset, dtype=torch.long, device=self.prompt.ids.device)

    def crop(self, columns: int) -> None:
        """Forget the columns of ids from this one on."""
        cache: Any = self.cache
        if cache is not None:
            if isinstance(cache, KVCache):
                cache.crop(columns + self.offset)
            elif columns < self.seen:  # transformers', which takes what is to go only
                cache.crop(columns - self.seen)
            self.seen = min(self.seen, columns)
            if self.last is not None and (gone := self.last[2] - columns) > 0:
                before, kept, _ = self.last
                cut = {k: v[:, : v.shape[1] - gone] for k, v in kept.items() if k in _BY_COLUMN and isinstance(v, Tensor)}
                self.last = before, kept | cut, columns

    def reorder(self, rows: Tensor) -> None:
        """Keep these rows of the cache in this order. rows: int64 [B]."""
        if self.cache is not None:
            self.cache.reorder_cache(rows)

    def _is_ragged_only(self) -> bool:
        """Whether all padding was on the left of the first call, and so was never stored."""
        assert self.cache is not None and self.prompt.mask is not None
        tokens = (self.prompt.mask != 0).sum(1) + self.offset + self.seen - self.prompt.mask.shape[1]
        return torch.equal(self.cache.lengths.long(), tokens)

    def _mask(self, T: int) -> Tensor | None:
        """The mask of T columns of ids, and of the offset's."""
        mask, wide = self.prompt.mask, T + self.offset
        if mask is None:
            return None
        if wide <= mask.shape[1]:
            return mask[:, :wide]
        return torch.cat([mask, mask.new_ones(len(mask), wide - mask.shape[1])], 1)

    def _positions(self, T: int, new: int) -> Tensor:
        """Positions [B or 1, new] of the last `new` of T columns of ids: tokens are counted, padding gets 0."""
        given, mask, device = self.prompt.position_ids, self.prompt.mask, self.prompt.ids.device
        columns = torch.arange(T + self.offset - new, T + self.offset, device=device)[None]
        if given is None:
            if mask is None:  # a row for each text where a module may be watched: that is what transformers gives
                return columns if self.model.looked() else columns.expand(len(self.prompt.ids), -1)
            given = ((mask != 0).long().cumsum(1) - 1).clamp(min=0)
        P = given.shape[1]
        return given.gather(1, columns.clamp(max=P - 1).expand(len(given), -1)) + (columns - P + 1).clamp(min=0)

    def _types(self, T: int, new: int) -> Tensor | None:
        """Token types [B, new] of the last `new` of T columns of ids; generated ones continue the prompt's last."""
        types = self.prompt.token_type_ids
        if types is None:
            return None
        columns = torch.arange(T - new, T, device=types.device) + self.offset - (self.prompt.columns - types.shape[1])
        return types[:, columns.clamp(max=types.shape[1] - 1)]

    def _embeds(self, T: int, new: int) -> Tensor | None:
        """Embeddings [B, new, C] of the last `new` of T columns of ids, all of the prompt; None where it has none."""
        if self.prompt.embeds is None:
            return None
        end = T + self.offset - self.prompt.columns + self.prompt.embeds.shape[1]
        return self.prompt.embeds[:, end - new : end]
