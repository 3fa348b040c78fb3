"""Which values the options of `generate` may have, alone and together, and what is not offered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ..config import is_int, is_number
from ..errors import InputError, short

_BEAMS = "use num_beams, with do_sample=True for variety"
_BOUNDED = "leave it out, the cache is bounded at the window and needs no choice"
_CONSTRAIN = "use prefix_allowed_tokens_fn or a logits_processor"
_ASSIST = "use assistant_model or prompt_lookup_num_tokens"

# Options of transformers that are not offered -> (values under which they do nothing, what to use instead)
NOT_OFFERED: dict[str, tuple[tuple[Any, ...], str]] = {
    "watermarking_config": ((), "watermark with a logits_processor"),
    "num_beam_groups": ((1,), _BEAMS),
    "diversity_penalty": ((0,), _BEAMS),
    "penalty_alpha": ((0,), "contrastive search was found no better than sampling; use top_p or typical_p"),
    "dola_layers": ((), "use repetition_penalty against repetition"),
    "constraints": ((), _CONSTRAIN),
    "force_words_ids": ((), _CONSTRAIN),
    "low_memory": ((False,), "use fewer beams"),
    "token_healing": ((False,), "end the prompt at a word's end"),
    "cache_implementation": (("dynamic",), _BOUNDED),
    "cache_config": ((), _BOUNDED),
    "max_cache_len": ((), _BOUNDED),
    "encoder_repetition_penalty": ((1,), "use repetition_penalty or a logits_processor"),
    "encoder_no_repeat_ngram_size": ((0,), "use no_repeat_ngram_size or a logits_processor"),
    "decoder_start_token_id": ((), "begin the prompt with the token"),
    "assistant_early_exit": ((), _ASSIST),
    "assistant_ensemble_weight": ((), "drafts are verified exactly"),
    "assistant_tokenizer": ((), "use an assistant_model with the same tokenizer"),
    "assistant_lookbehind": ((10,), "use an assistant_model with the same tokenizer"),
    "target_lookbehind": ((10,), "use an assistant_model with the same tokenizer"),
    "use_mtp": ((False,), _ASSIST),
    "speculation_type": ((), _ASSIST),
    "is_assistant": ((False,), "pass the model as assistant_model of another's generate"),
    "synced_gpus": ((False,), "run one process for each GPU, without sharding"),
    "custom_generate": ((), "call your function with the model"),
    "trust_remote_code": ((False, True), ""),
    "continuous_batching_config": ((), "use generate_text with a list of prompts"),
    "compile_config": ((), "leave it out"),
    "disable_compile": ((False, True), ""),
}


def _ids(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(is_int(i) and 0 <= i < 2**31 for i in value)


def _biases(value: Any) -> bool:
    pairs = value.items() if isinstance(value, dict) else value
    try:
        return len(value) > 0 and all(_ids(ids) and (is_number(bias) or bias == float("-inf")) for ids, bias in pairs)
    except (TypeError, ValueError):
        return False


def _stops(value: Any) -> bool:
    texts = [value] if isinstance(value, str) else value
    return (
        isinstance(texts, (list, tuple))
        and 0 < len(texts) <= 256
        and all(isinstance(t, str) and 0 < len(t) <= 4096 for t in texts)
    )


_Rule = tuple[Callable[[Any], bool], str]
_flag: _Rule = (lambda v: isinstance(v, bool), "True or False")
_count: _Rule = (lambda v: is_int(v) and 0 <= v < 2**31, "an integer from 0")
_positive: _Rule = (lambda v: is_int(v) and 1 <= v < 2**31, "an integer from 1")
_beams: _Rule = (lambda v: is_int(v) and 1 <= v <= 4096, "an integer from 1 to 4096")
_texts: _Rule = (lambda v: is_int(v) and 1 <= v <= 2**20, f"an integer from 1 to {2**20}")
_rate: _Rule = (lambda v: is_number(v) and 0 <= v <= 1, "a number from 0 to 1")
_above_0: _Rule = (lambda v: is_number(v) and v > 0, "a finite number above 0")
_cutoff: _Rule = (lambda v: is_number(v) and 0 <= v < 1, "a number from 0 to below 1")
_token: _Rule = (lambda v: is_int(v) and abs(v) < 2**31, "a token id")
_tokens: _Rule = (
    lambda v: _token[0](v) or (isinstance(v, list) and len(v) > 0 and all(map(_token[0], v))),
    "one or several ids",
)
_id_list: _Rule = (_ids, "a list of token ids")

_RULES: dict[str, _Rule] = {
    **dict.fromkeys(("max_length", "max_new_tokens", "min_length", "min_new_tokens", "no_repeat_ngram_size"), _count),
    "num_beams": _beams,
    "num_return_sequences": _texts,
    **dict.fromkeys(("prompt_lookup_num_tokens", "max_matching_ngram_size"), _positive),
    **dict.fromkeys(("num_assistant_tokens", "prefill_chunk_size"), _positive),
    **dict.fromkeys(
        ("do_sample", "use_cache", "remove_invalid_values", "renormalize_logits", "return_dict_in_generate"), _flag
    ),
    **dict.fromkeys(("output_scores", "output_logits", "output_attentions", "output_hidden_states"), _flag),
    **dict.fromkeys(("top_p", "min_p", "assistant_confidence_threshold"), _rate),
    **dict.fromkeys(("repetition_penalty", "guidance_scale", "max_time"), _above_0),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff"), _cutoff),
    **dict.fromkeys(("typical_p", "top_h"), (lambda v: is_number(v) and 0 < v <= 1, "a number above 0 and up to 1")),
    **dict.fromkeys(("bos_token_id", "pad_token_id", "forced_bos_token_id"), _token),
    **dict.fromkeys(("eos_token_id", "forced_eos_token_id"), _tokens),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens"), _id_list),
    "temperature": (lambda v: is_number(v) and v >= 0, "a finite number from 0 (0 is greedy)"),
    "top_k": (lambda v: is_int(v) and v >= 0, "an integer from 0 (0 keeps all tokens)"),
    "length_penalty": (lambda v: is_number(v) and abs(v) <= 50, "a number from -50 to 50"),  # the length ** 50 is a float
    "seed": (lambda v: is_int(v) and 0 <= v < 2**64, "an integer from 0 to 2**64 - 1"),
    "early_stopping": (lambda v: isinstance(v, bool) or v == "never", "True, False or 'never'"),
    "stop_strings": (_stops, "a string or up to 256 of them, each of 1 to 4096 characters"),
    "bad_words_ids": (lambda v: isinstance(v, list) and len(v) > 0 and all(map(_ids, v)), "a list of lists of token ids"),
    "sequence_bias": (_biases, "a dict from tuples of token ids to numbers, or a list of [ids, number]"),
    "exponential_decay_length_penalty": (
        lambda v: isinstance(v, (list, tuple)) and len(v) == 2 and is_int(v[0]) and v[0] >= 0 and _above_0[0](v[1]),
        "(tokens, factor), an integer from 0 and a number above 0",
    ),
    "num_assistant_tokens_schedule": (
        lambda v: v in ("constant", "heuristic", "heuristic_transient"),
        "'constant', 'heuristic' or 'heuristic_transient'",
    ),
}


# Option -> the value under which it says nothing
_SAMPLING = {
    "temperature": 1,
    "top_p": 1,
    "min_p": None,
    "top_h": None,
    "typical_p": 1,
    "top_k": 50,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
}
_BEAMING = {"early_stopping": False, "length_penalty": 1}
OUTPUTS = dict.fromkeys(("output_attentions", "output_hidden_states", "output_scores", "output_logits"), False)


def plain(value: Any) -> Any:
    """A value as Python's own: of numpy and tensors their numbers, of tuples lists."""
    if isinstance(value, (torch.Tensor, np.generic, np.ndarray)):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value


def check_option(name: str, value: Any) -> None:
    """Refuse a value out of range; None is always legal.

    Raises:
        InputError: names option, value and range.
    """
    if value is None:
        return
    good, wanted = _RULES[name]
    if not good(value):
        raise InputError(f"{name}={short(value)} is not {wanted}")


def check_offered(name: str, value: Any) -> None:
    """Refuse a value under which an option that is not offered would do something.

    Raises:
        InputError: names option and value, and what to use instead.
    """
    neutral, instead = NOT_OFFERED[name]
    if value is not None and value not in neutral:
        raise InputError(f"{name}={short(value)} is not offered: {instead}")


def contradictions(options: Any) -> list[str]:
    """What has no say beside the other options of a config, a sentence each; the rules are transformers'."""
    sets = (
        (_SAMPLING, bool(options.do_sample), "do_sample=True"),
        (_BEAMING, options.num_beams not in (None, 1), "num_beams above 1"),
        (OUTPUTS, bool(options.return_dict_in_generate), "return_dict_in_generate=True"),
    )
    return [
        f"{name}={short(getattr(options, name))} has a say only with {wanted}; set that, or leave {name} out"
        for neutral, held, wanted in sets
        for name, nothing in neutral.items()
        if not held and getattr(options, name) not in (None, nothing)
    ]


def check_together(options: Any) -> None:
    """Refuse options that contradict each other.

    Raises:
        InputError: names both.
    """
    beams, returned = options.num_beams, options.num_return_sequences
    if returned > 1 and beams == 1 and not options.do_sample:
        raise InputError(
            f"num_return_sequences={returned} needs do_sample=True or num_beams of at least {returned}: greedy has one result"
        )
    if returned > beams > 1:
        raise InputError(f"num_return_sequences={returned} exceeds num_beams={beams}")
    if beams > 1 and options.prompt_lookup_num_tokens is not None:
        raise InputError(f"prompt_lookup_num_tokens does not go with num_beams={beams}; leave one out")
    suppressed = set(options.suppress_tokens or ())
    for name in ("forced_bos_token_id", "forced_eos_token_id"):
        forced = getattr(options, name)
        if forced is not None and suppressed.issuperset(forced if isinstance(forced, list) else [forced]):
            raise InputError(f"{name}={forced} is in suppress_tokens, too, which leaves no token; take it out of one")
