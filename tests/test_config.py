"""GPTNeoConfig: what config.json holds, under every name it has had, there and back."""

import copy
import json
import pickle

import pytest
import torch

from gptneo_fast import AutoConfig, GenerationConfig, GPTNeoConfig, GPTNeoForCausalLM
from gptneo_fast.config import GENERATION
from gptneo_fast.errors import ConfigError
from tests.support.peers import SMALL

transformers = pytest.importorskip("transformers")
HUB_13B = {  # config.json of EleutherAI/gpt-neo-1.3B, as it stands on the hub
    "activation_function": "gelu_new",
    "architectures": ["GPTNeoForCausalLM"],
    "attention_dropout": 0,
    "attention_layers": ["global", "local"] * 12,
    "attention_types": [[["global", "local"], 12]],
    "bos_token_id": 50256,
    "embed_dropout": 0,
    "eos_token_id": 50256,
    "gradient_checkpointing": False,
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": None,
    "layer_norm_epsilon": 1e-05,
    "max_position_embeddings": 2048,
    "model_type": "gpt_neo",
    "num_heads": 16,
    "num_layers": 24,
    "resid_dropout": 0,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50, "temperature": 0.9}},
    "tokenizer_class": "GPT2Tokenizer",
    "transformers_version": "4.9.0.dev0",
    "use_cache": True,
    "vocab_size": 50257,
    "window_size": 256,
}
FIELDS = (
    "vocab_size max_position_embeddings hidden_size num_layers num_heads intermediate_size window_size activation_function "
    "resid_dropout embed_dropout attention_dropout classifier_dropout layer_norm_epsilon initializer_range use_cache "
    "bos_token_id eos_token_id pad_token_id num_labels id2label label2id problem_type num_hidden_layers num_attention_heads"
).split()


def agree(theirs, ours):
    for name in FIELDS:
        assert getattr(ours, name) == getattr(theirs, name), name
    assert list(ours.attention_layers) == theirs.attention_layers


def test_defaults_are_those_of_transformers():
    agree(transformers.GPTNeoConfig(), GPTNeoConfig())


def test_the_file_of_the_hub_with_its_legacy_keys(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(HUB_13B))
    ours = GPTNeoConfig.from_pretrained(tmp_path)
    agree(transformers.GPTNeoConfig.from_pretrained(tmp_path), ours)
    assert (ours.head_dim, ours.ffn_size, ours.window(0), ours.window(1)) == (128, 8192, 0, 256)
    assert ours.to_dict()["summary_type"] == HUB_13B["summary_type"] and "gradient_checkpointing" in ours
    assert isinstance(AutoConfig.from_pretrained(tmp_path), GPTNeoConfig)


CHANGES = [
    {},
    {"num_labels": 5},
    {"id2label": {"0": "no", "1": "yes", "2": "maybe"}, "label2id": {"no": 0, "yes": 1, "maybe": 2}},
    {"attention_types": [[["local"], 1], [["global", "local"], 1]], "num_layers": 3},
    {"eos_token_id": [2, 5]},
    {"pad_token_id": 0, "use_cache": False, "classifier_dropout": 0.3},
    {"intermediate_size": 48, "activation_function": "gelu_pytorch_tanh"},
    {"problem_type": "regression", "num_labels": 1},
    {"tie_word_embeddings": False},
    {"dtype": "bfloat16"},
]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_what_we_write_transformers_reads_and_the_other_way(tmp_path, changes):
    values = SMALL | changes
    ours, theirs = GPTNeoConfig(**values), transformers.GPTNeoConfig(**values)
    agree(theirs, ours)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    for folder in (tmp_path / "ours", tmp_path / "theirs"):
        agree(transformers.GPTNeoConfig.from_pretrained(folder), GPTNeoConfig.from_pretrained(folder))
        assert GPTNeoConfig.from_pretrained(folder).tie_word_embeddings == values.get("tie_word_embeddings", True)
    again = GPTNeoConfig.from_pretrained(tmp_path / "ours")
    assert again.to_dict() == ours.to_dict() == GPTNeoConfig.from_dict(ours.to_dict()).to_dict()
    assert transformers.AutoConfig.from_pretrained(tmp_path / "ours").model_type == "gpt_neo"


def test_aliases_name_the_same_fields():
    values = {k: v for k, v in SMALL.items() if k not in ("num_layers", "num_heads")}
    ours = GPTNeoConfig(num_hidden_layers=3, num_attention_heads=4, torch_dtype="float16", **values)
    assert (ours.num_layers, ours.num_heads, ours.dtype) == (3, 4, torch.float16)
    assert (ours.num_hidden_layers, ours.num_attention_heads, ours.torch_dtype) == (3, 4, torch.float16)
    assert GPTNeoConfig.from_dict({"model_type": "gpt_neo", "num_hidden_layers": 2}).num_layers == 2
    ours.torch_dtype = "float32"
    assert ours.dtype is torch.float32
    ours.dtype = torch.bfloat16
    theirs = transformers.GPTNeoConfig(torch_dtype="bfloat16", **SMALL)
    for config in (ours, theirs, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), ours.replace(num_layers=2)):
        assert config.dtype is torch.bfloat16 and config.to_dict()["dtype"] == "bfloat16"
        assert json.loads(config.to_json_string())["dtype"] == "bfloat16"
    with pytest.raises(ConfigError, match="dtype 'int8' is unknown"):
        ours.dtype = torch.int8
    assert ours.replace(num_hidden_layers=2).attention_layers == ("global", "local")


def test_attention_layers_alone_say_which_layers_see_all():
    values = {k: v for k, v in SMALL.items() if k != "attention_types"}
    ours = GPTNeoConfig(attention_layers=["local", "local", "global"], **values)
    assert [ours.window(i) for i in range(3)] == [7, 7, 0]
    assert ours.to_dict()["attention_types"] == [[["local", "local", "global"], 1]]


def test_keywords_beat_the_file_and_unknown_ones_are_refused(tmp_path):
    GPTNeoConfig(**SMALL).save_pretrained(tmp_path)
    ours = GPTNeoConfig.from_pretrained(tmp_path, num_labels=4, pad_token_id=9, window_size=3)
    assert (ours.num_labels, ours.pad_token_id, ours.window(1), len(ours.label2id)) == (4, 9, 3, 4)
    for call in (lambda: GPTNeoConfig(windowsize=3), lambda: GPTNeoConfig.from_pretrained(tmp_path, windowsize=3)):
        with pytest.raises(ConfigError, match="did you mean 'window_size'"):
            call()


def test_what_shapes_the_weights_is_read_only_once_a_model_is_built_and_the_rest_may_be_set():
    ours = GPTNeoConfig(**SMALL)
    ours.num_layers, ours.attention_types, ours.vocab_size = 2, [[["local", "global"], 1]], 19
    assert ours.attention_layers == ("local", "global")
    ours.num_layers = 5
    with pytest.raises(ConfigError, match="num_layers 5 and 2 attention layers"):
        GPTNeoForCausalLM(ours)
    ours.num_layers = 2
    assert GPTNeoForCausalLM(ours).lm_head.out_features == 19
    for name in ("hidden_size", "num_heads", "num_attention_heads", "window_size", "layer_norm_epsilon"):
        with pytest.raises(ConfigError, match=r"use config\.replace"):
            setattr(ours, name, 8)
    for name in ("max_length", "do_sample", "temperature"):
        with pytest.raises(ConfigError, match=rf"set model\.generation_config\.{name}"):
            setattr(ours, name, 1)
    ours.pad_token_id, ours.num_labels, ours.use_cache, ours.problem_type = 3, 7, False, "regression"
    assert len(ours.id2label) == 7 and ours.label2id["LABEL_6"] == 6
    with pytest.raises(ConfigError, match="pad_token_id 'x' is not a token id"):
        ours.pad_token_id = "x"
    with pytest.raises(AttributeError, match="no field 'n_head'"):
        ours.n_head  # noqa: B018


def test_the_names_of_generation_s_settings_are_those_that_it_has():
    own = set(GPTNeoConfig.__dataclass_fields__)
    assert frozenset(GenerationConfig.__dataclass_fields__) - own == GENERATION


def test_what_a_config_json_of_old_says_of_generation_is_obeyed():
    config = GPTNeoConfig.from_dict(GPTNeoConfig(**SMALL).to_dict() | {"repetition_penalty": 3.0, "max_length": 9})
    settings = GPTNeoForCausalLM(config).generation_config
    assert (settings.repetition_penalty, settings.max_length) == (3.0, 9)


def test_unknown_fields_are_kept_saved_and_searched():
    ours = GPTNeoConfig(**SMALL, my_field=[1, {"a": 2}])
    again = GPTNeoConfig(**json.loads(ours.to_json_string()))
    assert again.my_field == [1, {"a": 2}] and again == ours and ours.replace(num_labels=4).my_field == ours.my_field
    assert "my_field" in ours and "other" not in ours and ours.get("other", 3) == 3 and "num_hidden_layers" in ours
    ours.update({"my_field": 7, "pad_token_id": 2})
    assert (ours.my_field, ours.pad_token_id) == (7, 2)
    assert {"vocab_size", "window_size"} <= ours.to_diff_dict().keys() and "use_cache" not in ours.to_diff_dict()


@pytest.mark.parametrize("name", ["head_dim", "to_dict", "check", "in_use", "use_return_dict", "is_encoder_decoder", "replace"])
def test_a_file_cannot_put_a_value_in_the_place_of_what_the_class_works_out(name):
    values = GPTNeoConfig(**SMALL).to_dict() | {name: "x"}
    for ours in (GPTNeoConfig.from_dict(values), GPTNeoConfig(**values)):
        assert ours == GPTNeoConfig(**SMALL) and ours.replace().to_dict() == GPTNeoConfig(**SMALL).to_dict()
        assert ours.head_dim == 8 and not ours.in_use and GPTNeoForCausalLM(ours)


def test_what_json_has_no_form_for_is_refused_by_name_when_it_is_saved(tmp_path):
    ours = GPTNeoConfig(**SMALL)
    ours.my_field = {1, 2}
    with pytest.raises(ConfigError, match=r"my_field cannot be saved in config\.json"):
        ours.save_pretrained(tmp_path)


def test_what_is_said_in_loading_wins_over_the_file(tmp_path):
    GPTNeoConfig(**SMALL).save_pretrained(tmp_path)
    ours = GPTNeoConfig.from_pretrained(tmp_path, num_layers=2, attention_types=[[["local"], 2]])
    assert ours.attention_layers == ("local", "local")


def test_a_gpt_j_under_this_name_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="rotary is set"):
        GPTNeoConfig.from_dict(GPTNeoConfig(**SMALL).to_dict() | {"rotary": True, "rotary_dim": 16})


def test_replace_works_out_again_what_follows():
    ours = GPTNeoConfig(**SMALL)
    changed = ours.replace(hidden_size=64, num_layers=5, num_labels=6)
    assert (changed.head_dim, changed.attention_layers[4], changed.num_labels) == (16, "global", 6)
    assert (ours.hidden_size, ours.num_layers, ours.num_labels) == (32, 3, 2)
    assert ours.replace(attention_types=[[["local"], 3]]).attention_layers == ("local",) * 3
    assert ours.replace().to_dict() == ours.to_dict()


def test_copies_and_pickles_are_equal_and_their_own():
    ours = GPTNeoConfig(**SMALL, num_labels=3)
    for other in (copy.deepcopy(ours), copy.copy(ours), pickle.loads(pickle.dumps(ours))):
        assert other == ours and other.to_json_string() == ours.to_json_string()
        other.pad_token_id = 11
        assert ours.pad_token_id is None
    assert json.loads(ours.to_json_string())["model_type"] == "gpt_neo"


def test_a_setting_of_generation_may_be_set_to_nothing_where_it_is_nothing():
    ours = GPTNeoConfig(**SMALL)
    ours.forced_eos_token_id = None
    ours = GPTNeoConfig.from_dict(GPTNeoConfig(**SMALL).to_dict() | {"temperature": 0.5})
    with pytest.raises(ConfigError, match=r"set model\.generation_config\.temperature"):
        ours.temperature = None
