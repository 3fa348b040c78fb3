"""Faults of config.json: each is refused with its name, all at once, before anything is built from it."""

import json

import pytest

import gptneo_fast
from gptneo_fast import GPTNeoConfig
from gptneo_fast.config import LIMITS
from gptneo_fast.errors import ConfigError
from tests.support.peers import SMALL

GOOD = json.loads(GPTNeoConfig(**SMALL).to_json_string())


def refused(tmp_path, text, *words):
    """A config.json of this text is refused, through every door, with these words and the file's name."""
    (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    for door in (
        GPTNeoConfig.from_pretrained,
        gptneo_fast.GPTNeoForCausalLM.from_pretrained,
        lambda path: gptneo_fast.load(path, device="cpu"),
    ):
        with pytest.raises(ConfigError) as caught:
            door(tmp_path)
        for word in (*words, tmp_path / "config.json"):
            assert str(word) in str(caught.value), (word, str(caught.value))
        assert len(str(caught.value)) < 3000


def changed(**changes):
    return json.dumps(GOOD | changes)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is not JSON that can be read"),
        ("{", "is not JSON that can be read"),
        ('{"model_type": "gpt_neo",}', "is not JSON that can be read"),
        (json.dumps(GOOD).encode("utf-16"), "is not UTF-8"),
        (json.dumps(GOOD).encode("utf-8-sig"), "BOM"),
        (b'{"a": "\xff"}', "is not UTF-8"),
        ("[" * 100_000, "nested too deep"),
        ('{"a":' * 100_000, "nested too deep"),
        ("[1]", "holds a list, not an object"),
        ("null", "holds a NoneType, not an object"),
        ('{"hidden_size": ' + "9" * 5000 + "}", "has 5000 digits"),
        ('{"hidden_size": -' + "9" * 5000 + "}", "has 5001 digits"),
        ('{"layer_norm_epsilon": NaN}', "NaN is no number of JSON"),
        ('{"layer_norm_epsilon": -Infinity}', "-Infinity is no number of JSON"),
        ('{"layer_norm_epsilon": 1e400}', "the number 1e400 is not finite"),
        ('{"hidden_size": 32, "hidden_size": 64}', "key 'hidden_size' is given twice"),
        ('{"a": ["\\ud83d\\ude00", "\\ud83d"]}', r"escapes half a character: '\ud83d' stands alone"),
        ('{"\\udE00": 1}', r"escapes half a character: '\ude00' stands alone"),
        ('{"a": {"b": 1, "b": 1}}', "key 'b' is given twice"),
        ("{" + ", ".join(f'"{i}": 1' for i in range(200_000)) + ', "7": 1}', "key '7' is given twice"),
    ],
    ids=range(20),
)
def test_35_a_file_that_is_no_strict_json_object(tmp_path, text, words):
    refused(tmp_path, text, words)


@pytest.mark.parametrize("name", sorted(LIMITS))
@pytest.mark.parametrize("value", [True, "12", 12.0, 1.5, [], {}])
def test_35_a_size_that_is_no_integer(tmp_path, name, value):
    refused(tmp_path, changed(**{name: value}), f"{name} {value!r} is not an integer from 1 to {LIMITS[name]}")


@pytest.mark.parametrize("name", ["use_cache", "tie_word_embeddings", "output_attentions", "return_dict"])
@pytest.mark.parametrize("value", [0, 1, "true", None])
def test_35_a_flag_that_is_no_bool(tmp_path, name, value):
    refused(tmp_path, changed(**{name: value}), f"{name} {value!r} is not true or false")


@pytest.mark.parametrize("found", ["gpt2", "gptj", "gpt_neox", "GPT_NEO", "", 7, ["gpt_neo"]])
def test_36_another_architecture_is_called_by_its_name(tmp_path, found):
    refused(tmp_path, changed(model_type=found), f"model_type is {found!r}; gptneo_fast runs 'gpt_neo' only")


def test_36_no_architecture(tmp_path):
    text = json.dumps({k: v for k, v in GOOD.items() if k != "model_type"})
    refused(tmp_path, text, "model_type is None; gptneo_fast runs 'gpt_neo' only")


LAYERS = {"attention_types": None, "attention_layers": None}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 33}, "hidden_size 33 is not a multiple of num_heads 4 (head_dim = hidden_size / num_heads)"),
        ({"num_layers": 4}, "num_layers 4 and 3 attention layers"),
        ({"num_layers": 4}, "sum(repeats * len(pattern)) = num_layers"),
        ({"attention_layers": ["global"] * 3}, "disagree; keep one"),
        ({**LAYERS, "attention_layers": ["global", "sparse", "local"]}, "attention type 'sparse' is unknown; use 'global'"),
        ({**LAYERS, "attention_types": [[["dilated"], 3]]}, "attention type 'dilated' is unknown; use 'global' or 'local'"),
        ({**LAYERS, "attention_types": [[[["global"]], 3]]}, "is unknown; use 'global' or 'local'"),
        ({**LAYERS, "attention_types": "global"}, "attention_types 'global' is not a list such as [[['global', 'local'], 12]]"),
        ({**LAYERS, "attention_types": [["global", 3]]}, "is not a list such as"),
        ({**LAYERS, "attention_types": [[["global"]]]}, "is not a list such as"),
        ({**LAYERS, "attention_types": [[["global"], 1.5]]}, "is not a list such as"),
        ({**LAYERS, "attention_types": [[["global"], True]]}, "is not a list such as"),
        ({**LAYERS, "attention_types": [[["global"], -3]]}, "is not a list such as"),
        ({**LAYERS, "attention_types": [[["global"], 10**9]]}, "of at most 256 layers"),
        ({**LAYERS, "attention_types": [[[], 10**9]]}, "of at most 256 layers"),
        ({**LAYERS, "attention_types": [[["global"] * 600, 1]] * 600}, "of at most 256 layers"),
        ({"attention_layers": 7}, "attention_layers 7 is not a list"),
    ],
    ids=range(17),
)
def test_37_a_structure_that_does_not_add_up(tmp_path, changes, words):
    refused(tmp_path, changed(**changes), words)


@pytest.mark.parametrize("name", sorted(LIMITS))
@pytest.mark.parametrize("value", [0, -1, 10**10])
def test_37_a_size_out_of_range(tmp_path, name, value):
    refused(tmp_path, changed(**{name: value}), f"{name} {value} is not an integer from 1 to {LIMITS[name]}")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"window_size": 0}, "window_size 0 is not an integer from 1"),
        ({"window_size": -1}, "window_size -1 is not an integer from 1"),
        ({"activation_function": "rel"}, "activation_function 'rel' is unknown; use one of gelu_new, gelu_pytorch_tanh"),
        ({"activation_function": None}, "activation_function None is unknown"),
        ({"layer_norm_epsilon": 0}, "layer_norm_epsilon 0 is not a positive finite number"),
        ({"layer_norm_epsilon": -1e-5}, "layer_norm_epsilon -1e-05 is not a positive"),
        ({"layer_norm_epsilon": "1e-5"}, "layer_norm_epsilon '1e-5' is not a positive"),
        ({"layer_norm_epsilon": True}, "layer_norm_epsilon True is not a positive"),
        ({"initializer_range": -1}, "initializer_range -1 is not a finite number from 0"),
        ({"resid_dropout": 1.5}, "resid_dropout 1.5 is not a probability"),
        ({"attention_dropout": None}, "attention_dropout None is not a probability"),
        ({"embed_dropout": "0"}, "embed_dropout '0' is not a probability"),
        ({"classifier_dropout": -0.1}, "classifier_dropout -0.1 is not a probability"),
        ({"eos_token_id": "x"}, "eos_token_id 'x' is not a token id"),
        ({"eos_token_id": [1, 2.0]}, "eos_token_id [1, 2.0] is not a token id"),
        ({"pad_token_id": 2**40}, f"pad_token_id {2**40} is not a token id"),
        ({"bos_token_id": True}, "bos_token_id True is not a token id"),
        ({"problem_type": "ranking"}, "problem_type 'ranking' is unknown"),
        ({"id2label": [1]}, "id2label [1] is not a map from index to label"),
        ({"id2label": {"x": "y"}}, "has keys that are not integers"),
        ({"id2label": {"0": ["y"]}}, "has labels that are not text"),
        ({"id2label": 5, "num_labels": 3}, "id2label 5 is not a map"),
        ({"id2label": None, "num_labels": 0}, "num_labels 0 is not an integer from 1"),
        ({"id2label": None, "num_labels": 10**9}, f"num_labels {10**9} is not an integer from 1"),
        ({"dtype": "float7"}, "dtype 'float7' is unknown; use one of float32"),
        ({"dtype": None, "torch_dtype": ["float32"]}, "keep one"),
        ({"num_hidden_layers": 7}, "num_layers is given as 3 and, under its alias, as 7; keep one"),
    ],
    ids=lambda v: str(v)[:40] if isinstance(v, dict) else "",
)
def test_38_a_value_that_no_gpt_neo_has(tmp_path, changes, words):
    refused(tmp_path, changed(**changes), words)


def test_38_nan_as_a_keyword():
    with pytest.raises(ConfigError, match="layer_norm_epsilon nan is not a positive finite number"):
        GPTNeoConfig(layer_norm_epsilon=float("nan"))
    with pytest.raises(ConfigError, match="is not a list such as"):
        GPTNeoConfig(attention_types=[[["global"], float("inf")]])


def test_38_a_window_wider_than_the_positions_is_fine(tmp_path):
    (tmp_path / "config.json").write_text(changed(window_size=10_000))
    assert GPTNeoConfig.from_pretrained(tmp_path).window(1) == 10_000


def test_all_faults_are_told_at_once(tmp_path):
    text = changed(hidden_size=33, num_layers=5, window_size=0, activation_function="rel", resid_dropout=2, use_cache=3)
    refused(
        tmp_path,
        text,
        "hidden_size 33 is not a multiple",
        "num_layers 5 and 3 attention layers",
        "window_size 0",
        "activation_function 'rel'",
        "resid_dropout 2",
        "use_cache 3",
    )


@pytest.mark.parametrize("name", ["resid_dropout", "embed_dropout", "attention_dropout"])
def test_39_dropout_of_a_file_acts_in_training_and_not_in_eval(tmp_path, name):
    import torch

    torch.manual_seed(0)
    gptneo_fast.GPTNeoForCausalLM(GPTNeoConfig(**SMALL)).save_pretrained(tmp_path)
    plain = gptneo_fast.GPTNeoForCausalLM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(changed(**{name: 0.5}))
    model = gptneo_fast.GPTNeoForCausalLM.from_pretrained(tmp_path)
    x = torch.arange(10)[None]
    assert torch.equal(model(x).logits, plain(x).logits), "loaded in eval mode, without dropout"
    model.train()
    one, two = model(x).logits, model(x).logits
    assert not torch.equal(one, two) and not torch.equal(one, plain(x).logits)


def test_a_file_of_more_than_the_limit_is_not_read(tmp_path):
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ConfigError, match=f"it has {2**40} bytes, of at most {16 << 20}"):
        GPTNeoConfig.from_pretrained(tmp_path)
