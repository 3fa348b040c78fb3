"""GPTNeoConfig: parse, validate, aliases, and which values its fields may have. Every fault is reported at once."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ..errors import ConfigError, InputError, short
from .dtype import Dtype, name_of
from .files import ConfigFiles
from .rules import GENERATION, LIMITS, NOT_KEPT, SHAPE, as_list, expanded_types, fault_of, is_int, structure_faults


@dataclass(init=False)
class GPTNeoConfig(ConfigFiles):
    """What a GPT-Neo checkpoint says of itself, with the names and defaults of its `config.json`.

    The fields that shape the weights are read-only once built (`replace` makes another configuration); token ids, labels
    and flags may be set. `num_hidden_layers` and `num_attention_heads` are aliases.

    Raises:
        ConfigError: lists every fault of the values given.
    """

    model_type: ClassVar[str] = "gpt_neo"
    aliases: ClassVar[dict[str, str]] = {
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "torch_dtype": "dtype",
        "_name_or_path": "name_or_path",
    }
    is_encoder_decoder: ClassVar[bool] = False
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    sub_configs: ClassVar[dict[str, Any]] = {}
    _attn_implementation: ClassVar[str] = "eager"  # which libraries look up
    _commit_hash: ClassVar[str | None] = None  # which pipelines of transformers before 5.23 look up

    vocab_size: int = 50257
    max_position_embeddings: int = 2048
    hidden_size: int = 2048
    num_layers: int = 24
    attention_types: Any = None  # [[["global", "local"], 12]]: a pattern and its repeats
    attention_layers: tuple[str, ...] = ()  # "global" or "local" of each layer; from attention_types
    num_heads: int = 16
    intermediate_size: int | None = None  # None: 4 * hidden_size
    window_size: int = 256  # keys that a local query sees, itself included
    activation_function: str = "gelu_new"
    resid_dropout: float = 0.0
    embed_dropout: float = 0.0
    attention_dropout: float = 0.0
    classifier_dropout: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    use_cache: bool = True
    bos_token_id: int | None = 50256
    eos_token_id: int | list[int] | None = 50256
    pad_token_id: int | None = None
    tie_word_embeddings: bool = True
    id2label: Any = None  # dict[int, str]; None: two labels
    label2id: Any = None
    problem_type: Literal["regression", "single_label_classification", "multi_label_classification"] | None = None
    output_attentions: bool = False
    output_hidden_states: bool = False
    return_dict: bool = True
    architectures: list[str] | None = None
    dtype: Any = Dtype()  # noqa: RUF009 (a descriptor); of the checkpoint, torch's; set as that or by its name
    name_or_path: str = ""
    in_use: ClassVar[bool] = False  # True on the instance once a model is built of it

    def __init__(self, *, num_labels: int | None = None, **values: Any) -> None:
        given = _by_name(values)
        if (found := given.pop("model_type", self.model_type)) != self.model_type:
            raise ConfigError(f"model_type is {short(found)}; gptneo_fast runs 'gpt_neo' only")
        names = {f.name for f in dataclasses.fields(self)}
        for name in [k for k in given if k not in names]:
            _check_extra(name)
            self._keep(name, given[name])
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, given.get(field.name, field.default))
        faults: list[str] = []
        _fill(self, num_labels, faults)
        self.check(faults)

    def check(self, faults: Sequence[str] = ()) -> None:
        """Whether the fields go together, which those that were set one by one need not.

        Raises:
            ConfigError: lists every fault, those given among them.
        """
        faults = [*faults, *(m for f in dataclasses.fields(self) if (m := fault_of(f.name, vars(self)[f.name])))]
        faults += structure_faults(self)
        if faults:
            raise ConfigError("the configuration is not a GPT-Neo's: " + "; ".join(faults))

    def __setattr__(self, name: str, value: Any) -> None:
        name = self.aliases.get(name, name)
        if name == "num_labels":
            faults: list[str] = []
            _fill(self, value, faults)
            if faults:
                raise ConfigError(faults[0])
            return
        if name in SHAPE and self.in_use and value != getattr(self, name):
            raise ConfigError(
                f"{name} shapes the weights of a model that is built and cannot be set to {short(value)}; use "
                f"config.replace({name}=...) and build another"
            )
        if name in GENERATION and (value is not None or getattr(self, name, None) is not None):
            raise ConfigError(f"{name} is a setting of generation, ignored here; set model.generation_config.{name}")
        if name not in self.__dataclass_fields__:
            _check_extra(name)
        if name == "attention_layers":
            value = tuple(value) if isinstance(value, list) else value
        if fault := fault_of(name, name_of(value) if name == "dtype" else value):
            raise ConfigError(fault)
        object.__setattr__(self, name, value)
        faults = []
        if name == "attention_types":
            object.__setattr__(self, "attention_layers", ())
            _fill_attention(self, faults)
        elif name == "attention_layers":
            object.__setattr__(self, "attention_types", [[list(value), 1]])
        if faults:
            raise ConfigError(faults[0])

    def __getattr__(self, name: str) -> Any:
        if name in GPTNeoConfig.aliases:
            return getattr(self, GPTNeoConfig.aliases[name])
        raise AttributeError(f"GPTNeoConfig has no field {name!r}")

    def __contains__(self, name: object) -> bool:
        return name in self.to_dict() or name in self.aliases

    def __iter__(self) -> Iterator[str]:
        return iter(self.to_dict())

    def get(self, name: str, default: Any = None) -> Any:
        """A field by name, or the default where there is no such field."""
        return getattr(self, name, default)

    def update(self, values: dict[str, Any]) -> None:
        """Set several fields.

        Raises:
            ConfigError: a value out of range, or one that shapes the weights of a model that is built.
        """
        for name, value in values.items():
            setattr(self, name, value)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> GPTNeoConfig:
        """This configuration: a GPT-Neo has no other part than text."""
        return self

    @property
    def per_layer_config(self) -> list[GPTNeoConfig]:
        """This configuration for each layer, as caches of transformers ask for it."""
        return [self] * self.num_layers

    @property
    def use_return_dict(self) -> bool:
        """An old name of `return_dict`."""
        return self.return_dict

    @property
    def num_labels(self) -> int:
        """Labels of the classification heads: the length of `id2label`."""
        return len(self.id2label)

    @property
    def head_dim(self) -> int:
        """D: hidden_size / num_heads."""
        return self.hidden_size // self.num_heads

    @property
    def ffn_size(self) -> int:
        """F: intermediate_size, or four times the hidden size."""
        return self.intermediate_size or 4 * self.hidden_size

    def window(self, layer: int) -> int:
        """Keys that a query of this layer sees, itself included; 0 for all."""
        return self.window_size if self.attention_layers[layer] == "local" else 0

    def replace(self, **changes: Any) -> GPTNeoConfig:
        """A copy with other values; what depends on them (attention_layers, label maps) is worked out again."""
        changes = {self.aliases.get(k, k): v for k, v in changes.items()}
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)} | self._extras()
        if "num_labels" in changes and "id2label" not in changes:
            values["id2label"] = values["label2id"] = None
        if "attention_types" in changes:
            values["attention_layers"] = ()
        elif "attention_layers" in changes:
            values["attention_types"] = None
        elif changes.get("num_layers", self.num_layers) != self.num_layers:
            values["attention_types"], values["attention_layers"] = None, ()
        return GPTNeoConfig(**(values | changes))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `config.json` holds them."""
        values = {f.name: vars(self)[f.name] for f in dataclasses.fields(self) if f.name != "name_or_path"}
        values["attention_layers"] = list(self.attention_layers)
        values["id2label"] = {str(k): v for k, v in self.id2label.items()}
        return values | self._extras() | {"model_type": self.model_type}

    def to_diff_dict(self) -> dict[str, Any]:
        """The values of `to_dict` that are not those of a new configuration."""
        usual = GPTNeoConfig().to_dict()
        return {k: v for k, v in self.to_dict().items() if k == "model_type" or k not in usual or usual[k] != v}

    def _keep(self, name: str, value: Any) -> None:
        """A value under a name that no field has; not where the class has the name for what it works out itself."""
        if name not in NOT_KEPT and not hasattr(GPTNeoConfig, name):
            object.__setattr__(self, name, value)

    def _extras(self) -> dict[str, Any]:
        """What was given under names that no field has."""
        return {k: v for k, v in vars(self).items() if k not in self.__dataclass_fields__ and k != "in_use"}

    def to_json_string(self) -> str:
        """The text of `config.json`.

        Raises:
            ConfigError: a value under a name of one's own is nothing that JSON has.
        """
        for name, value in self._extras().items():
            try:
                json.dumps(value)
            except (TypeError, ValueError) as error:
                raise ConfigError(
                    f"{name} cannot be saved in config.json: {error}; delete it, or give it another form"
                ) from error
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    @classmethod
    def like(cls, config: Any) -> GPTNeoConfig:
        """A configuration, or one of transformers as one of ours, or that of a folder or hub id.

        Raises:
            InputError: anything else.
        """
        if isinstance(config, (str, os.PathLike)):
            found: GPTNeoConfig = cls.from_pretrained(config)
            return found
        if isinstance(config, GPTNeoConfig):
            return config
        if getattr(config, "model_type", None) == cls.model_type and hasattr(config, "to_dict"):
            return cls.from_dict(config.to_dict())
        raise InputError(f"config is {short(config)} ({type(config).__name__}); give a gptneo_fast.GPTNeoConfig")

    @classmethod
    def from_dict(cls, values: dict[str, Any], **overrides: Any) -> GPTNeoConfig:
        """A configuration from the keys of a `config.json`; keys that no field has are kept, and saved again.

        Raises:
            ConfigError: the model type is not gpt_neo, or a value is out of range.
        """
        if not isinstance(values, dict):
            raise ConfigError(f"a configuration is a JSON object, not {type(values).__name__}")
        if (found := values.get("model_type")) != cls.model_type:
            raise ConfigError(f"model_type is {short(found)}; gptneo_fast runs 'gpt_neo' only")
        if values.get("rotary"):
            raise ConfigError("rotary is set: these are the weights of a GPT-J under the name of gpt_neo, which cannot be run")
        kept = {k: v for k, v in values.items() if k not in ("name_or_path", "_name_or_path")}
        if kept.get("id2label") is None and kept.get("num_labels") is None:
            kept.pop("label2id", None)
        kept = _by_name(kept)
        overrides = {cls.aliases.get(k, k): v for k, v in overrides.items()}
        if "num_labels" in overrides:
            kept = {k: v for k, v in kept.items() if k not in ("id2label", "label2id", "num_labels")}
        if "attention_types" in overrides:
            kept.pop("attention_layers", None)
        if "attention_layers" in overrides:
            kept.pop("attention_types", None)
        names = cls.keywords()
        config = cls(**({k: v for k, v in kept.items() if k in names} | overrides))
        for name in kept.keys() - names:  # as they stand, near to a field's name or not
            config._keep(name, kept[name])
        return config


def _check_extra(name: str) -> None:
    """Let names pass that no field has, but not those that are a field misspelt."""
    names = {f.name for f in dataclasses.fields(GPTNeoConfig)}
    if near := difflib.get_close_matches(name, names, n=1, cutoff=0.9):
        raise ConfigError(f"GPTNeoConfig has no field {name!r}; did you mean {near[0]!r}?")


def _by_name(values: dict[str, Any]) -> dict[str, Any]:
    """Values under the fields' own names.

    Raises:
        ConfigError: a field and its alias disagree.
    """
    named: dict[str, Any] = {}
    for key, value in values.items():
        name = GPTNeoConfig.aliases.get(key, key)
        if name in named and named[name] != value:
            raise ConfigError(f"{name} is given as {short(named[name])} and, under its alias, as {short(value)}; keep one")
        named[name] = value
    return named


def _fill(config: GPTNeoConfig, num_labels: int | None, faults: list[str]) -> None:
    """Work out the fields that follow from others: attention layers, label maps."""
    _fill_attention(config, faults)
    _fill_labels(config, num_labels, faults)


def _put(config: GPTNeoConfig, name: str, value: Any) -> None:
    object.__setattr__(config, name, value)


def _fill_attention(config: GPTNeoConfig, faults: list[str]) -> None:
    given, layers = config.attention_types, as_list(config.attention_layers, "attention_layers", faults)
    if given is not None:
        expanded = expanded_types(given)
        if expanded is None:
            faults.append(
                f"attention_types {short(given)} is not a list such as [[['global', 'local'], 12]] of at most "
                f"{LIMITS['num_layers']} layers"
            )
        elif layers and layers != expanded:
            faults.append(f"attention_layers {short(layers)} and attention_types {short(given)} disagree; keep one")
        layers = layers if expanded is None else expanded
    elif layers:
        _put(config, "attention_types", [[layers, 1]])
    elif is_int(config.num_layers) and 0 < config.num_layers <= LIMITS["num_layers"]:
        layers = [("global", "local")[i % 2] for i in range(config.num_layers)]
        _put(config, "attention_types", [[layers, 1]])
    _put(config, "attention_layers", tuple(layers))


def _fill_labels(config: GPTNeoConfig, num_labels: int | None, faults: list[str]) -> None:
    names, most = config.id2label, 2**16
    if num_labels is not None and (not is_int(num_labels) or not 0 < num_labels <= most):
        faults.append(f"num_labels {short(num_labels)} is not an integer from 1 to {most}")
        num_labels = None
    if names is not None and not isinstance(names, dict):
        faults.append(f"id2label {short(names)} is not a map from index to label")
        names = None
    if names is None or (num_labels is not None and len(names) != num_labels):
        names = {i: f"LABEL_{i}" for i in range(2 if num_labels is None else num_labels)}
        _put(config, "label2id", None)
    try:
        names = {int(index): label for index, label in names.items()}
        if not all(isinstance(label, str) for label in names.values()):
            faults.append(f"id2label {short(names)} has labels that are not text")
            names = {}
    except (TypeError, ValueError):
        faults.append(f"id2label {short(names)} has keys that are not integers")
        names = {}
    _put(config, "id2label", names)
    if config.label2id is None:
        _put(config, "label2id", {label: index for index, label in names.items()})
