"""Integers of more digits than Python writes: an argument that is, or holds, one is refused with an error of ours."""

import inspect

import pytest
import torch

import gptneo_fast
from gptneo_fast.demo import FOLDER
from gptneo_fast.errors import GPTNeoFastError, short
from gptneo_fast.generation import processors, stopping, warpers
from gptneo_fast.generation.options import NOT_OFFERED
from gptneo_fast.network.cache import KVCache
from tests.support.peers import SMALL

HUGE = 10**5000
VALUES = [HUGE, -HUGE, [HUGE], [[HUGE]], (HUGE, 1.0), {"a": HUGE}, {HUGE: 1}, {(HUGE,): 1.0}]
IDS = torch.tensor([[5, 6, 7]])


def arguments(function, *besides):
    """Names of a function's arguments."""
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return [*(n for n, p in inspect.signature(function).parameters.items() if n != "self" and p.kind not in kinds), *besides]


def refused(call, name):
    """Whatever is raised for a huge value is ours."""
    for i, value in enumerate(VALUES):
        try:
            call(**{name: value})
        except GPTNeoFastError:
            continue
        except Exception as error:
            raise AssertionError(f"{name}, value {i}: {type(error).__name__}: {error}") from error


@pytest.fixture(scope="module")
def model():
    return gptneo_fast.GPTNeoForCausalLM(gptneo_fast.GPTNeoConfig(**SMALL)).eval()


FIELDS = [*gptneo_fast.GPTNeoConfig.__dataclass_fields__, *gptneo_fast.GPTNeoConfig.aliases, "num_labels"]
USUAL = dict.fromkeys(("temperature", "top_p", "min_p", "mass", "epsilon", "top_h"), 0.5)
USUAL |= dict.fromkeys(("eos_token_id", "bos_token_id", "min_new_tokens", "prompt_length_to_skip", "begin_index"), 1)
USUAL |= dict.fromkeys(("ngram_size", "min_length", "max_length", "top_k", "penalty", "input_ids_seq_length", "max_time"), 2)
USUAL |= {"sequence_bias": {(1,): 1.0}, "bad_words_ids": [[1]], "exponential_decay_length_penalty": (1, 1.5)}
USUAL |= {"suppress_tokens": [1], "begin_suppress_tokens": [1], "stop_strings": ["a"]}
OPTIONS = [*gptneo_fast.GenerationConfig.__dataclass_fields__, *NOT_OFFERED]


@pytest.mark.filterwarnings("ignore:max_length has no say")
@pytest.mark.parametrize("name", [*arguments(gptneo_fast.GPTNeoForCausalLM.generate), *OPTIONS])
def test_in_generate(model, name):
    usual = {"max_new_tokens": 1, "do_sample": True} | ({} if name in ("inputs", "inputs_embeds") else {"input_ids": IDS})
    if name == "negative_prompt_attention_mask":
        usual["negative_prompt_ids"] = IDS
    refused(lambda **given: model.generate(**(usual | given)), name)
    if name in OPTIONS:
        refused(gptneo_fast.GenerationConfig, name)


@pytest.mark.parametrize("name", arguments(gptneo_fast.GPTNeoForCausalLM.forward, "cache", "shift_labels", "ignore_index"))
def test_in_forward(model, name):
    usual = {"labels": IDS} | ({} if name == "inputs_embeds" else {"input_ids": IDS})
    refused(lambda **given: model(**(usual | given)), name)


@pytest.mark.parametrize(
    "name", [*gptneo_fast.GPTNeoConfig.__dataclass_fields__, *gptneo_fast.GPTNeoConfig.aliases, "num_labels"]
)
def test_in_a_configuration(name):
    refused(gptneo_fast.GPTNeoConfig, name)
    refused(lambda **given: gptneo_fast.GPTNeoConfig(**SMALL).update(given), name)


@pytest.mark.parametrize("name", arguments(gptneo_fast.GPTNeoForCausalLM.from_pretrained, "num_labels", "window_size"))
def test_in_from_pretrained(name):
    usual = {"pretrained_model_name_or_path": FOLDER}
    refused(lambda **given: gptneo_fast.GPTNeoForCausalLM.from_pretrained(**(usual | given)), name)


def test_in_what_else_takes_numbers(model, tmp_path):
    config = model.config
    for name in ("batch_size", "max_length"):
        usual = {"batch_size": 1, "dtype": torch.float32, "device": "cpu"}
        refused(lambda usual=usual, **given: KVCache(config, **(usual | given)), name)
    cache = KVCache(config, 1, dtype=torch.float32, device="cpu")
    refused(cache.crop, "max_length")
    refused(cache.reorder_cache, "rows")
    refused(cache.batch_select_indices, "indices")
    for name in ("new_num_tokens", "pad_to_multiple_of"):
        refused(model.resize_token_embeddings, name)
    refused(model.gradient_checkpointing_enable, "every_n_layers")
    refused(lambda **given: model.save_pretrained(tmp_path, **given), "max_shard_size")
    for name in ("backend", "dtype", "attn_implementation"):
        refused(lambda **given: gptneo_fast.GPTNeoForCausalLM.from_config(config, **given), name)
    for name in ("task", "model", "tokenizer", "device", "dtype"):
        usual = {"task": "text-generation", "model": model, "tokenizer": FOLDER}
        refused(lambda usual=usual, **given: gptneo_fast.pipeline(**(usual | given)), name)
    for name in arguments(gptneo_fast.load):
        refused(lambda name=name, **given: gptneo_fast.load(**({"name_or_path": FOLDER} | given)), name)


def test_in_text(model):
    told = gptneo_fast.load(FOLDER)
    for name in arguments(told.generate_text, "max_new_tokens", "temperature"):
        refused(lambda **given: told.generate_text(**({"prompts": "Once", "max_new_tokens": 1} | given)), name)
    for name in arguments(told.stream, "max_new_tokens", "temperature"):
        refused(lambda **given: list(told.stream(**({"prompt": "Once", "max_new_tokens": 1} | given))), name)


@pytest.mark.parametrize("module", [processors, warpers, stopping], ids=lambda m: m.__name__.rpartition(".")[2])
def test_in_processors_and_criteria(module):
    usual = USUAL | {"tokenizer": gptneo_fast.GPT2Tokenizer.from_pretrained(FOLDER)}
    made = 0
    for cls in list(vars(module).values()):
        if not isinstance(cls, type) or cls.__module__ != module.__name__ or inspect.isabstract(cls) or issubclass(cls, list):
            continue
        names = arguments(cls)
        if not set(names) <= set(usual) | {"device", "filter_value", "min_tokens_to_keep", "prompt_ignore_length"}:
            continue
        made += 1
        for name in names:
            given = {n: v for n, v in usual.items() if n in names}

            def used(given=given, cls=cls, **huge):
                cls(**(given | huge))(IDS, torch.zeros(1, 97))

            refused(used, name)
    assert made > 1


def test_an_error_says_how_large_a_number_is():
    assert short(HUGE) == f"an integer of {HUGE.bit_length()} bits, too long to write"
    assert short([HUGE]) == "a list, too long to write" and short(12) == "12"
    assert short("x" * 200) == "'" + "x" * 99 + "..."
