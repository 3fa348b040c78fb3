"""FlaxGPTNeoForCausalLM: the language model in JAX, and its generate()."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ..errors import InputError, short
from ..generation.config import OFF, GenerationConfig, total_length
from ..models import causal as heads
from .decoding import Plan, beam_search, search
from .inputs import as_array, as_key, checked_ids, known
from .network import Traced
from .outputs import FlaxBeamSearchOutput, FlaxCausalLMOutput, FlaxGreedySearchOutput, FlaxOutput, FlaxSampleOutput
from .pretrained import FlaxGPTNeoPreTrainedModel
from .scores import Knobs, Processor, Rules

_TORCH_ONLY: dict[str, tuple[Any, ...]] = {  # option -> values, None aside, under which it does nothing
    **dict.fromkeys(("stop_strings", "max_time", "prompt_lookup_num_tokens", "prefill_chunk_size", "bad_words_ids"), ()),
    **dict.fromkeys(("sequence_bias", "exponential_decay_length_penalty", "top_h"), ()),
    **dict.fromkeys(("remove_invalid_values", "renormalize_logits", "output_scores", "output_logits"), (False,)),
    **dict.fromkeys(("output_attentions", "output_hidden_states"), (False,)),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff"), (0,)),
    **dict.fromkeys(("guidance_scale", "typical_p"), (1,)),
    "use_cache": (True,),
}


class FlaxGPTNeoForCausalLM(FlaxGPTNeoPreTrainedModel):
    """The language model in JAX: token ids to logits."""

    _causal = True
    _torch_class = heads.GPTNeoForCausalLM

    def _output(self, main: Array, traced: Traced) -> FlaxOutput:
        return FlaxCausalLMOutput(main, traced.cache, traced.hidden_states, traced.attentions)

    def generate(
        self,
        input_ids: Any,
        generation_config: GenerationConfig | None = None,
        prng_key: Array | None = None,
        trace: bool = True,
        params: Any = None,
        logits_processor: Processor | Sequence[Processor] | None = None,
        attention_mask: Any = None,
        **options: Any,
    ) -> FlaxGreedySearchOutput | FlaxSampleOutput | FlaxBeamSearchOutput:
        """Continuations of prompts: greedy, sampled or by beam search, in one program that is compiled for each shape.

        Args:
            input_ids: integer [B, T].
            generation_config: options under those of the call and above the model's own.
            prng_key: of the sampler; None for `jax.random.PRNGKey(seed)`, seed 0 where none is said.
            trace: False runs step by step without compiling, to look into.
            params: tree to use instead of the model's own.
            logits_processor: functions (sequences [B, length], scores [B, V], columns filled) -> scores that jax can
                trace; each is compiled in and may not be changed afterwards.
            attention_mask: [B, T], zero for padding on the left; None for none.
            options: of GenerationConfig: max_length, max_new_tokens, min_length, min_new_tokens, eos_token_id,
                pad_token_id, do_sample, temperature, top_k, top_p, min_p, num_beams, num_return_sequences,
                length_penalty, early_stopping, repetition_penalty, no_repeat_ngram_size, forced_bos_token_id,
                forced_eos_token_id, suppress_tokens, begin_suppress_tokens, seed.

        Returns:
            An output whose `sequences` are int32 [B * num_return_sequences, length], of full length and filled with the
            padding id; `scores` besides, of beams.

        Raises:
            InputError: an option or a prompt out of range, or an option that only GPTNeoForCausalLM has.
            UnknownOptionError: no such option; names the nearest.
        """
        full = self._options(generation_config, options)
        ids = checked_ids("input_ids", input_ids, self.config.vocab_size)
        mask = None if attention_mask is None else _checked_mask(attention_mask, ids.shape)
        length = total_length(full, ids.shape[1], self.config.max_position_embeddings)
        sampled = full.do_sample and full.num_beams == 1
        if length == ids.shape[1]:  # max_new_tokens=0
            return (FlaxSampleOutput if sampled else FlaxGreedySearchOutput)(ids)
        plan = Plan(
            length,
            0 if full.pad_id is None else full.pad_id,
            _rules(full, ids.shape[1], _as_tuple(logits_processor)),
            sampled,
            full.num_beams,
            full.num_return_sequences,
            full.early_stopping,
        )
        knobs = Knobs(full.repetition_penalty, full.temperature or 1.0, full.top_p, full.min_p or 0.0, full.length_penalty)
        tree: Any = self._tree(params)
        key = jax.random.PRNGKey(full.seed or 0) if prng_key is None else as_key("prng_key", prng_key)
        with nullcontext() if trace else jax.disable_jit():
            if full.num_beams > 1:
                return FlaxBeamSearchOutput(*beam_search(tree, ids, mask, knobs, spec=self._spec, plan=plan))
            if full.num_return_sequences > 1:
                ids = jnp.repeat(ids, full.num_return_sequences, axis=0)
                mask = None if mask is None else jnp.repeat(mask, full.num_return_sequences, axis=0)
            sequences = search(tree, ids, mask, key, knobs, spec=self._spec, plan=plan)
        return FlaxSampleOutput(sequences) if sampled else FlaxGreedySearchOutput(sequences)

    def _options(self, generation_config: GenerationConfig | None, options: dict[str, Any]) -> Any:
        """Every option with its value, those of the call before those of the config before those of the model."""
        if generation_config is not None and not hasattr(generation_config, "to_dict"):
            raise InputError(
                f"generation_config is {short(generation_config)}; give a GenerationConfig, or options as keywords"
            )
        own = self.generation_config or GenerationConfig()
        full = (own.under(generation_config) if generation_config else own).under(GenerationConfig.of(options))
        for name, value in options.items():
            if value is None and name in vars(full) and name not in ("max_length", "max_new_tokens"):
                setattr(full, name, OFF.get(name))  # None in a call switches off what another source says
        for name, neutral in _TORCH_ONLY.items():
            value = getattr(full, name)
            if value is not None and value not in neutral:
                raise InputError(f"{name}={short(value)} is not offered in Flax; GPTNeoForCausalLM has it")
        full = full.resolved()
        if full.do_sample and full.num_beams > 1:
            raise InputError(
                f"do_sample=True with num_beams={full.num_beams} is not offered in Flax; GPTNeoForCausalLM has beam sampling"
            )
        return full


def _rules(full: Any, prompt: int, custom: tuple[Processor, ...]) -> Rules:
    forced_eos = full.forced_eos_token_id
    least = full.min_length if full.min_new_tokens is None else prompt + full.min_new_tokens
    return Rules(
        repetition_penalty=full.repetition_penalty != 1,
        min_length=least if least > prompt else 0,
        eos=tuple(full.eos_ids),
        forced_bos=full.forced_bos_token_id,
        forced_eos=() if forced_eos is None else tuple(forced_eos) if isinstance(forced_eos, list) else (forced_eos,),
        suppress=tuple(full.suppress_tokens or ()),
        begin_suppress=tuple(full.begin_suppress_tokens or ()),
        begin=prompt if prompt > 1 or full.forced_bos_token_id is None else prompt + 1,
        ngram=full.no_repeat_ngram_size,
        custom=custom,
        temperature=full.do_sample and full.temperature != 1,
        top_k=full.top_k if full.do_sample else 0,
        top_p=full.do_sample and full.top_p < 1,
        min_p=full.do_sample and bool(full.min_p),
    )


def _as_tuple(processors: Processor | Sequence[Processor] | None) -> tuple[Processor, ...]:
    if processors is None:
        return ()
    found = tuple(processors) if isinstance(processors, Sequence) else (processors,)
    for one in found:
        if not callable(one):
            raise InputError(f"logits_processor holds a {type(one).__name__}; give functions of (sequences, scores, columns)")
    return found


def _checked_mask(mask: Any, shape: tuple[int, ...]) -> Array:
    found = as_array("attention_mask", mask)
    if found.shape != shape:
        raise InputError(f"attention_mask has shape {list(found.shape)}; expected {list(shape)}, that of input_ids")
    if known(found):
        values = np.asarray(found) != 0
        if (empty := np.flatnonzero(~values.any(1))).size:
            raise InputError(f"row {empty[0]} of attention_mask is all zero; give each prompt a token")
        if (right := np.flatnonzero(~values[:, -1])).size:
            raise InputError(f"row {right[0]} of attention_mask ends in padding; pad prompts on the left to continue them")
    return found
