"""`pipeline("text-generation")`: prompts and conversations to texts."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ...errors import InputError, short
from ...generation import GenerationConfig
from ...generation.config import NEW_TOKENS
from ...generation.options import plain
from ...tokenizer.arguments import checked_text
from ..causal import GPTNeoForCausalLM
from .inputs import Pipeline, batches, items

_DEFAULTS: dict[str, Any] = {"max_new_tokens": 256, "do_sample": True, "temperature": 0.7}  # of transformers' pipeline
_RETURNS = ("TENSORS", "NEW_TEXT", "FULL_TEXT")


@dataclass(kw_only=True)
class _Way:
    """What a call of text generation says of reading and writing; the rest is `generate`'s."""

    return_full_text: bool | None = None
    return_tensors: bool | None = None
    return_text: bool | None = None
    return_type: Any = None
    clean_up_tokenization_spaces: bool | None = None
    skip_special_tokens: bool | None = None
    continue_final_message: bool | None = None
    prefix: str | None = None
    handle_long_generation: str | None = None
    add_special_tokens: bool | None = None
    truncation: Any = None
    padding: Any = None
    tokenizer_encode_kwargs: dict[str, Any] | None = None
    tools: Any = None
    documents: Any = None

    def __post_init__(self) -> None:
        kind = getattr(self.return_type, "name", self.return_type)
        if kind not in (None, *_RETURNS):
            raise InputError(f"return_type={short(self.return_type)} is not one of {', '.join(_RETURNS)}")
        said = [n for n in ("return_full_text", "return_tensors", "return_text") if getattr(self, n) not in (None, False)]
        if self.return_full_text is False:
            said.append("return_full_text")
        if kind is None and len(said) > 1:
            raise InputError(f"{' and '.join(said)} contradict each other; give one")
        usual = "TENSORS" if self.return_tensors else "NEW_TEXT" if self.return_full_text is False else "FULL_TEXT"
        self.return_type = kind or usual
        if self.handle_long_generation not in (None, "hole"):
            raise InputError(f"handle_long_generation={short(self.handle_long_generation)} is not 'hole' or None")
        if not isinstance(self.tokenizer_encode_kwargs or {}, Mapping):
            raise InputError(f"tokenizer_encode_kwargs is {short(self.tokenizer_encode_kwargs)}; give a dict of options")
        if self.prefix is not None:
            checked_text(self.prefix, "prefix")

    def encoding(self, max_length: int | None) -> dict[str, Any]:
        """Keywords of the tokenizer, whose own defaults stand where nothing is said."""
        said = {"add_special_tokens": self.add_special_tokens, "truncation": self.truncation, "max_length": max_length}
        if self.padding not in (None, False):
            said |= {"padding": self.padding, "padding_side": "left"}
        return {k: v for k, v in said.items() if v is not None} | dict(self.tokenizer_encode_kwargs or {})

    def continues(self, chat: Sequence[Mapping[str, Any]]) -> bool:
        """Whether a conversation is to go on within its last message: where that is the assistant's, unless told."""
        asked = self.continue_final_message
        return chat[-1]["role"] == "assistant" if asked is None else bool(asked)


class TextGenerationPipeline(Pipeline):
    """Prompts to texts; see `pipeline`. `model` and `tokenizer` are attributes."""

    task = "text-generation"
    serves = GPTNeoForCausalLM

    def __init__(self, model: Any, **options: Any) -> None:
        super().__init__(model, **options)
        if self.tokenizer is not None:
            self.tokenizer.padding_side = "left"  # as transformers' pipeline leaves it

    def __call__(self, text_inputs: Any, **options: Any) -> Any:
        """Texts with their continuations: a list of dicts for a prompt, a list of such lists for a list of prompts.

        Args:
            text_inputs: a string, or a conversation as a list of {"role": ..., "content": ...}; a list of them, or an iterator,
                whose results come one by one.
            options: return_full_text: False for the continuation only. return_tensors: give "generated_token_ids" (a list
                with the prompt's) instead of "generated_text". batch_size: prompts that run together [1].
                prefix: text before each prompt that is not part of the result. stop_sequence: strings that end a text.
                truncation, padding, add_special_tokens, tokenizer_encode_kwargs: for the tokenizer, and so is max_length.
                handle_long_generation: "hole" drops the oldest tokens of a prompt that leaves no room.
                skip_special_tokens (True), clean_up_tokenization_spaces: for decoding. continue_final_message (True where
                the last message is the assistant's), tools, documents: of conversations.
                Others are `generate`'s, over those given to `pipeline`, over max_new_tokens=256, do_sample=True and
                temperature=0.7 where neither the model's generation_config nor the one that is passed says otherwise.

        Raises:
            InputError: an option out of range, or something that is neither a text nor a conversation.
        """
        if isinstance(text_inputs, Iterator):
            first = list(itertools.islice(text_inputs, 1))
            text_inputs = itertools.chain(first, text_inputs)
            text_inputs = list(text_inputs) if first and _is_message(first[0]) else text_inputs
        run = self._runner(options)
        if isinstance(text_inputs, Iterator):
            return run(_drawn(text_inputs))
        single = isinstance(text_inputs, str) or _is_chat(text_inputs)
        if single:
            return next(run([text_inputs]))
        return list(run(_drawn(items("text_inputs", text_inputs))))

    def _runner(self, options: dict[str, Any]) -> Callable[[Iterable[Any]], Iterator[list[dict[str, Any]]]]:
        """Prompts to their results under these options, which are checked now."""
        said, size = self._settings(options)
        tokenizer = self._present_tokenizer()
        if options.get("generation_config") is not None:  # stands instead of what `pipeline` was told
            said = {k: v for k, v in said.items() if k in options or k not in GenerationConfig.__dataclass_fields__}
        way = _Way(**{f.name: said.pop(f.name) for f in fields(_Way) if f.name in said})
        if way.prefix is None:
            way.prefix = getattr(self.model.config, "prefix", None)
        stops = said.pop("stop_sequence", None)
        if stops is not None:
            said["stop_strings"] = stops
        if said.get("max_length", 0) is None:
            said.pop("max_length")
        said, full = self._with_defaults(said)
        if said.get("max_new_tokens") is not None:
            said.pop("max_length", None)  # then it is the tokenizer's alone
        encoding = way.encoding(plain(options.get("max_length")))
        if way.truncation is None and full.max_new_tokens is None and "padding" not in encoding:
            encoding.pop("max_length", None)  # a longer prompt has no room anyhow, and is told its real length
        if way.prefix:
            n = len(tokenizer(way.prefix, add_special_tokens=bool(way.add_special_tokens))["input_ids"])
            for total, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
                if (length := getattr(full, total)) is not None and getattr(full, new) is None and new not in said:
                    said[total] = length + n

        def run(prompts: Iterable[Any]) -> Iterator[list[dict[str, Any]]]:
            for batch in batches((_checked(p, i) for i, p in enumerate(prompts)), size):
                rows = [self._encoded(prompt, way, encoding, full) for prompt in batch]
                together = [range(len(rows))] if all(ids for ids, _ in rows) else [[i] for i in range(len(rows))]
                for places in together:  # an empty prompt runs alone
                    yield from self._continue([batch[i] for i in places], [rows[i] for i in places], way, said, full)

        return run

    def _with_defaults(self, said: dict[str, Any]) -> tuple[dict[str, Any], GenerationConfig]:
        """(options of `generate` with the pipeline's defaults among them, all that is said of lengths and sampling)."""
        own, passed = GenerationConfig.like(self.model.generation_config), said.get("generation_config")
        full = own.under(GenerationConfig.like(passed)) if hasattr(passed, "to_dict") else own
        names = {*full.to_dict(), *said}
        added = {k: v for k, v in _DEFAULTS.items() if k not in names and not (k == "max_new_tokens" and "max_length" in names)}
        if not said.get("do_sample", full.do_sample if full.do_sample is not None else added.get("do_sample")):
            added.pop("temperature", None)
        if "pad_token_id" not in names and self.tokenizer.pad_token_id is not None:
            added["pad_token_id"] = self.tokenizer.pad_token_id
        said = added | said
        return said, full.under(
            GenerationConfig(**{k: v for k, v in said.items() if k in GenerationConfig.__dataclass_fields__})
        )

    def _encoded(self, prompt: Any, way: _Way, encoding: dict[str, Any], full: GenerationConfig) -> tuple[list[int], list[int]]:
        """(ids, mask) of a prompt, with room for what is to follow where `way` wants that."""
        if isinstance(prompt, str):
            out = self.tokenizer((way.prefix or "") + prompt, **encoding)
        else:
            onward = way.continues(prompt)
            out = self.tokenizer.apply_chat_template(
                prompt,
                add_generation_prompt=not onward,
                continue_final_message=onward,
                return_dict=True,
                tools=way.tools,
                documents=way.documents,
                **{k: v for k, v in encoding.items() if k != "add_special_tokens"},
            )
        ids = list(out["input_ids"])
        mask = list(out["attention_mask"]) if "attention_mask" in out else [1] * len(ids)
        if way.handle_long_generation is None:
            return ids, mask
        limit = min(self.tokenizer.model_max_length, self.model.config.max_position_embeddings)
        new = NEW_TOKENS if full.max_new_tokens is None else full.max_new_tokens
        if full.max_new_tokens is None and full.max_length is not None:
            new = full.max_length - len(ids)
        if not 0 <= new < limit:
            raise InputError(
                f"handle_long_generation='hole' cannot make room: the prompt has {len(ids)} tokens, {new} new ones are asked "
                f"for, and the limit is {limit}; ask for fewer with max_new_tokens"
            )
        keep = limit - new
        return ids[-keep:], mask[-keep:]

    def _continue(
        self,
        prompts: list[Any],
        rows: list[tuple[list[int], list[int]]],
        way: _Way,
        said: dict[str, Any],
        full: GenerationConfig,
    ) -> Iterator[list[dict[str, Any]]]:
        """The results of prompts that run together."""
        P = max(len(ids) for ids, _ in rows)
        own = self.tokenizer.pad_token_id
        pad = (full.pad_id or 0) if own is None else own
        ids = torch.tensor([[pad] * (P - len(ids)) + ids for ids, _ in rows], dtype=torch.long, device=self.model.device)
        mask = torch.tensor([[0] * (P - len(m)) + m for _, m in rows], dtype=torch.long, device=self.model.device)
        out = self.model.generate(ids if P else None, attention_mask=mask if P else None, **said)
        sequences = (out if isinstance(out, Tensor) else out.sequences).tolist()
        besides = {} if isinstance(out, Tensor) else _by_row(out, len(sequences))
        each = len(sequences) // len(prompts)
        for i, prompt in enumerate(prompts):
            records = range(i * each, (i + 1) * each)
            yield [self._record(prompt, sequences[r], P, way) | {k: v[r] for k, v in besides.items()} for r in records]

    def _record(self, prompt: Any, sequence: list[int], P: int, way: _Way) -> dict[str, Any]:
        """One result; `P`: tokens of the prompt."""
        if way.return_type == "TENSORS":
            return {"generated_token_ids": sequence}
        text = self.tokenizer.decode(
            sequence[P:],
            skip_special_tokens=way.skip_special_tokens is None or way.skip_special_tokens,
            clean_up_tokenization_spaces=way.clean_up_tokenization_spaces,
        )
        if way.return_type == "NEW_TEXT":
            return {"generated_text": text}
        if isinstance(prompt, str):
            return {"generated_text": prompt + text}
        *before, last = prompt
        if way.continues(prompt):
            return {"generated_text": [*before, {"role": last["role"], "content": last["content"] + text}]}
        return {"generated_text": [*before, last, {"role": "assistant", "content": text}]}


def _drawn(prompts: Iterable[Any]) -> Iterator[Any]:
    """Prompts, before the first of which torch draws the number that transformers' data loader draws: then the same seed gives
    the same texts."""
    torch.empty((), dtype=torch.int64).random_()
    yield from prompts


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and "role" in value and "content" in value


def _is_chat(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0 and _is_message(value[0])


def _checked(prompt: Any, i: int) -> Any:
    """A prompt, or the messages of a conversation."""
    if not _is_chat(prompt):
        return checked_text(prompt, f"text_inputs {i}")
    for n, message in enumerate(prompt):
        if not _is_message(message):
            raise InputError(f"text_inputs {i}: message {n} is {short(message)}; give {{'role': ..., 'content': ...}}")
    return list(prompt)


def _by_row(out: Any, rows: int) -> dict[str, list[Any]]:
    """What an output of `generate` has for each sequence besides it, such as scores [new, V]."""
    found: dict[str, list[Any]] = {}
    for name, value in out.items():
        steps = isinstance(value, tuple) and all(isinstance(v, Tensor) and len(v) == rows for v in value)
        value = torch.stack(value, 1) if steps else value
        if name != "sequences" and isinstance(value, Tensor) and len(value) == rows:
            found[name] = value.tolist()
    return found
