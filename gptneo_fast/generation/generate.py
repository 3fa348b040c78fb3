"""`generate`, with the arguments, the options and the results of transformers', and the choice of a strategy.

A strategy is a function of (model, request) that checks at once what it needs and gives an iterator of new tokens: `stepwise`,
`beams`, `assisted`, or `captured` for what a device can do without the host.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor

from ..config import GPTNeoConfig, is_int
from ..errors import InputError, short, warn_once
from ..network.cache import KVCache
from ..network.inputs import check_ids
from ..network.outputs import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput
from . import captured
from .assisted import assisted
from .beams import beams
from .callbacks import check_functions, check_methods
from .config import OFF, GenerationConfig, Options, total_length
from .processors import Context, processors_of
from .prompt import Prompt, prompt_of
from .request import Generation, LanguageModel, Record, Request
from .session import Session
from .stepwise import stepwise
from .stopping import criteria_of
from .warpers import warpers_of


class GenerationMixin:
    """What GPTNeoForCausalLM generates with."""

    config: GPTNeoConfig
    generation_config: GenerationConfig
    tokenizer: Any
    last_generation: Generation | None = None

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
        logits_to_keep: int | None = None,
        labels: Tensor | None = None,
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
            past_key_values: cache of an earlier call, for the first columns of input_ids or inputs_embeds, or for the columns
                before them where attention_mask covers both; appended to. A call that fails midway leaves in it what it
                has run of its texts, without drafts, to be continued or cropped; of beams, a row for each.
            tokenizer: for stop_strings; None for the model's own.
            logits_to_keep: has no say; those that are needed are computed. labels: none either, as in a batch for training.
            options: see GenerationConfig.

        Returns:
            The tensor; with return_dict_in_generate=True a GenerateDecoderOnlyOutput or GenerateBeamDecoderOnlyOutput.

        Raises:
            InputError: a value out of range, or more tokens than the model has positions.
            UnknownOptionError: no such option.
            NonFiniteLogitsError: NaN or infinite logits in some rows; the others are complete.
        """
        model = cast(LanguageModel, self)
        with _telling(streamer):
            check_methods(model)
            if inputs is not None and input_ids is not None:
                raise InputError("inputs and input_ids are two names of one argument; give one")
            if not (logits_to_keep is None or (is_int(logits_to_keep) and logits_to_keep >= 0)):
                raise InputError(f"logits_to_keep={short(logits_to_keep)} is not an integer from 0; leave it out")
            if past_key_values is None:
                past_key_values = options.pop("cache", None)  # its name from 5.24 on
            if None not in (options.get("max_length"), options.get("max_new_tokens")):
                warn_once("max_length has no say beside max_new_tokens in one call; leave one of them out")
            options = {k: v for k, v in options.items() if v is not None or k in GenerationConfig.__dataclass_fields__}
            settled = settle(model, generation_config, options | {"synced_gpus": synced_gpus})
            given = prompt_of(
                model,
                input_ids if inputs is None else inputs,
                attention_mask,
                inputs_embeds,
                settled,
                position_ids=position_ids,
                token_type_ids=token_type_ids,
                cache=past_key_values,
            )
            request = request_of(
                model,
                given.leftwards().expand(max(settled.num_beams, settled.num_return_sequences)),
                settled,
                tokenizer=tokenizer,
                criteria=stopping_criteria,
                own=check_functions("logits_processor", logits_processor),
                negative=(negative_prompt_ids, negative_prompt_attention_mask),
                prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
                assistant=assistant_model,
                streamed=streamer is not None,
            )
            return _output(given.ids, complete(model, request, streamer), request)

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

    @functools.cached_property
    def idle_runners(self) -> captured.Pool:
        """What earlier generations leave to later ones."""
        return captured.Pool()

    def release_memory(self) -> int:
        """Free what generation keeps for later calls (caches, captured steps); the bytes laid out for it, of captured steps
        without what they allocate inside."""
        held = self.idle_runners.nbytes
        self.idle_runners.drop(cast(LanguageModel, self).device)
        return held


def settle(model: LanguageModel, config: GenerationConfig | None, said: dict[str, Any]) -> Options:
    """Keywords over the config that was passed over the model's own, over the defaults.

    Raises:
        InputError, UnknownOptionError: a value out of range, an option that does not exist or goes not with another.
    """
    if config is not None and not hasattr(config, "to_dict"):
        raise InputError(f"generation_config is {short(config)}; give a GenerationConfig, or the options as keywords")
    own = GenerationConfig.like(model.generation_config)
    own = own if config is None else own.under(config)
    options, vocabulary = GenerationConfig.of(said), model.config.vocab_size
    for token in options.eos_ids:
        if not 0 <= token < vocabulary and token != -1:  # which ends no text, as in transformers
            raise InputError(f"eos_token_id {token} is not in the vocabulary of {vocabulary} tokens")
    merged = own.under(options)
    for name, value in said.items():  # None in a call switches off what another source says
        if value is None and name in vars(merged) and name not in ("max_length", "max_new_tokens"):
            setattr(merged, name, OFF.get(name))
    return merged.resolved()


def request_of(
    model: LanguageModel,
    prompt: Prompt,
    options: Options,
    *,
    tokenizer: Any = None,
    criteria: Sequence[Callable[..., Any]] | None = None,
    own: Sequence[Callable[..., Any]] = (),
    negative: tuple[Tensor | None, Tensor | None] = (None, None),
    prefix_allowed_tokens_fn: Callable[[int, Tensor], list[int]] | None = None,
    assistant: LanguageModel | None = None,
    streamed: bool = False,
) -> Request:
    """The request that checked prompts and settled options make.

    Args:
        tokenizer: for stop strings; None for the model's own.
        criteria, own: the user's stopping criteria and processors.
        negative: ids and mask [rows, T'] of guidance_scale's unconditional prompt; None for the prompt's last token.

    Raises:
        InputError: more tokens than the model has positions; a token id beyond the vocabulary; stop strings and no tokenizer.
    """
    P, device = prompt.ids.shape[1], prompt.ids.device
    embedded = prompt.columns - P
    total = total_length(options, P + embedded, model.config.max_position_embeddings) - embedded
    _check_together(model, prompt, options, total, assistant, streamed)
    starts = None if prompt.starts is None else (prompt.starts - embedded).clamp(min=0)  # in columns of ids
    if prefix_allowed_tokens_fn is not None and not callable(prefix_allowed_tokens_fn):
        raise InputError(f"prefix_allowed_tokens_fn is {short(prefix_allowed_tokens_fn)}, which cannot be called")
    guided = options.guidance_scale not in (None, 1)
    context = Context(
        prompt=P,
        total=total,
        vocabulary=model.config.vocab_size,
        starts=starts,
        embedded=embedded if prompt.embeds is not None else 0,
        unconditional=_Guide(model, prompt, *negative, new=total - P) if guided else None,
        prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
        own=own,
    )
    generator = None if options.seed is None else torch.Generator(device).manual_seed(options.seed)
    processors = processors_of(options, context)
    processors.extend(warpers_of(options))
    own_stops = check_functions("stopping_criteria", criteria)
    stops = criteria_of(options, total, tokenizer if tokenizer is not None else model.tokenizer, own_stops, device)

    def kept(wanted: bool | None) -> list[Any] | None:
        return [] if options.return_dict_in_generate and wanted else None

    record = Record(
        scores=kept(options.output_scores),
        logits=kept(options.output_logits),
        attentions=kept(options.output_attentions),
        hidden_states=kept(options.output_hidden_states),
    )
    return Request(
        prompt=prompt,
        options=options,
        total=total,
        processors=processors,
        criteria=stops,
        own=own,
        generator=generator,
        record=record,
        assistant=assistant,
        streamed=streamed,
    )


def _check_together(
    model: LanguageModel, prompt: Prompt, options: Options, total: int, assistant: LanguageModel | None, streamed: bool
) -> None:
    """Refuse what no strategy can serve.

    Args:
        total: columns of ids at most.
    """
    config, rows, new = model.config, len(prompt.ids), total - prompt.ids.shape[1]
    limit = config.max_position_embeddings
    if options.num_beams > 1 and (assistant is not None or streamed):
        raise InputError("num_beams above 1 goes neither with assistant_model nor with streamer")
    if not options.use_cache and prompt.cache is None and (prompt.embeds is not None or options.prefill_chunk_size is not None):
        raise InputError("inputs_embeds and prefill_chunk_size need use_cache=True")
    if prompt.position_ids is not None and (last := int(prompt.position_ids[:, -1].max())) + new > limit:
        raise InputError(
            f"position_ids end at {last} and {new} new tokens go on from there, past the model's {limit} positions; "
            f"ask for at most {limit - last} new tokens"
        )
    if assistant is None and options.prompt_lookup_num_tokens is None:
        return
    if rows > 1 or (prompt.cache is None and not options.use_cache):
        raise InputError(f"drafts are for one text and need the cache; this call has {rows} rows")
    if assistant is None:
        return
    if not isinstance(getattr(assistant, "config", None), GPTNeoConfig):
        raise InputError(f"assistant_model is a {type(assistant).__name__}; give a GPTNeoForCausalLM")
    if (other := assistant.config.vocab_size) != config.vocab_size:
        raise InputError(
            f"assistant_model has a vocabulary of {other} tokens, this model one of {config.vocab_size}; they must share a "
            "tokenizer"
        )
    if (held := assistant.config.max_position_embeddings) < total - 1:
        raise InputError(
            f"prompt and continuation come to {total} tokens and assistant_model has {held} positions; "
            "ask for fewer new tokens, or leave it out"
        )


def new_tokens(model: LanguageModel, request: Request) -> Iterator[Tensor]:
    """New tokens [rows, n] as they are found, on the device or the host, by the strategy that the request asks for;
    `last_generation` tells which. The caller's cache is first touched here."""
    cache, rows = request.prompt.cache, len(request.prompt.ids)
    if isinstance(cache, KVCache) and cache.batch_size != rows:
        cache.batch_repeat_interleave(rows // cache.batch_size)
    if request.options.num_beams > 1:
        model.last_generation = Generation("stepwise", "beams run on the host")
        return beams(model, request)
    why = captured.why_not(model, request)
    if why is None:
        return captured.captured(model, request)  # says itself whether the steps could be captured
    model.last_generation = Generation("stepwise", why)
    return (assisted if request.drafts else stepwise)(model, request)


def complete(model: LanguageModel, request: Request, streamer: Any = None) -> Tensor:
    """All new tokens int64 [rows, n] of a request, on its device; errors are those of its strategy."""
    steps = new_tokens(model, request)
    found = list(steps if streamer is None else _shown(request.prompt.ids, steps, streamer))
    ids = request.prompt.ids  # of beams there are more than texts
    return torch.cat(found, 1).to(ids.device) if found else ids[:, :0]


def _output(prompts: Tensor, new: Tensor, request: Request) -> Any:
    """The prompts as they were given [B, P], each with its continuations [rows, n], as the options want them."""
    record = request.record
    sequences = torch.cat([prompts.repeat_interleave(len(new) // len(prompts), 0), new], 1)
    if not request.options.return_dict_in_generate:
        return sequences
    if request.options.num_beams == 1:
        return GenerateDecoderOnlyOutput(sequences=sequences, **record.steps(), past_key_values=record.cache)
    return GenerateBeamDecoderOnlyOutput(
        sequences=sequences,
        sequences_scores=record.sequences_scores if request.options.output_scores else None,
        beam_indices=record.beam_indices,
        **record.steps(),
        past_key_values=record.cache,
    )


def _shown(ids: Tensor, steps: Iterator[Tensor], streamer: Any) -> Iterator[Tensor]:
    """The same steps, each shown to the streamer."""
    streamer.put(ids.cpu())
    for tokens in steps:
        streamer.put(tokens[:, 0].cpu() if tokens.shape[1] == 1 else tokens.cpu())
        yield tokens
    streamer.end()


@contextmanager
def _telling(streamer: Any) -> Iterator[None]:
    """Hand an error to the streamer, too, where it can take one: somebody may wait for it in another thread.

    Raises:
        InputError: no streamer.
    """
    if streamer is not None and not (hasattr(streamer, "put") and hasattr(streamer, "end")):
        raise InputError(f"streamer is {short(streamer)}; give an object with put(ids) and end()")
    try:
        yield
    except BaseException as error:
        if hasattr(streamer, "fail"):
            streamer.fail(error)
        raise


class _Guide:
    """Logits of the unconditional prompt, extended by what is generated. ids [B, T'] default to the prompts' last token."""

    def __init__(self, model: LanguageModel, prompt: Prompt, ids: Tensor | None, mask: Tensor | None, new: int) -> None:
        self.ids = (
            prompt.ids[:, -1:] if ids is None else check_ids("negative_prompt_ids", ids, model.config.vocab_size, model.device)
        )
        if len(self.ids) != len(prompt.ids):
            raise InputError(f"negative_prompt_ids has {len(self.ids)} rows, the input {len(prompt.ids)}")
        if mask is not None and tuple(mask.shape) != tuple(self.ids.shape):
            raise InputError(f"negative_prompt_attention_mask has shape {list(mask.shape)}, its ids {list(self.ids.shape)}")
        self.prompt, total = prompt.ids.shape[1], self.ids.shape[1] + new
        if total > (limit := model.config.max_position_embeddings):
            raise InputError(
                f"negative_prompt_ids has {self.ids.shape[1]} tokens and {new} new ones make {total}, past the model's {limit} "
                "positions; shorten it, or ask for fewer new tokens"
            )
        columns = torch.arange(self.ids.shape[1], device=self.ids.device).expand_as(self.ids)  # counted whatever the mask says
        places = None if mask is None else columns
        self._begin = functools.partial(Session, model, Prompt(self.ids, mask, position_ids=places), total, prepares=False)

    @functools.cached_property
    def session(self) -> Session:
        """Made where and when it is first used: its cache belongs there."""
        return self._begin()

    def __call__(self, input_ids: Tensor) -> Tensor:
        return self.session.feed(torch.cat([self.ids, input_ids[:, self.prompt :]], 1))[:, -1]
