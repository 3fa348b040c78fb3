"""GenerationMixin: `generate` for tensors, `generate_text` and `stream` for strings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from ..errors import InputError, SetupError
from ..inputs import check_ids
from .config import GenerationConfig, total_length
from .loop import decode

if TYPE_CHECKING:
    from ..config import GPTNeoConfig

_BATCH = 32  # prompts of one `generate_text` batch


class GenerationMixin:
    """What GPTNeoForCausalLM generates with; it reads `config`, `generation_config`, `tokenizer` and the forward pass."""

    config: GPTNeoConfig
    generation_config: GenerationConfig
    tokenizer: Any

    if TYPE_CHECKING:

        @property
        def device(self) -> torch.device: ...

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Prompts and their continuations, int64 [B, T + new]; rows that end early are filled with the pad token.

        Args:
            inputs, input_ids: prompts, integer [B, T] or [T], padded on the left; None for one beginning-of-text token.
            generation_config: options as one object.
            attention_mask: [B, T], zero for padding. Without one, padding is told by the pad token where that is set,
                occurs, and is not also the end token.
            options: see GenerationConfig.

        Raises:
            InputError: a value out of range, or more tokens than the model has positions.
            UnknownOptionError: no such option.
        """
        if inputs is not None and input_ids is not None:
            raise InputError("inputs and input_ids are two names of one argument; give one")
        resolved = self._options(generation_config, options)
        ids = self._prompt(input_ids if inputs is None else inputs, resolved)
        mask = _padding(ids, attention_mask, resolved)
        total = total_length(resolved, ids.shape[1], self.config.max_position_embeddings)
        return torch.cat([ids, *(token[:, None] for token in decode(self, ids, mask, total, resolved))], 1)

    @overload
    def generate_text(self, prompts: str, **options: Any) -> str: ...
    @overload
    def generate_text(self, prompts: Sequence[str], **options: Any) -> list[str]: ...

    def generate_text(
        self,
        prompts: str | Sequence[str],
        *,
        return_full_text: bool = False,
        truncate: Literal["left"] | None = None,
        allow_empty: bool = True,
        **options: Any,
    ) -> str | list[str]:
        """The continuation of a prompt, or of each of a list of prompts of any lengths, in their order.

        Args:
            prompts: a string or strings; an empty one stands for the beginning of a text.
            return_full_text: put the prompt before its continuation.
            truncate: "left" drops the oldest tokens of a prompt that leaves no room for the new ones.
            allow_empty: False refuses empty prompts.
            options: see GenerationConfig.
        """
        resolved = self._options(None, options)
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        rows = [self._encode(text, resolved, truncate, allow_empty) for text in texts]
        out: list[str] = []
        for i in range(0, len(rows), _BATCH):
            batch = self.tokenizer.pad(
                rows[i : i + _BATCH], pad_token_id=resolved.pad_id or 0, padding_side="left", return_tensors="pt"
            ).to(self.device)
            ids = self.generate(batch.input_ids, attention_mask=batch.attention_mask, **options)
            new = ids[:, batch.input_ids.shape[1] :].tolist()
            for text, row in zip(texts[i : i + _BATCH], new, strict=True):
                out.append((text if return_full_text else "") + self._text(row, resolved))
        return out[0] if isinstance(prompts, str) else out

    def stream(
        self, prompt: str, *, truncate: Literal["left"] | None = None, allow_empty: bool = True, **options: Any
    ) -> Iterator[str]:
        """The continuation of one prompt piece by piece, as soon as its tokens form whole characters.

        The pieces joined are what `generate_text` returns. Arguments are checked at once, before the first piece is asked
        for; leaving the loop early frees everything.
        """
        resolved = self._options(None, options)
        ids = torch.tensor([self._encode(prompt, resolved, truncate, allow_empty)], device=self.device)
        total = total_length(resolved, ids.shape[1], self.config.max_position_embeddings)
        return self._pieces(ids, total, resolved)

    def _pieces(self, ids: Tensor, total: int, options: GenerationConfig) -> Iterator[str]:
        decoder = self.tokenizer.stream()
        for token in decode(self, ids, None, total, options):
            if int(token) in options.eos_ids:
                break
            if piece := decoder.put(int(token)):
                yield piece
        if piece := decoder.end():
            yield piece

    def _options(self, config: GenerationConfig | None, options: dict[str, Any]) -> GenerationConfig:
        """Keywords over the config that was passed over the model's own."""
        own = self.generation_config if config is None else self.generation_config.under(config)
        return own.under(GenerationConfig.of(options))

    def _prompt(self, ids: Tensor | None, options: GenerationConfig) -> Tensor:
        if ids is None:
            if options.bos_token_id is None:
                raise InputError("no prompt and no bos_token_id to begin with; give input_ids")
            ids = torch.tensor([[options.bos_token_id]], device=self.device)
        return check_ids("input_ids", ids, self.config.vocab_size, self.device)

    def _encode(self, text: str, options: GenerationConfig, truncate: Literal["left"] | None, allow_empty: bool) -> list[int]:
        """Token ids of one prompt that leave room for what is to be generated."""
        if self.tokenizer is None:
            raise SetupError(
                "the model has no tokenizer: use gptneo_fast.load, or set model.tokenizer = GPT2Tokenizer.from_pretrained(...)"
            )
        if truncate not in (None, "left"):
            raise InputError(f"truncate={truncate!r} is unknown; use 'left' or None")
        ids = self.tokenizer.encode(text)
        if not ids:
            if not allow_empty or options.bos_token_id is None:
                raise InputError("the prompt is empty" + ("" if allow_empty else "; allow_empty=True begins a new text"))
            ids = [options.bos_token_id]
        if truncate == "left":
            limit = self.config.max_position_embeddings
            room = limit - (options.max_new_tokens if options.max_new_tokens is not None else 20)
            if options.max_new_tokens is None and options.max_length is not None:
                room = options.max_length - 1
            ids = ids[-max(1, min(room, limit)) :]
        return ids

    def _text(self, ids: list[int], options: GenerationConfig) -> str:
        """Text of a continuation up to its end token."""
        end = next((i for i, token in enumerate(ids) if token in options.eos_ids), len(ids))
        return self.tokenizer.decode(ids[:end], skip_special_tokens=True)


def _padding(ids: Tensor, mask: Tensor | None, options: GenerationConfig) -> Tensor | None:
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
    if mask.shape != ids.shape:
        raise InputError(f"attention_mask has shape {list(mask.shape)}, input_ids {list(ids.shape)}; they must agree")
    held = (mask != 0).to(ids.device)
    if bool(held.all()):
        return None
    if empty := (~held.any(1)).nonzero().flatten().tolist():
        raise InputError(f"row {empty[0]} of attention_mask is all padding; a prompt needs at least one token")
    return held.long()
