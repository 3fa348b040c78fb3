"""Pipelines that continue texts and conversations, beside transformers'."""

import importlib
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch

import gptneo_fast
from gptneo_fast.errors import GPTNeoFastError, InputError, SetupError
from gptneo_fast.generation.assisted import assisted

transformers = pytest.importorskip("transformers")
DEMO = Path(gptneo_fast.__file__).parent / "demo" / "model"
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TEXT = "Once upon a time"
TEXTS = [TEXT, "The dog was very happy today and ran", "A cat"]
LONG = "Once upon a time there was a dog. " * 60
ASKED = [{"role": "user", "content": "Tell a story"}]
BEGUN = [*ASKED, {"role": "assistant", "content": "Once upon"}]


def made(library, **options):
    model = library.AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    tokenizer = library.AutoTokenizer.from_pretrained(DEMO)
    tokenizer.pad_token, tokenizer.chat_template = tokenizer.eos_token, TEMPLATE
    return library.pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu", **options)


@pytest.fixture(scope="module")
def both():
    return made(transformers), made(gptneo_fast)


CALLS = [
    (TEXT, {"return_full_text": False}),
    (TEXT, {"return_text": True}),
    (TEXT, {"return_text": False}),
    (TEXT, {"return_tensors": True}),
    (TEXT, {"prefix": "The king said: "}),
    (TEXT, {"prefix": "The king said: ", "min_length": 20}),
    (TEXT, {"stop_sequence": "the"}),
    (TEXT, {"stop_sequence": [" a", "was"]}),
    (TEXT, {"max_length": 3}),
    (TEXT, {"max_length": 3, "truncation": False}),
    (TEXT, {"max_new_tokens": torch.tensor(3)}),
    (TEXT, {"max_length": None, "num_workers": 2, "add_special_tokens": False, "skip_special_tokens": False}),
    (TEXT, {"tokenizer_encode_kwargs": {"truncation": True, "max_length": 2}}),
    (TEXT, {"num_return_sequences": 2, "num_beams": 2}),
    (LONG, {"truncation": True, "max_length": 20}),
    (LONG, {"handle_long_generation": "hole"}),
    (TEXTS, {}),
    (TEXTS, {"batch_size": 2}),
    (TEXTS, {"batch_size": 3, "return_tensors": True}),
    (TEXTS, {"batch_size": 2, "num_return_sequences": 2, "num_beams": 2}),
    (TEXTS, {"padding": "max_length", "max_length": 30}),
    ("", {}),
    (["", TEXT], {}),
    (ASKED, {}),
    (BEGUN, {}),
    (BEGUN, {"continue_final_message": False}),
    (ASKED, {"continue_final_message": True}),
    (BEGUN, {"truncation": True, "max_length": 6}),
    (ASKED, {"return_full_text": False}),
    (ASKED, {"return_tensors": True}),
    ([ASKED, BEGUN], {}),
    ([ASKED, BEGUN], {"batch_size": 2}),
]


@pytest.mark.parametrize(("prompts", "options"), CALLS, ids=lambda v: str(v)[:60])
def test_texts_and_conversations_go_on_as_in_transformers(both, prompts, options):
    theirs, ours = both
    options = {"do_sample": False, "max_new_tokens": 8} | options
    assert ours(prompts, **options) == theirs(prompts, **options)


@pytest.mark.parametrize("prompts", [TEXTS, ASKED, [ASKED, BEGUN]], ids=["texts", "messages", "conversations"])
def test_what_comes_one_by_one_is_answered_one_by_one(both, prompts):
    theirs, ours = both
    options = {"do_sample": False, "max_new_tokens": 4}
    want, got = theirs((p for p in prompts), **options), ours((p for p in prompts), **options)
    assert (got if isinstance(got, list) else list(got)) == (want if isinstance(want, list) else list(want))
    endless = ours((TEXT for _ in iter(int, 1)), **options)
    assert next(endless) == ours(TEXT, **options)


def test_a_total_length_leaves_room_for_the_prefix(both):
    theirs, ours = (made(library, do_sample=False, max_length=20) for library in (transformers, gptneo_fast))
    assert ours(TEXT, prefix="The king said: ") == theirs(TEXT, prefix="The king said: ")
    assert ours(TEXT) == theirs(TEXT)
    assert both[1](LONG[:300], do_sample=False, handle_long_generation="hole", max_length=90, max_new_tokens=None)


def test_a_passed_config_stands_over_defaults_and_instead_of_what_the_pipeline_was_told():
    results = []
    for library in (transformers, gptneo_fast):
        pipe = made(library, max_new_tokens=20, repetition_penalty=1.5)
        config = library.GenerationConfig(do_sample=False, max_new_tokens=6)
        results.append([pipe(TEXT, generation_config=config), pipe(TEXT, generation_config=config, max_new_tokens=3)])
        results[-1].append(pipe(TEXT, do_sample=False))
    assert results[0] == results[1]


def test_a_config_of_transformers_is_one():
    config = transformers.GenerationConfig(do_sample=False, max_new_tokens=6)
    theirs, ours = (made(library) for library in (transformers, gptneo_fast))
    assert ours(TEXT, generation_config=config) == theirs(TEXT, generation_config=config)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("kind", ["one", "list", "iterator", "conversations"])
def test_the_same_seed_draws_what_it_draws_in_transformers(kind, size):
    found = []
    for library in (transformers, gptneo_fast):
        pipe = made(library)
        pipe.tokenizer.padding_side = "right"
        pipe = made(library)  # sets it, and leaves it so
        assert pipe.tokenizer.padding_side == "left"
        prompts = {"one": TEXT, "list": TEXTS, "iterator": (text for text in TEXTS), "conversations": [ASKED, BEGUN]}[kind]
        library.set_seed(3)
        out = pipe(prompts, max_new_tokens=6, batch_size=size)
        found.append((list(out) if kind == "iterator" else out, torch.rand(1)))
    assert found[0] == found[1]


def test_what_generate_returns_besides_stands_in_each_result(both):
    options = {"do_sample": False, "max_new_tokens": 4, "num_beams": 2, "num_return_sequences": 2}
    options |= {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    want, got = (pipe(TEXTS, batch_size=3, **options) for pipe in both)
    for theirs, ours in zip(chain.from_iterable(want), chain.from_iterable(got), strict=True):
        assert ours.keys() == theirs.keys() >= {"generated_text", "scores", "sequences_scores", "logits"}
        assert ours["generated_text"] == theirs["generated_text"]
        for name in ("scores", "sequences_scores"):
            np.testing.assert_allclose(ours[name], theirs[name], atol=1e-3)


def test_a_tokenizer_of_transformers_serves(both):
    ours = gptneo_fast.pipeline(
        "text-generation", model=str(DEMO), tokenizer=both[0].tokenizer, model_kwargs={"dtype": "float32"}
    )
    for prompts in (TEXTS, [ASKED, BEGUN]):
        options = {"do_sample": False, "max_new_tokens": 8, "batch_size": 2}
        assert ours(prompts, **options) == both[1](prompts, **options)


REFUSED = [
    (None, {}, "text_inputs is None"),
    (b"x", {}, "text_inputs is b'x'"),
    (3, {}, r"text_inputs is 3 \(int\)"),
    (ASKED[0], {}, "text_inputs is {'role'"),
    ([TEXT, None], {}, "text_inputs 1 is a NoneType"),
    ([[TEXT]], {}, "text_inputs 0 is a list"),
    ([*ASKED, {"role": "user"}], {}, "message 1 is {'role': 'user'}"),
    (torch.ones(2), {}, "text_inputs 0 is a Tensor"),
    (TEXT, {"batch_size": 0}, "batch_size=0"),
    (TEXT, {"batch_size": 10**400}, r"batch_size=10+\.\.\. is not"),
    (TEXT, {"max_new_tokens": 10**400}, r"max_new_tokens=10+\.\.\. is not"),
    (TEXT, {"max_length": 10**400}, r"max_length=10+\.\.\. is not"),
    (TEXT, {"max_length": -1}, "max_length=-1"),
    (TEXT, {"prefix": 5}, "prefix is a int"),
    (TEXT, {"stop_sequence": 5}, "stop_strings=5"),
    (TEXT, {"truncation": 5}, "truncation is 5"),
    (TEXT, {"padding": "most"}, "padding is 'most'"),
    (TEXT, {"tokenizer_encode_kwargs": 5}, "tokenizer_encode_kwargs is 5"),
    (TEXT, {"handle_long_generation": "left"}, "handle_long_generation='left'"),
    (TEXT, {"handle_long_generation": "hole", "max_new_tokens": 600}, "cannot make room"),
    (TEXT, {"return_type": []}, "return_type="),
    (TEXT, {"return_full_text": True, "return_tensors": True}, "return_full_text and return_tensors contradict"),
    (TEXT, {"return_full_text": False, "return_text": True}, "contradict"),
    (TEXT, {"generation_config": "x"}, "generation_config is 'x'"),
    (LONG, {"max_length": 9, "max_new_tokens": None}, r"the prompt has \d{3} tokens and max_length is 9"),
    (ASKED, {"tools": 5}, "tools is a int"),
    (TEXT, {"max_new_token": 5}, "did you mean 'max_new_tokens'"),
]


@pytest.mark.parametrize(("prompts", "options", "message"), REFUSED, ids=lambda v: str(v)[:40])
def test_what_is_no_prompt_and_no_option_is_named(both, prompts, options, message):
    with pytest.raises(GPTNeoFastError, match=message):
        both[1](prompts, **({"do_sample": False, "max_new_tokens": 8} | options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": []}, r"task \[\] is not offered"),
        ({"model": 5}, "model is 5"),
        ({"tokenizer": 5}, "tokenizer is 5"),
        ({"model_kwargs": 5}, "model_kwargs is 5"),
        ({"model_kwargs": {"dtipe": 1}}, "no option 'dtipe'"),
        ({"device": "gpu"}, "device 'gpu' is unknown"),
    ],
    ids=str,
)
def test_what_no_pipeline_is_made_of_is_named(options, message):
    with pytest.raises(GPTNeoFastError, match=message):
        gptneo_fast.pipeline(**({"task": "text-generation", "model": str(DEMO)} | options))


def test_a_model_without_a_tokenizer_is_told_so():
    model = gptneo_fast.AutoModelForCausalLM.from_pretrained(DEMO)
    model.tokenizer = None
    with pytest.raises(SetupError, match="no tokenizer"):
        gptneo_fast.pipeline("text-generation", model=model)(TEXT)
    pipe = gptneo_fast.pipeline("text-generation", model=model, tokenizer=DEMO, device=-1, use_fast=True)
    assert pipe(TEXT, max_new_tokens=2, do_sample=False)
    with pytest.raises(InputError, match="device 'gpu' is unknown"):
        gptneo_fast.pipeline("text-generation", model=model, device="gpu")


def test_an_assistant_may_be_named_by_its_folder(both, monkeypatch):
    drafted = []
    generating = importlib.import_module("gptneo_fast.generation.generate")  # the function has the module's name
    monkeypatch.setattr(generating, "assisted", lambda m, request: drafted.append(request.assistant) or assisted(m, request))
    named = made(gptneo_fast, assistant_model=str(DEMO), max_new_tokens=12, do_sample=False)
    assert named(TEXT) == both[1](TEXT, max_new_tokens=12, do_sample=False)
    assert len(drafted) == 1 and type(drafted[0]) is gptneo_fast.GPTNeoForCausalLM and drafted[0] is not named.model
    with pytest.raises(InputError, match="num_beams above 1 goes neither with assistant_model"):
        named(TEXT, num_beams=2)
    with pytest.raises(GPTNeoFastError, match="no-such-folder"):
        made(gptneo_fast, assistant_model="./no-such-folder")
