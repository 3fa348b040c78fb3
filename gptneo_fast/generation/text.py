"""TextMixin: strings in, strings out, whole or piece by piece."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, cast, overload

import torch
from torch import Tensor

from ..errors import InputError, NonFiniteLogitsError, SetupError, short
from ..progress import of_batches
from .config import NEW_TOKENS, Options
from .generate import complete, new_tokens, request_of, settle
from .prompt import Prompt, prompt_of
from .request import LanguageModel, non_finite

_BATCH = 32  # prompts that run together


class TextMixin:
    """What GPTNeoForCausalLM offers to people who have text; it needs `tokenizer`."""

    tokenizer: Any

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
        progress: bool | None = None,
        **options: Any,
    ) -> str | list[str]:
        """The continuation of a prompt, or of each of a list of prompts of any lengths, in their order.

        Args:
            prompts: a string or strings; an empty one stands for the beginning of a text.
            return_full_text: put the prompt before its continuation.
            truncate: "left" drops the oldest tokens of a prompt that leaves no room for the new ones.
            allow_empty: False refuses empty prompts.
            progress: show a bar on standard error; None for where that is a terminal and the prompts fill several batches.
            options: see GenerationConfig. A stop string is not part of the result.

        Raises:
            InputError, UnknownOptionError, NonFiniteLogitsError: as `generate`. SetupError: the model has no tokenizer.
        """
        if not isinstance(prompts, (str, Iterable)) or isinstance(prompts, Mapping):
            raise InputError(f"prompts is a {type(prompts).__name__}; give a string or strings")
        model = cast(LanguageModel, self)
        resolved = settle(model, None, options | {"return_dict_in_generate": False})
        if resolved.num_return_sequences > 1:
            raise InputError(f"num_return_sequences={resolved.num_return_sequences}: repeat the prompt in the list instead")
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        rows = [self._encode(text, resolved, truncate, allow_empty) for text in texts]
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))  # neighbours of like length need little padding
        out, broken = [""] * len(rows), dict[int, int]()  # prompt -> tokens that it had
        for batch in of_batches([order[i : i + _BATCH] for i in range(0, len(order), _BATCH)], "prompt", progress):
            longest = len(rows[batch[0]])
            pad = [longest - len(rows[i]) for i in batch]
            ids = torch.tensor([[resolved.pad_id or 0] * n + rows[i] for n, i in zip(pad, batch, strict=True)])
            mask = torch.tensor([[0] * n + [1] * len(rows[i]) for n, i in zip(pad, batch, strict=True)])
            prompt = prompt_of(model, ids.to(model.device), mask.to(model.device), None, resolved)
            prompt.places = batch
            prompt = prompt.expand(resolved.num_beams)
            try:
                found = complete(model, request_of(model, prompt, resolved)).tolist()
            except NonFiniteLogitsError as error:  # the other prompts, and the batches that are left, have their texts
                found = error.sequences[:, longest:].tolist()
                for row, columns in zip(error.rows, error.columns, strict=True):
                    found[row] = found[row][: columns - longest]
                    broken[batch[row]] = columns - pad[row]
            for i, row in zip(batch, found, strict=True):
                out[i] = (texts[i] if return_full_text else "") + self._text(row, resolved)
        if broken:
            raise non_finite(broken, None, out)
        return out[0] if isinstance(prompts, str) else out

    def stream(
        self, prompt: str, *, truncate: Literal["left"] | None = None, allow_empty: bool = True, **options: Any
    ) -> Generator[str, None, None]:
        """The continuation of one prompt piece by piece, as soon as its tokens form whole characters.

        The pieces joined are what `generate_text` returns. Arguments are checked at once, before the first piece is asked
        for; leaving the loop early frees everything.
        """
        model = cast(LanguageModel, self)
        resolved = settle(model, None, options)
        if resolved.num_beams > 1 or resolved.num_return_sequences > 1:
            raise InputError("a stream follows one text as it grows: num_beams and num_return_sequences must be 1")
        ids = torch.tensor([self._encode(prompt, resolved, truncate, allow_empty)], device=model.device)
        steps = new_tokens(model, request_of(model, Prompt(ids), resolved, streamed=True))
        return self._pieces(steps, resolved)

    async def astream(self, prompt: str, **options: Any) -> AsyncIterator[str]:
        """`stream` for `async for`: the steps run in a thread of their own, so that the event loop stays free.

        One that is cancelled, or left, waits for the step that is under way; then everything is freed.
        """
        pieces, loop, thread = self.stream(prompt, **options), asyncio.get_running_loop(), ThreadPoolExecutor(1)
        try:
            while (piece := await loop.run_in_executor(thread, next, pieces, None)) is not None:
                yield piece
        finally:
            closed = thread.submit(pieces.close)  # behind the step, in the one thread that has the generator
            thread.shutdown(wait=False)
            await asyncio.shield(asyncio.wrap_future(closed))

    def _pieces(self, steps: Iterator[Tensor], options: Options) -> Generator[str, None, None]:
        text = GrowingText(self.tokenizer, options)
        for tokens in steps:
            if piece := text.put(tokens[0].tolist()):
                yield piece
            if text.over:
                break
        if piece := text.end():
            yield piece

    def _encode(self, text: str, options: Options, truncate: Literal["left"] | None, allow_empty: bool) -> list[int]:
        """Token ids of one prompt that leave room for what is to be generated."""
        if self.tokenizer is None:
            raise SetupError(
                "the model has no tokenizer: use gptneo_fast.load, or set model.tokenizer = GPT2Tokenizer.from_pretrained(...)"
            )
        if truncate not in (None, "left"):
            raise InputError(f"truncate={short(truncate)} is unknown; use 'left' or None")
        limit = cast(LanguageModel, self).config.max_position_embeddings
        ids: list[int] = self.tokenizer.encode(_bounded(self.tokenizer, text, limit, truncate is not None))
        if not ids:
            if not allow_empty or options.bos_token_id is None:
                raise InputError("the prompt is empty" + ("" if allow_empty else "; allow_empty=True begins a new text"))
            ids = [options.bos_token_id]
        if truncate == "left":
            room = limit - (NEW_TOKENS if options.max_new_tokens is None else options.max_new_tokens)
            if options.max_new_tokens is None and options.max_length is not None:
                room = options.max_length - 1
            ids = ids[-max(1, min(room, limit)) :]
        return ids

    def _text(self, ids: list[int], options: Options) -> str:
        """Text of a continuation up to its end token or its stop string."""
        end = next((i for i, token in enumerate(ids) if token in options.eos_ids), len(ids))
        text: str = self.tokenizer.decode(ids[:end], skip_special_tokens=True)
        return text[: _stop_at(text, options.stops)]


class GrowingText:
    """The text of a continuation while its tokens come: whole characters, and none that a stop string may begin with.

    over: whether an end token or a stop string came; nothing follows.
    """

    def __init__(self, tokenizer: Any, options: Options) -> None:
        self.over = False
        self._decoder, self._options = tokenizer.stream(), options
        self._held, self._cut = "", False  # a stop string may begin in what is held; one has cut the text

    def put(self, tokens: Iterable[int]) -> str:
        """Take tokens; the text that is certain now."""
        out, stops = "", self._options.stops
        for token in tokens:
            if self.over or token in self._options.eos_ids:
                self.over = True
                break
            self._held += self._decoder.put(token)
            end = _stop_at(self._held, stops)
            if end is not None:
                self.over = self._cut = True
                return out + self._held[:end]
            out += self._let_go(len(self._held) - _may_begin(self._held, stops))
        return out

    def end(self) -> str:
        """What is left when no token follows."""
        return "" if self._cut else self._held + self._decoder.end()

    def _let_go(self, n: int) -> str:
        piece, self._held = self._held[:n], self._held[n:]
        return piece


def _bounded(tokenizer: Any, text: str, limit: int, cut: bool) -> str:
    """A text that may have up to `limit` tokens, before work is done for each of its characters.

    Args:
        cut: keep of a longer one what its last `limit` tokens may come from, else refuse it.

    Raises:
        InputError: it has more.
    """
    if not isinstance(text, str) or len(text) <= 16 * limit or not hasattr(tokenizer, "longest_token"):
        return text
    longest = tokenizer.longest_token()
    if longest is None:
        return text
    if not cut:
        if len(text) > limit * longest:
            raise InputError(
                f"the prompt has {len(text)} characters, which are at least {len(text) // longest} tokens, past the model's "
                f"{limit} positions; shorten it, or let truncate='left' keep its end"
            )
        return text
    end = len(text) - 2 * limit * longest  # twice, so that what the cut changes is dropped
    while (end := text.rfind(" ", 0, max(end, 0))) > 0:
        if text[end + 1].isalpha() and not text[end - 1].isspace():  # a word begins there, whatever stands before
            return text[end:]
    return text


def _stop_at(text: str, stops: list[str]) -> int | None:
    """Where the first stop string begins."""
    return min((at for stop in stops if (at := text.find(stop)) >= 0), default=None)


def _may_begin(text: str, stops: list[str]) -> int:
    """Characters at the end of the text that may be the beginning of a stop string."""
    longest = max(map(len, stops), default=0)
    return next((n for n in range(min(longest - 1, len(text)), 0, -1) if any(s.startswith(text[-n:]) for s in stops)), 0)
