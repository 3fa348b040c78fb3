"""Session: the model's side of a generation. It holds cache, mask and positions, and feeds the columns that are new."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import CacheError, InputError
from ..network.cache import KVCache


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


def padding_of(ids: Tensor, mask: Tensor | None, options: Any) -> Tensor | None:
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


class Session:
    """Logits for texts that grow. Column c of `ids` is column c + offset of the cache.

    Args:
        model: a GPTNeoForCausalLM.
        prompt: what begins.
        total: columns at most.
        use_cache: False computes every column again at each call.
        chunk: tokens of the prompt that run at one time; None for all.
        trace: "attentions", "hidden_states": what to keep of each call.
    """

    def __init__(
        self,
        model: Any,
        prompt: Prompt,
        total: int,
        *,
        use_cache: bool = True,
        chunk: int | None = None,
        trace: Sequence[str] = (),
    ) -> None:
        self.model, self.prompt, self.chunk, self.trace = model, prompt, chunk, trace
        self.cache = prompt.cache
        self.seen = 0  # columns of ids that the cache holds
        self.begun = False  # whether some call has filled the cache
        self.offset = 0
        B, P = prompt.ids.shape
        if prompt.embeds is not None:
            self.offset = prompt.embeds.shape[1] - P
        if self.cache is not None:
            past = self.cache.get_seq_length()
            columns = P if prompt.mask is None else prompt.mask.shape[1]
            if columns not in (P, P + past):
                raise InputError(f"attention_mask has {columns} columns; give {P}, or {P + past} with those cached")
            self.offset = columns - P
            self.seen = past - self.offset
            if not self.seen < P:
                raise CacheError(f"past_key_values holds {past} columns and input_ids has {P}: nothing is left to run")
        elif use_cache:
            self.cache = KVCache(
                model.config, B, dtype=model.dtype, device=prompt.ids.device, max_length=total + self.offset - 1
            )
        if self.cache is None and (prompt.embeds is not None or chunk is not None):
            raise InputError("inputs_embeds and prefill_chunk_size need use_cache=True")
        self.hides = prompt.mask is not None  # whether some column must be hidden at every call
        self.attentions: tuple[Tensor, ...] | None = None
        self.hidden_states: tuple[Tensor, ...] | None = None

    def feed(self, ids: Tensor, keep: int = 1) -> Tensor:
        """Logits [B, keep, V] of the last columns of ids [B, T], which begin with the ids of the calls before."""
        T = ids.shape[1]
        if self.begun and self.hides and self.cache is not None and not self.trace:
            self.hides = not self._is_ragged_only()
        if self.begun and self.cache is not None and not self.hides and not self.trace:
            logits = self._step(ids[:, self.seen :], keep)  # nothing to check: these are tokens of our own
        else:
            logits = self._call(ids, keep)
        self.seen, self.begun = (T, True) if self.cache is not None else (0, False)
        return logits

    def _step(self, ids: Tensor, keep: int) -> Tensor:
        T, new = self.seen + ids.shape[1], ids.shape[1]
        return self.model.step(ids, self._positions(T, new), self._types(T, new), self.cache, keep)

    def _call(self, ids: Tensor, keep: int) -> Tensor:
        T, first = ids.shape[1], self.seen
        ends = [T] if self.chunk is None else [*range(first + self.chunk, T, self.chunk), T]
        for end in ends:
            new = end - first
            embeds = None if self.begun else self.prompt.embeds
            if embeds is not None:
                new += self.offset
            out = self.model(
                None if embeds is not None else ids[:, first:end],
                inputs_embeds=embeds,
                past_key_values=self.cache,
                attention_mask=self._mask(end),
                position_ids=self._positions(end, new),
                token_type_ids=self._types(end, new),
                logits_to_keep=keep,
                use_cache=self.cache is not None,
                output_attentions="attentions" in self.trace,
                output_hidden_states="hidden_states" in self.trace,
                return_dict=True,
            )
            first = end
        self.attentions, self.hidden_states = out.attentions, out.hidden_states
        return out.logits[:, -keep:]

    def crop(self, columns: int) -> None:
        """Forget the columns of ids from this one on."""
        if self.cache is not None:
            self.cache.crop(columns + self.offset)
            self.seen = min(self.seen, columns)

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
            if mask is None:
                return columns
            given = ((mask != 0).long().cumsum(1) - 1).clamp(min=0)
        P = given.shape[1]
        return given.gather(1, columns.clamp(max=P - 1).expand(len(given), -1)) + (columns - P + 1).clamp(min=0)

    def _types(self, T: int, new: int) -> Tensor | None:
        """Token types [B, new] of the last `new` of T columns of ids; generated ones continue the prompt's last."""
        types = self.prompt.token_type_ids
        if types is None:
            return None
        columns = torch.arange(T - new, T, device=types.device) + (self.offset if self.prompt.embeds is not None else 0)
        return types[:, columns.clamp(max=types.shape[1] - 1)]
