"""GenerationConfig: the options of `generate`, where each comes from, and which values they may have."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import GPTNeoConfig
from ..errors import ConfigError, InputError, UnknownOptionError, nearest
from ..hub import Source
from ..jsonfile import read_object

NEW_TOKENS = 20  # where no length is given

# Options of transformers that this version does not run, with the values under which they do nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(
        (
            "assistant_confidence_threshold assistant_early_exit assistant_ensemble_weight assistant_lookbehind "
            "assistant_model bad_words_ids begin_suppress_tokens cache_config cache_implementation compile_config "
            "constraints continuous_batching_config decoder_start_token_id disable_compile dola_layers "
            "early_stopping encoder_no_repeat_ngram_size encoder_repetition_penalty eta_cutoff epsilon_cutoff "
            "exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id force_words_ids "
            "guidance_scale is_assistant length_penalty logits_processor low_memory max_cache_len "
            "max_matching_ngram_size max_time min_length min_new_tokens min_p no_repeat_ngram_size "
            "num_assistant_tokens num_assistant_tokens_schedule num_beams num_beam_groups num_return_sequences "
            "output_attentions output_hidden_states output_logits output_scores penalty_alpha prefill_chunk_size "
            "prefix_allowed_tokens_fn prompt_lookup_num_tokens remove_invalid_values renormalize_logits "
            "repetition_penalty return_dict_in_generate sequence_bias speculation_type stop_strings "
            "stopping_criteria streamer suppress_tokens synced_gpus target_lookbehind token_healing top_h "
            "typical_p use_mtp watermarking_config diversity_penalty"
        ).split(),
        (None, False, 0),
    ),
    **dict.fromkeys(
        (
            "encoder_repetition_penalty length_penalty num_beams num_beam_groups num_return_sequences "
            "repetition_penalty typical_p guidance_scale"
        ).split(),
        (None, 1),
    ),
    "num_assistant_tokens": (None, 20),
    "num_assistant_tokens_schedule": (None, "constant"),
    "assistant_confidence_threshold": (None, 0.4),
    "assistant_lookbehind": (None, 10),
    "target_lookbehind": (None, 10),
}
_META = ("_from_model_config", "transformers_version")


@dataclass(kw_only=True)
class GenerationConfig:
    """Options of `generate`; None for "not said", so that the next source is asked.

    Keywords of a call win over a config that is passed, that one over the model's `generation_config`, and that one over
    the defaults given here.
    """

    max_length: int | None = None  # tokens of prompt and continuation together
    max_new_tokens: int | None = None  # tokens of the continuation; wins over max_length. Neither: 20 new tokens
    do_sample: bool | None = None  # False: the likeliest token
    temperature: float | None = None  # 1.0; 0 is greedy
    top_k: int | None = None  # 50; 0 for all tokens. Only when sampling, as are temperature and top_p
    top_p: float | None = None  # 1.0
    use_cache: bool | None = None  # True
    bos_token_id: int | None = None  # what an empty prompt begins with
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None  # fills finished rows; the first eos where there is none
    seed: int | None = None  # of the sampler; None draws from torch's global generator

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check(field.name, getattr(self, field.name))

    @classmethod
    def of(cls, values: dict[str, Any]) -> GenerationConfig:
        """A config from keywords.

        Raises:
            UnknownOptionError: no such option; names the nearest.
            InputError: an option that this version does not run, or a value out of range.
        """
        names = [f.name for f in dataclasses.fields(cls)]
        for name, value in values.items():
            if name in _NEUTRAL:
                if not any(value is n or (n is not None and value == n) for n in _NEUTRAL[name]):
                    raise InputError(f"{name}={value!r} is not offered in this version; leave it out")
            elif name not in names and name not in _META:
                raise UnknownOptionError(f"generate has no option {name!r}{nearest(name, [*names, *_NEUTRAL])}")
        return cls(**{k: v for k, v in values.items() if k in names})

    @classmethod
    def from_model_config(cls, config: GPTNeoConfig) -> GenerationConfig:
        """The token ids of a model's configuration."""
        return cls(bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id)

    @classmethod
    def from_source(cls, source: Source, config: GPTNeoConfig) -> GenerationConfig:
        """The `generation_config.json` of a folder or repository, or what the model's configuration says."""
        path = source.file("generation_config.json")
        if path is None:
            return cls.from_model_config(config)
        values = read_object(path, ConfigError)
        try:
            return cls.of({k: v for k, v in values.items() if v is not None})
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{path}: {error}") from error

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike[str], **options: Any) -> GenerationConfig:
        """The `generation_config.json` of a folder or hub id."""
        source = Source.of(name_or_path, **options)
        return cls.from_source(source, GPTNeoConfig.from_source(source))

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write `generation_config.json` into `folder`."""
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"
        (Path(folder) / "generation_config.json").write_text(text, encoding="utf-8")

    def to_dict(self) -> dict[str, Any]:
        """The options that are said."""
        return {k: v for k, v in dataclasses.asdict(self).items() if v is not None}

    def under(self, stronger: GenerationConfig) -> GenerationConfig:
        """This config where `stronger` says nothing, else that one."""
        values = self.to_dict() | stronger.to_dict()
        if stronger.max_length is not None and stronger.max_new_tokens is None:
            values.pop("max_new_tokens", None)  # a length said in a call beats the other kind from a file
        return GenerationConfig(**values)

    @property
    def eos_ids(self) -> list[int]:
        """End-of-text ids; empty for none."""
        if self.eos_token_id is None:
            return []
        return self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id]

    @property
    def pad_id(self) -> int | None:
        """What fills finished rows."""
        return self.pad_token_id if self.pad_token_id is not None else next(iter(self.eos_ids), None)

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn; temperature 0 is greedy."""
        return bool(self.do_sample) and self.temperature != 0


def total_length(options: GenerationConfig, prompt: int, limit: int) -> int:
    """Columns of prompt and continuation together.

    Raises:
        InputError: prompt and continuation exceed the model's positions, or max_length leaves nothing to generate.
    """
    if options.max_new_tokens is not None:
        total = prompt + options.max_new_tokens
        asked = f"max_new_tokens {options.max_new_tokens}"
    elif options.max_length is not None:
        total, asked = options.max_length, f"max_length {options.max_length}"
        if total <= prompt:
            raise InputError(f"the prompt has {prompt} tokens and max_length is {total}; raise it or use max_new_tokens")
    else:
        return max(prompt, min(prompt + NEW_TOKENS, limit))
    if total > limit:
        raise InputError(
            f"the prompt has {prompt} tokens and {asked} makes {total}, past the model's {limit} positions; "
            f"ask for at most {max(0, limit - prompt)} new tokens or shorten the prompt"
        )
    return total


def _check(name: str, value: Any) -> None:
    """Refuse a value out of range.

    Raises:
        InputError: names option, value and range.
    """
    if value is None:
        return
    is_int = isinstance(value, int) and not isinstance(value, bool)
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if name in ("max_length", "max_new_tokens"):
        good, wanted = is_int and 0 <= value < 2**31, "an integer from 0"
    elif name in ("do_sample", "use_cache"):
        good, wanted = isinstance(value, bool), "True or False"
    elif name == "temperature":
        good, wanted = number and value >= 0, "a finite number from 0 (0 is greedy)"
    elif name == "top_k":
        good, wanted = is_int and value >= 0, "an integer from 0 (0 keeps all tokens)"
    elif name == "top_p":
        good, wanted = number and 0 <= value <= 1, "a number from 0 to 1"
    elif name == "seed":
        good, wanted = is_int and 0 <= value < 2**64, "an integer from 0 to 2**64 - 1"
    else:
        ids = value if isinstance(value, list) and name == "eos_token_id" else [value]
        good = all(isinstance(i, int) and not isinstance(i, bool) for i in ids)
        wanted = "a token id"
    if not good:
        raise InputError(f"{name}={value!r} is not {wanted}")
