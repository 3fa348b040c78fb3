"""Which values the fields of a configuration may have, alone and together."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ..errors import short

GELU_NEW = ("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh")  # names of one function, which kernels and flax compute
ACTIVATIONS = (  # names that transformers gives; `network.activations` computes them
    "gelu_new gelu_pytorch_tanh gelu_python_tanh gelu gelu_python gelu_10 gelu_fast gelu_accurate quick_gelu laplace relu "
    "relu2 relu6 leaky_relu prelu hardswish linear mish sigmoid silu swish sqrtsoftplus tanh xielu"
).split()
LIMITS = {  # field -> largest value that is not a mistake
    "vocab_size": 2**24,
    "max_position_embeddings": 2**20,
    "hidden_size": 2**17,
    "num_layers": 256,  # the largest GPT-Neo has 32
    "num_heads": 2**12,
    "intermediate_size": 2**20,
    "window_size": 2**31 - 1,
}
_DTYPES = (None, "float32", "float16", "bfloat16", "float64")
_PROBLEM_TYPES = (None, "regression", "single_label_classification", "multi_label_classification")
SHAPE = frozenset(  # fields that the modules of a model are built from, and do not read again
    "hidden_size num_heads intermediate_size window_size activation_function layer_norm_epsilon".split()
)
GENERATION = frozenset(  # names of generation's settings, which a config.json of old may hold
    (
        "max_length max_new_tokens min_length min_new_tokens stop_strings max_time early_stopping do_sample num_beams "
        "num_return_sequences prompt_lookup_num_tokens max_matching_ngram_size num_assistant_tokens "
        "num_assistant_tokens_schedule assistant_confidence_threshold prefill_chunk_size guidance_scale sequence_bias "
        "repetition_penalty no_repeat_ngram_size bad_words_ids forced_bos_token_id forced_eos_token_id "
        "remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens temperature top_h top_k "
        "top_p min_p typical_p epsilon_cutoff eta_cutoff renormalize_logits length_penalty seed return_dict_in_generate "
        "output_scores output_logits"
    ).split()
)
NOT_KEPT = ("model_type", "transformers_version")  # of a config.json that is saved again
_FLAGS = frozenset(["use_cache", "tie_word_embeddings", "output_attentions", "output_hidden_states", "return_dict"])
_RATES = frozenset(["resid_dropout", "embed_dropout", "attention_dropout", "classifier_dropout"])


def is_int(value: Any) -> bool:
    """An integer that is no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """A finite number that is no bool."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


def fault_of(name: str, value: Any) -> str | None:
    """What is wrong with one value, or None."""
    if name in LIMITS:
        if name == "intermediate_size" and value is None:
            return None
        if not is_int(value) or not 0 < value <= LIMITS[name]:
            return f"{name} {short(value)} is not an integer from 1 to {LIMITS[name]}"
    elif name in _FLAGS and not isinstance(value, bool):
        return f"{name} {short(value)} is not true or false"
    elif name in _RATES and not (is_number(value) and 0 <= value <= 1):
        return f"{name} {short(value)} is not a probability from 0 to 1"
    elif name == "layer_norm_epsilon" and not (is_number(value) and value > 0):
        return f"{name} {short(value)} is not a positive finite number"
    elif name == "initializer_range" and not (is_number(value) and value >= 0):
        return f"{name} {short(value)} is not a finite number from 0"
    elif name in ("bos_token_id", "pad_token_id", "eos_token_id"):
        ids = value if isinstance(value, list) and name == "eos_token_id" else [value]
        if value is not None and not all(is_int(i) and -(2**31) < i < 2**31 for i in ids):
            return f"{name} {short(value)} is not a token id"
    elif name == "activation_function" and value not in ACTIVATIONS:
        return f"activation_function {short(value)} is unknown; use one of {', '.join(ACTIVATIONS)}"
    elif name == "attention_layers":
        if not isinstance(value, (list, tuple)):
            return f"attention_layers {short(value)} is not a list"
        if unknown := [kind for kind in value if kind not in ("global", "local")]:
            return f"attention type {short(unknown[0])} is unknown; use 'global' or 'local'"
    elif name == "dtype" and value not in _DTYPES:
        return f"dtype {short(value)} is unknown; use one of {', '.join(_DTYPES[1:])}"
    elif name == "problem_type" and value not in _PROBLEM_TYPES:
        return f"problem_type {short(value)} is unknown; use one of {_PROBLEM_TYPES[1:]}"
    return None


def structure_faults(config: Any) -> list[str]:
    """Faults between fields, of those that are right by themselves."""
    faults = []
    right = {name for name in ("hidden_size", "num_heads", "num_layers") if fault_of(name, getattr(config, name)) is None}
    if {"hidden_size", "num_heads"} <= right and config.hidden_size % config.num_heads:
        faults.append(
            f"hidden_size {config.hidden_size} is not a multiple of num_heads {config.num_heads} "
            "(head_dim = hidden_size / num_heads)"
        )
    if "num_layers" in right and len(config.attention_layers) != config.num_layers:
        faults.append(
            f"num_layers {config.num_layers} and {len(config.attention_layers)} attention layers "
            f"(attention_types {short(config.attention_types)}) differ: sum(repeats * len(pattern)) = num_layers"
        )
    return faults


def instead_of_config(folder: Path | None) -> str:
    """What a folder is that holds no config.json, and the way out, for an error."""
    if folder is not None and (folder / "adapter_config.json").is_file():
        return "it is an adapter of peft: load the model that it was trained on, then PeftModel.from_pretrained(model, folder)"
    if folder is not None and (folder / "training_args.bin").is_file():
        return (
            "transformers' Trainer wrote it and did not know the model as a PreTrainedModel, as where it was wrapped: give "
            "from_pretrained config=, that of the model that was trained"
        )
    return (
        "a GPT-Neo checkpoint is config.json, weights (model.safetensors or pytorch_model.bin) and a tokenizer "
        "(tokenizer.json, or vocab.json and merges.txt)"
    )


def expanded_types(types: Any) -> list[Any] | None:
    """The layers that patterns with their repeats stand for; None where they stand for none."""
    layers: list[Any] = []
    for entry in types if isinstance(types, (list, tuple)) else [None]:
        if not isinstance(entry, (list, tuple)) or len(entry) != 2:
            return None
        kinds, repeats = entry
        if not isinstance(kinds, (list, tuple)) or not is_int(repeats) or not 0 <= repeats <= LIMITS["num_layers"]:
            return None
        if len(layers) + len(kinds) * repeats > LIMITS["num_layers"]:
            return None
        layers += list(kinds) * repeats
    return layers


def as_list(value: Any, name: str, faults: list[str]) -> list[Any]:
    """A value as a list, which may be None for an empty one; what else it is is a fault."""
    if isinstance(value, (list, tuple)):
        return list(value)
    if value is not None:
        faults.append(f"{name} {short(value)} is not a list")
    return []
