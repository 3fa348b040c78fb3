"""GenerationConfig: the options of `generate` and where each comes from; Options: all of them, settled."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, Self

from ..config import GENERATION, GPTNeoConfig
from ..errors import ConfigError, InputError, UnknownOptionError, nearest, short, warn_once
from ..files import atomic
from ..files.hub import Source
from ..files.strict_json import read_object
from .options import NOT_OFFERED, OUTPUTS, check_offered, check_option, check_together, contradictions, plain

FILE = "generation_config.json"
NEW_TOKENS = 20  # where no length is given
OFF = {"top_k": 0}  # what does nothing, where the default does something
_METADATA = ("transformers_version", "_from_model_config", "_commit_hash")  # of files that transformers wrote; no options
_ARGUMENTS = (  # of `generate`, which a config cannot hold
    "logits_processor stopping_criteria prefix_allowed_tokens_fn assistant_model streamer negative_prompt_ids "
    "negative_prompt_attention_mask"
).split()


class GenerationMode(StrEnum):
    """Ways to generate, under transformers' names."""

    GREEDY_SEARCH = "greedy_search"
    SAMPLE = "sample"
    ASSISTED_GENERATION = "assisted_generation"
    BEAM_SEARCH = "beam_search"
    BEAM_SAMPLE = "beam_sample"


@dataclass(init=False)
class GenerationConfig:
    """Options of `generate`; None for "not said", so that the next source is asked.

    Keywords of a call win over a config that is passed, that one over the model's `generation_config`, and that one over
    the defaults, which stand in brackets here. Options of transformers that are not offered are None, and may be set to what
    does nothing.

    Raises:
        InputError: a value out of range, or an option that is not offered, with what to use instead.
        UnknownOptionError: no such option; names the nearest.
    """

    # Length, in tokens
    max_length: int | None = None  # prompt and continuation together
    max_new_tokens: int | None = None  # continuation; wins over max_length. Neither: 20 new tokens
    min_length: int | None = None  # no end token before so many, prompt included [0]
    min_new_tokens: int | None = None  # the same without the prompt; wins over min_length
    # Stopping
    eos_token_id: int | list[int] | None = None
    stop_strings: str | list[str] | None = None  # end once a text ends in one of these
    max_time: float | None = None  # seconds
    early_stopping: bool | Literal["never"] | None = None  # of beams: at num_beams finished ones; "never": exactly [False]
    # Strategy
    do_sample: bool | None = None  # False: the likeliest token [False]
    num_beams: int | None = None  # [1]
    num_return_sequences: int | None = None  # continuations of each prompt [1]
    prompt_lookup_num_tokens: int | None = None  # drafts copied from the text so far, of so many tokens
    max_matching_ngram_size: int | None = None  # how many tokens must agree to copy what followed them [2]
    num_assistant_tokens: int | None = None  # drafted by an assistant model a round [20]
    num_assistant_tokens_schedule: str | None = None  # "heuristic": more after a full match, else fewer ["constant"]
    assistant_confidence_threshold: float | None = None  # a draft ends at a token less likely than this [0.4]
    use_cache: bool | None = None  # [True]
    prefill_chunk_size: int | None = None  # tokens of the prompt that run at one time
    # What changes the scores, in the order in which it does
    guidance_scale: float | None = None  # classifier-free guidance against negative_prompt_ids
    sequence_bias: Any = None  # {tuple of ids: bias added to its last one} or [[ids, bias], ...]
    repetition_penalty: float | None = None  # scores of tokens seen before: divided, or multiplied where negative [1.0]
    no_repeat_ngram_size: int | None = None  # no run of so many tokens twice [0]
    bad_words_ids: list[list[int]] | None = None
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | list[int] | None = None
    remove_invalid_values: bool | None = None  # NaN and infinities become numbers
    exponential_decay_length_penalty: Any = None  # (tokens after which, factor): the end token's score grows
    suppress_tokens: list[int] | None = None
    begin_suppress_tokens: list[int] | None = None
    temperature: float | None = None  # from here on only when sampling; 0 is greedy [1.0]
    top_h: float | None = None
    top_k: int | None = None  # 0 for all tokens [50]
    top_p: float | None = None  # [1.0]
    min_p: float | None = None
    typical_p: float | None = None  # [1.0]
    epsilon_cutoff: float | None = None
    eta_cutoff: float | None = None
    renormalize_logits: bool | None = None
    length_penalty: float | None = None  # exponent of the length that a beam's log-probability is divided by [1.0]
    seed: int | None = None  # of the sampler; None draws from torch's global generator
    # Tokens and outputs
    bos_token_id: int | None = None  # what an empty prompt begins with
    pad_token_id: int | None = None  # fills finished rows; the first eos where there is none
    return_dict_in_generate: bool | None = None  # an output object instead of a tensor
    output_scores: bool | None = None  # scores of each step after processing, float32 [B, V]
    output_logits: bool | None = None  # the same before
    output_attentions: bool | None = None
    output_hidden_states: bool | None = None

    def __init__(self, **options: Any) -> None:
        for name, field in self.__dataclass_fields__.items():
            setattr(self, name, options.pop(name, field.default))
        for name, value in options.items():
            if name not in _METADATA:
                setattr(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        value = plain(value)
        if name in NOT_OFFERED:
            check_offered(name, value)
        elif name in self.__dataclass_fields__:
            check_option(name, value)
        elif name in _ARGUMENTS:
            raise UnknownOptionError(f"{name} is an argument of generate and no option; pass it there")
        else:
            raise UnknownOptionError(
                f"generate has no option {name!r}{nearest(name, [*self.__dataclass_fields__, *NOT_OFFERED])}"
            )
        object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> Any:
        if name in NOT_OFFERED:
            return None
        raise AttributeError(f"GenerationConfig has no option {name!r}{nearest(name, self.__dataclass_fields__)}")

    @classmethod
    def of(cls, values: dict[str, Any], ignore_unknown: bool = False) -> Self:
        """A config from keywords, without those that are no option where these are to be ignored."""
        names = cls.__dataclass_fields__.keys() | NOT_OFFERED
        return cls(**{k: v for k, v in values.items() if k in names or not ignore_unknown})

    @classmethod
    def like(cls, config: Any) -> GenerationConfig:
        """A config, or one of transformers as one of ours."""
        return config if isinstance(config, GenerationConfig) else cls().under(config)

    @classmethod
    def from_model_config(cls, config: GPTNeoConfig) -> Self:
        """The token ids of a model's configuration, and what a `config.json` of old says of generation; a warning names what of
        that is not offered.

        Raises:
            ConfigError: a value out of range.
        """
        said = {k: v for k, v in vars(config).items() if k in GENERATION and v is not None}
        said |= {k: getattr(config, k) for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
        if not config.use_cache:
            said["use_cache"] = False
        for name in ("output_attentions", "output_hidden_states"):
            if getattr(config, name):
                said[name] = True
        if any(said.get(name) for name in OUTPUTS):
            said["return_dict_in_generate"] = True
        for name in vars(config).keys() & NOT_OFFERED:
            try:
                check_offered(name, getattr(config, name))
            except InputError as error:
                warn_once(f"the configuration's {error}; it is left out")
        try:
            return cls(**said)._as_loaded()
        except InputError as error:
            raise ConfigError(f"what the configuration says of generation will not do: {error}") from None

    @classmethod
    def from_source(cls, source: Source, config: GPTNeoConfig | None = None, file: str = FILE) -> GenerationConfig:
        """The options in a `file` of a folder or repository, or what the model's configuration says; `config` is that one, None
        where it is to be read.

        Raises:
            ConfigError: neither is there, or a value out of range.
        """
        path = source.file(file)
        if path is None and file != FILE:
            raise ConfigError(f"{source.name!r} holds no {file} ({source.holdings()}); config_file_name names a file in it")
        if path is None:
            return cls.from_model_config(GPTNeoConfig.from_source(source) if config is None else config)
        with source.reading():
            values = read_object(path, ConfigError)
            try:
                return cls.of(values, ignore_unknown=True)._as_loaded()
            except (ValueError, TypeError) as error:
                raise ConfigError(f"{path}: {error}") from error

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name: str | os.PathLike[str], config_file_name: str | None = None, **options: Any
    ) -> GenerationConfig:
        """The `generation_config.json` of a folder or hub id, or where there is none what its `config.json` says of generation.

        Args:
            config_file_name: another file to read; config_name is the same.
            options: Source's (revision, token, ...), or options that win over the file's.
        """
        file = _file_name(config_file_name, options)
        source = Source.of(pretrained_model_name, **{k: options.pop(k) for k in Source.OPTIONS if k in options})
        return cls.from_source(source, file=file).under(cls.of(options))._as_loaded()

    @classmethod
    def from_dict(cls, values: dict[str, Any], **overrides: Any) -> GenerationConfig:
        """A config from the keys of a `generation_config.json`; keys that are no option are ignored."""
        return cls.of(values | overrides, ignore_unknown=True)

    def update(self, **values: Any) -> dict[str, Any]:
        """Set the options among `values`; returns the rest."""
        for name in list(values):
            if name in self.__dataclass_fields__:
                setattr(self, name, values.pop(name))
        return values

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], config_file_name: str | None = None, **others: Any
    ) -> None:
        """Write `generation_config.json`, or a file of another name, into a folder, which is made where it is missing.

        Args:
            others: config_name, another name of config_file_name.

        Raises:
            ConfigError: it cannot be written there; what was there still is.
            InputError: a name that is a path, another keyword, or options that contradict each other.
        """
        file = _file_name(config_file_name, others)
        if others:
            raise InputError(
                f"save_pretrained has no option {next(iter(others))!r}{nearest(next(iter(others)), ['config_file_name'])}"
            )
        atomic.write(save_directory, {file: self.file_text()}, ConfigError)

    def to_dict(self) -> dict[str, Any]:
        """The options that are said."""
        return {k: v for k, v in vars(self).items() if v is not None and not k.startswith("_")}

    to_diff_dict = to_dict  # what differs from a config that says nothing

    def file_text(self) -> str:
        """The text of `generation_config.json`, for a file that others read.

        Raises:
            InputError: options of which some have no say beside the others, unless they came from a file so.
        """
        if vars(self).get("_loaded") != self.to_dict():
            self.validate(strict=True)
        return self.to_json_string()

    def to_json_string(self) -> str:
        """The options that are said, as JSON."""
        values = self.to_dict()
        if isinstance(values.get("sequence_bias"), dict):
            values["sequence_bias"] = [[list(ids), bias] for ids, bias in values["sequence_bias"].items()]
        return json.dumps(values, indent=2, sort_keys=True) + "\n"

    def to_json_file(self, json_file_path: str | os.PathLike[str]) -> None:
        """Write `to_json_string` to a file, whole or not at all.

        Raises:
            ConfigError: it cannot be written there.
        """
        place = Path(json_file_path)
        atomic.write(place.parent, {place.name: self.to_json_string()}, ConfigError)

    def under(self, stronger: GenerationConfig) -> GenerationConfig:
        """This config where `stronger` says nothing, else that one."""
        values = self.to_dict() | {k: v for k, v in stronger.to_dict().items() if v is not None}  # transformers' says None, too
        if stronger.max_length is not None and stronger.max_new_tokens is None:
            values.pop("max_new_tokens", None)  # a length said in a call beats the other kind from a file
        return GenerationConfig(**values)

    def validate(self, strict: bool = False) -> None:
        """Warn of options that have no say beside the others.

        Args:
            strict: refuse them.

        Raises:
            InputError: options that `generate` would refuse together, or that have no say; names all of these.
        """
        self.resolved()
        if faults := contradictions(self):
            message = f"the generation config contradicts itself: {'; '.join(faults)}"
            if strict:
                raise InputError(message)
            warn_once(message)

    def get_generation_mode(self, assistant_model: Any = None) -> GenerationMode:
        """How `generate` goes on with these options, and an assistant model where there is one."""
        if self.num_beams not in (None, 1):
            return GenerationMode.BEAM_SAMPLE if self.do_sample else GenerationMode.BEAM_SEARCH
        if assistant_model is not None or self.prompt_lookup_num_tokens is not None:
            return GenerationMode.ASSISTED_GENERATION
        return GenerationMode.SAMPLE if self.do_sample else GenerationMode.GREEDY_SEARCH

    def _as_loaded(self) -> Self:
        """This config, which now is as a file has it."""
        object.__setattr__(self, "_loaded", self.to_dict())
        return self

    def resolved(self) -> Options:
        """This config with the defaults where nothing is said.

        Raises:
            InputError: options that contradict each other.
        """
        full = Options(**self.to_dict())
        if full.temperature == 0:
            full.do_sample = False
        check_together(full)
        return full

    @property
    def eos_ids(self) -> list[int]:
        """End-of-text ids; empty for none."""
        if self.eos_token_id is None:
            return []
        return list(dict.fromkeys(self.eos_token_id)) if isinstance(self.eos_token_id, list) else [self.eos_token_id]

    @property
    def pad_id(self) -> int | None:
        """What fills finished rows."""
        return self.pad_token_id if self.pad_token_id is not None else next(iter(self.eos_ids), None)

    @property
    def stops(self) -> list[str]:
        """Stop strings; empty for none."""
        return [self.stop_strings] if isinstance(self.stop_strings, str) else list(self.stop_strings or ())


@dataclass(init=False)
class Options(GenerationConfig):
    """A GenerationConfig in which all is said that a generation needs; the values here are the defaults."""

    min_length: int = 0
    early_stopping: bool | Literal["never"] = False
    do_sample: bool = False
    num_beams: int = 1
    num_return_sequences: int = 1
    max_matching_ngram_size: int = 2
    num_assistant_tokens: int = 20
    num_assistant_tokens_schedule: str = "constant"
    assistant_confidence_threshold: float = 0.4
    use_cache: bool = True
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    length_penalty: float = 1.0


def _file_name(name: str | None, options: dict[str, Any]) -> str:
    """The name of a file of options; takes `config_name`, another name of the argument, out of `options`."""
    name = name or options.pop("config_name", None) or FILE
    options.pop("config_name", None)
    if not isinstance(name, str) or os.path.basename(name) != name:
        raise InputError(f"config_file_name={short(name)} is not the name of a file in the folder, such as {FILE!r}")
    return name


def total_length(options: Options, prompt: int, limit: int) -> int:
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
    elif prompt >= limit:
        raise InputError(f"the prompt has {prompt} tokens and the model {limit} positions: nothing can follow; shorten it")
    else:
        return min(prompt + NEW_TOKENS, limit)
    if total > limit:
        raise InputError(
            f"the prompt has {prompt} tokens and {asked} makes {total}, past the model's {limit} positions; "
            f"ask for at most {max(0, limit - prompt)} new tokens or shorten the prompt"
        )
    return total
