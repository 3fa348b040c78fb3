"""GenerationMixin: `generate`, with the arguments, the options and the results of transformers'."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..cache import KVCache
from ..errors import InputError
from ..inputs import check_ids
from ..outputs import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput
from .assisted import Assistant, Drafter, PromptLookup, assisted
from .beams import beam_search
from .config import OFF, GenerationConfig, total_length
from .loop import Record, Request, joined, sample
from .processors import Context, processors_of
from .session import Prompt, Session, padding_of
from .stopping import criteria_of
from .warpers import warpers_of

if TYPE_CHECKING:
    from ..config import GPTNeoConfig


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
        logits_processor: Sequence[Callable[[Tensor, Tensor], Tensor]] | None = None,
        stopping_criteria: Sequence[Callable[..., Any]] | None = None,
        prefix_allowed_tokens_fn: Callable[[int, Tensor], list[int]] | None = None,
        synced_gpus: bool | None = None,
        assistant_model: Any = None,
        streamer: Any = None,
        negative_prompt_ids: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: KVCache | None = None,
        tokenizer: Any = None,
        **options: Any,
    ) -> Any:
        """Prompts and their continuations, int64 [B, T + new]; rows that end early are filled with the pad token.

        Args:
            inputs, input_ids: prompts, integer [B, T] or [T], padded on either side; None for one beginning-of-text token.
            generation_config: options as one object, which keywords win over.
            logits_processor: callables (ids [B, T], scores [B, V]) -> scores, after all others but the sampler's own.
            stopping_criteria: callables (ids [B, T], scores) -> boolean [B], True for a text that has ended.
            prefix_allowed_tokens_fn: (row, ids [T]) -> the tokens that may follow.
            assistant_model: a smaller GPTNeoForCausalLM that drafts tokens. One prompt only, as with prompt lookup.
            streamer: an object with `put(ids)` and `end()`.
            negative_prompt_ids, negative_prompt_attention_mask: [B, T'] of guidance_scale; None for the last token.
            attention_mask: [B, T], zero for padding. Without one, padding is told by the pad token where that is set,
                occurs, and is not also the end token.
            position_ids, token_type_ids: [B, T]. inputs_embeds: [B, T, C] in place of input_ids; then only the
                continuation is returned.
            past_key_values: cache of an earlier call, for the first columns of input_ids, or for the columns before them
                where attention_mask covers both; appended to.
            tokenizer: for stop_strings; None for the model's own.
            options: see GenerationConfig.

        Returns:
            The tensor; with return_dict_in_generate=True a GenerateDecoderOnlyOutput or GenerateBeamDecoderOnlyOutput.

        Raises:
            InputError: a value out of range, or more tokens than the model has positions.
            UnknownOptionError: no such option.
            NonFiniteLogitsError: NaN or infinite logits in some rows; the others are complete.
        """
        if inputs is not None and input_ids is not None:
            raise InputError("inputs and input_ids are two names of one argument; give one")
        resolved = self._resolve(generation_config, options | {"synced_gpus": synced_gpus})
        prompt = self._prompt(input_ids if inputs is None else inputs, attention_mask, inputs_embeds, resolved)
        prompt.position_ids, prompt.token_type_ids, prompt.cache = position_ids, token_type_ids, past_key_values
        out = self._complete(
            prompt.leftwards(),
            resolved,
            own=list(logits_processor or []),
            criteria=stopping_criteria,
            prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
            assistant=assistant_model,
            streamer=streamer,
            negative=(negative_prompt_ids, negative_prompt_attention_mask),
            tokenizer=tokenizer,
        )
        return _with_prompts(prompt.ids, out)

    def _complete(
        self,
        prompt: Prompt,
        resolved: Any,
        *,
        assistant: Any = None,
        streamer: Any = None,
        negative: tuple[Tensor | None, Tensor | None] = (None, None),
        tokenizer: Any = None,
        **about: Any,
    ) -> Any:
        """What `generate` returns, for a checked prompt and resolved options."""
        prompt = prompt.expand(max(resolved.num_beams, resolved.num_return_sequences))
        guided = resolved.guidance_scale not in (None, 1)
        guide = _Guide(self, prompt, *negative) if guided else None
        request = self._request(prompt, resolved, tokenizer, unconditional=guide, **about)
        if resolved.num_beams > 1:
            if assistant is not None or streamer is not None:
                raise InputError("num_beams above 1 goes neither with assistant_model nor with streamer")
            return self._give_beams(self._session(prompt, request), prompt.ids, request)
        steps, session = self._steps(prompt, request, assistant, streamed=streamer is not None)
        new = list(steps if streamer is None else _stream(prompt.ids, steps, streamer))
        return self._give_texts(joined(prompt.ids, new), session, request)

    def compute_transition_scores(
        self, sequences: Tensor, scores: Sequence[Tensor], beam_indices: Tensor | None = None, normalize_logits: bool = False
    ) -> Tensor:
        """Score float32 [B, new] of each generated token, from the fields of a `generate` output.

        Args:
            sequences: int64 [B, T]. scores: a [rows, V] for each new token. beam_indices: int32 [B, new] of a beam search.
            normalize_logits: give log-probabilities.
        """
        steps = torch.stack(tuple(scores), 1)  # [rows, new, V]
        steps = steps.log_softmax(-1) if normalize_logits else steps
        if beam_indices is None:
            beam_indices = torch.arange(len(sequences), device=sequences.device)[:, None].expand(-1, steps.shape[1])
        past_the_end = beam_indices < 0
        new = int((~past_the_end).sum(1).max())
        rows, tokens = beam_indices[:, :new].clamp(min=0).long(), sequences[:, sequences.shape[1] - new :]
        found = steps[rows, torch.arange(new, device=rows.device), tokens]
        return found.masked_fill(past_the_end[:, :new], 0)

    def _resolve(self, config: GenerationConfig | None, options: dict[str, Any]) -> Any:
        """Keywords over the config that was passed over the model's own, over the defaults."""
        own = self.generation_config if config is None else self.generation_config.under(config)
        said = GenerationConfig.of(options)
        for token in said.eos_ids:
            if not 0 <= token < self.config.vocab_size:
                raise InputError(f"eos_token_id {token} is not in the vocabulary of {self.config.vocab_size} tokens")
        merged = own.under(said)
        for name in [
            k for k, v in options.items() if v is None and k in vars(merged) and k not in ("max_length", "max_new_tokens")
        ]:
            setattr(merged, name, OFF.get(name))  # None in a call switches off what another source says
        return merged.resolved()

    def _prompt(self, ids: Tensor | None, mask: Tensor | None, embeds: Tensor | None, options: Any) -> Prompt:
        """The prompt, checked, with its padding."""
        if embeds is not None:
            ids = torch.empty(len(embeds), 0, dtype=torch.long, device=self.device) if ids is None else ids
            return Prompt(ids, None if mask is None or bool(mask.all()) else mask, embeds=embeds)
        if ids is None:
            if options.bos_token_id is None:
                raise InputError("no prompt and no bos_token_id to begin with; give input_ids")
            ids = torch.tensor([[options.bos_token_id]], device=self.device)
        ids = check_ids("input_ids", ids, self.config.vocab_size, self.device)
        return Prompt(ids, padding_of(ids, mask, options))

    def _request(self, prompt: Prompt, options: Any, tokenizer: Any = None, criteria: Any = None, **about: Any) -> Request:
        embedded = 0 if prompt.embeds is None else prompt.embeds.shape[1]
        before = prompt.cache.get_seq_length() if prompt.cache is not None else 0
        P = prompt.ids.shape[1]
        if prompt.embeds is None and prompt.mask is not None and prompt.mask.shape[1] > P:
            embedded = before
        total = total_length(options, P + embedded, self.config.max_position_embeddings) - embedded
        starts = None if prompt.starts is None else (prompt.starts - embedded).clamp(min=0)  # in columns of ids
        context = Context(P, total, self.config.vocab_size, starts, **about)
        generator = None
        if options.seed is not None:
            generator = torch.Generator(prompt.ids.device).manual_seed(options.seed)
        processors = processors_of(options, context)
        processors.extend(warpers_of(options))
        device = prompt.ids.device
        stops = criteria_of(options, total, tokenizer if tokenizer is not None else self.tokenizer, criteria, device)
        wants = ("scores", "logits", "attentions", "hidden_states")
        kept = [name for name in wants if options.return_dict_in_generate and getattr(options, f"output_{name}")]
        return Request(options, total, processors, stops, generator, Record(**{name: [] for name in kept}))

    def _session(self, prompt: Prompt, request: Request) -> Session:
        o, record = request.options, request.record
        trace = [name for name in ("attentions", "hidden_states") if getattr(record, name) is not None]
        return Session(self, prompt, request.total, use_cache=o.use_cache, chunk=o.prefill_chunk_size, trace=trace)

    def _fast_steps(self, prompt: Prompt, request: Request, assistant: Any, streamed: bool) -> Iterator[Tensor] | None:
        """New tokens [B, n] without the host's help, where something above this offers that."""
        return None

    def _steps(
        self, prompt: Prompt, request: Request, assistant: Any = None, streamed: bool = False
    ) -> tuple[Iterator[Tensor], Session | None]:
        """New tokens [B, n] as they are found, on the device or on the host, by the strategy that the options ask for, and the
        session that finds them."""
        fast = self._fast_steps(prompt, request, assistant, streamed)
        if fast is not None:
            return fast, None
        session = self._session(prompt, request)
        if assistant is None and request.options.prompt_lookup_num_tokens is None:
            return sample(session, prompt.ids, request), session
        if len(prompt.ids) > 1 or session.cache is None:
            raise InputError(f"drafts are for one text and need the cache; this call has {len(prompt.ids)} rows")
        drafter: Drafter
        if assistant is None:
            drafter = PromptLookup(request, self.config.vocab_size)
        else:
            if assistant.config.vocab_size != self.config.vocab_size:
                raise InputError(
                    f"assistant_model has a vocabulary of {assistant.config.vocab_size} tokens, this model one of "
                    f"{self.config.vocab_size}; they must share a tokenizer"
                )
            drafter = Assistant(assistant, prompt, request)
        return assisted(session, prompt.ids, request, drafter), session

    def _give_texts(self, sequences: Tensor, session: Session | None, request: Request) -> Any:
        if session is None or not request.options.return_dict_in_generate:
            return sequences
        return GenerateDecoderOnlyOutput(sequences, **_kept(request.record), past_key_values=session.cache)

    def _give_beams(self, session: Session, ids: Tensor, request: Request) -> Any:
        found = beam_search(session, ids, request)
        if not request.options.return_dict_in_generate:
            return found.sequences
        scores = found.scores if request.options.output_scores else None
        kept = _kept(request.record)
        return GenerateBeamDecoderOnlyOutput(
            found.sequences, scores, beam_indices=found.parents, past_key_values=session.cache, **kept
        )


def _with_prompts(given: Tensor, out: Any) -> Any:
    """The output with its prompts as they were given [B, P], their padding on whichever side."""
    sequences = out if isinstance(out, Tensor) else out.sequences
    sequences[:, : given.shape[1]] = given.repeat_interleave(len(sequences) // len(given), 0)
    return out


def _kept(record: Record) -> dict[str, Any]:
    return {name: None if value is None else tuple(value) for name, value in vars(record).items()}


def _stream(ids: Tensor, steps: Iterator[Tensor], streamer: Any) -> Iterator[Tensor]:
    """The same steps, each shown to the streamer, as is an error where it can take one."""
    try:
        streamer.put(ids.cpu())
        for tokens in steps:
            streamer.put(tokens[:, 0].cpu() if tokens.shape[1] == 1 else tokens.cpu())
            yield tokens
        streamer.end()
    except BaseException as error:
        if hasattr(streamer, "fail"):
            streamer.fail(error)
        raise


class _Guide:
    """Logits of the unconditional prompt, extended by what is generated. ids [B, T'] default to the prompts' last token."""

    def __init__(self, model: Any, prompt: Prompt, ids: Tensor | None, mask: Tensor | None) -> None:
        self.ids = (
            prompt.ids[:, -1:] if ids is None else check_ids("negative_prompt_ids", ids, model.config.vocab_size, model.device)
        )
        if len(self.ids) != len(prompt.ids):
            raise InputError(f"negative_prompt_ids has {len(self.ids)} rows, the input {len(prompt.ids)}")
        self.prompt = prompt.ids.shape[1]
        total = model.config.max_position_embeddings
        self.session = Session(model, Prompt(self.ids, mask), total)

    def __call__(self, input_ids: Tensor) -> Tensor:
        return self.session.feed(torch.cat([self.ids, input_ids[:, self.prompt :]], 1))[:, -1]
