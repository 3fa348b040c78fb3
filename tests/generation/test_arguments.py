"""Side arguments of `generate`: of the right kind, shape and reach, or refused before anything is run or changed."""

import queue
import threading
from pathlib import Path

import pytest
import torch

import gptneo_fast
from gptneo_fast.errors import CacheError, InputError
from tests.support.peers import peers

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])
DEMO = Path(gptneo_fast.__file__).parent / "demo" / "model"
T, LIMIT = IDS.shape[1], 640


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    return peers(pad_token_id=0, scale=6.0)


def columns(name):
    return [
        ({name: torch.arange(3)[None]}, rf"{name} has shape \[1, 3\]; expected \[1 or 1, 6\]"),
        ({name: torch.arange(9)[None]}, rf"{name} has shape \[1, 9\]"),
        ({name: torch.zeros(3, T, dtype=torch.long)}, rf"{name} has shape \[3, 6\]"),
        ({name: torch.arange(T)[None] - 1}, rf"{name}\[0, 0\] is -1"),
        ({name: torch.arange(float(T))[None]}, f"{name} is torch.float32"),
        ({name: [[0, 1, 2, 3, 4, 5]]}, f"{name} is a list"),
        ({name: torch.tensor(1)}, f"{name} has shape"),
        ({name: "x"}, f"{name} is a str"),
    ]


BAD = [
    *columns("position_ids"),
    *columns("token_type_ids"),
    ({"position_ids": torch.arange(T)[None] + LIMIT - 8}, "position_ids end at 637 and 4 new tokens .* at most 3"),
    ({"attention_mask": torch.ones(1, 9)}, r"attention_mask has shape \[1, 9\]"),
    ({"attention_mask": -torch.ones(1, T)}, "attention_mask holds -1.0; 0 is padding"),
    ({"attention_mask": torch.full((1, T), 2.5)}, "attention_mask holds 2.5"),
    ({"attention_mask": torch.full((1, T), float("nan"))}, "attention_mask holds nan"),
    ({"attention_mask": torch.ones(1, T, T)}, "attention_mask has shape"),
    ({"attention_mask": [[1] * T]}, "attention_mask is a list; give a tensor"),
    ({"attention_mask": "x"}, "attention_mask is a str"),
    ({"input_ids": torch.zeros(0, 4, dtype=torch.long)}, "there is no prompt in it"),
    ({"input_ids": None, "inputs_embeds": [[1.0]]}, "inputs_embeds is a list"),
    ({"input_ids": None, "inputs_embeds": torch.zeros(1, 2, 32, dtype=torch.float64)}, "inputs_embeds is float64, the model"),
    ({"generation_config": {"max_new_tokens": 3}}, "give a GenerationConfig"),
    ({"assistant_model": "x"}, "assistant_model is a str; give a GPTNeoForCausalLM"),
    ({"guidance_scale": 1.5, "negative_prompt_ids": [[1, 2]]}, "negative_prompt_ids is a list"),
    (
        {"guidance_scale": 1.5, "negative_prompt_ids": torch.ones(1, 638, dtype=torch.long)},
        "638 tokens and 4 new ones make 642",
    ),
    (
        {"guidance_scale": 1.5, "negative_prompt_ids": IDS, "negative_prompt_attention_mask": torch.ones(1, 2)},
        r"negative_prompt_attention_mask has shape \[1, 2\]",
    ),
    ({"logits_to_keep": -1}, "logits_to_keep=-1 is not an integer from 0"),
    ({"logits_to_keep": torch.tensor([0])}, r"logits_to_keep=tensor.* is not an integer"),
    ({"streamer": "x"}, r"streamer is 'x'; give an object with put\(ids\) and end\(\)"),
    ({"stop_strings": ["a"], "tokenizer": 5}, "stop_strings needs a tokenizer, and 5 is none"),
    ({"prefix_allowed_tokens_fn": 5}, "prefix_allowed_tokens_fn is 5"),
    ({"length_penalty": 1e6, "num_beams": 2}, "length_penalty=1000000.0 is not a number from -50 to 50"),
    ({"num_beams": 10**9}, "num_beams=1000000000 is not an integer from 1 to 4096"),
    ({"num_return_sequences": 10**9, "do_sample": True}, "num_return_sequences=1000000000"),
    ({"temperature": 10**400}, "temperature=1000.* is not a finite number"),
    ({"max_time": 10**400}, "max_time=1000.* is not a finite number"),
    ({"prefill_chunk_size": 2, "use_cache": False}, "need use_cache=True"),
    ({"prompt_lookup_num_tokens": 2, "use_cache": False}, "drafts are for one text and need the cache"),
    ({"num_beams": 2, "streamer": gptneo_fast.TextStreamer(None)}, "num_beams above 1 goes neither"),
]


@pytest.mark.parametrize(("options", "words"), BAD, ids=lambda v: str(v)[:60].replace("\n", " "))
def test_a_bad_argument_is_refused_before_anything_runs(models, options, words, monkeypatch):
    model = models[1]
    monkeypatch.setattr(type(model.transformer), "run", lambda *a, **k: pytest.fail("the model ran"))
    with pytest.raises(InputError, match=words):
        model.generate(**({"input_ids": IDS, "max_new_tokens": 4} | options))


def test_an_assistant_with_too_few_positions_is_refused(models):
    small = gptneo_fast.GPTNeoForCausalLM(models[1].config.replace(max_position_embeddings=8)).eval()
    with pytest.raises(InputError, match="come to 10 tokens and assistant_model has 8 positions"):
        models[1].generate(IDS, max_new_tokens=4, assistant_model=small)


@pytest.mark.parametrize(
    "bad",
    [
        {"num_return_sequences": 3, "do_sample": True, "stop_strings": "x"},
        {"num_beams": 2, "logits_processor": [5]},
        {"num_beams": 2, "position_ids": IDS[:, :2]},
        {"num_beams": 2, "assistant_model": "x"},
        {"max_new_tokens": 10**6, "num_beams": 2},
    ],
    ids=lambda bad: next(reversed(bad)),
)
def test_a_refused_call_leaves_the_cache_as_it_was(models, bad):
    model = models[1]
    cache = model(IDS[:, :4], use_cache=True).past_key_values
    before = [t.clone() for t in (*cache.keys, *cache.values, cache.lengths)]
    with pytest.raises(InputError):
        model.generate(IDS, past_key_values=cache, **({"max_new_tokens": 4} | bad))
    for old, new in zip(before, (*cache.keys, *cache.values, cache.lengths), strict=True):
        assert torch.equal(old, new)
    alone = model.generate(IDS, max_new_tokens=4)
    assert torch.equal(model.generate(IDS, max_new_tokens=4, past_key_values=cache), alone)


@pytest.mark.parametrize("times", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}], ids=str)
@pytest.mark.parametrize("widened", [False, True])  # by the caller, as transformers wants it, or by generate
def test_a_cache_of_the_prompt_serves_beams(models, times, widened):
    for model in models[not widened :]:
        cache = model(IDS[:, :4], use_cache=True).past_key_values
        if widened:
            cache.batch_repeat_interleave(3)
        found = model.generate(IDS, past_key_values=cache, max_new_tokens=6, **times)
        assert torch.equal(found, models[0].generate(IDS, max_new_tokens=6, **times))


@pytest.mark.parametrize("how", [{}, {"num_beams": 2}, {"prefill_chunk_size": 2}, {"token_type_ids": 2}], ids=str)
@pytest.mark.parametrize("past", [1, 4, 5])
@pytest.mark.parametrize("padding", [0, 2])
@torch.no_grad()
def test_embeddings_continue_a_cache(models, how, past, padding):
    ids, mask = torch.cat([IDS, IDS.flip(1)]), torch.ones(2, T, dtype=torch.long)
    mask[1, :padding] = 0
    found = []
    for model in models:
        more = {k: v if k != "token_type_ids" else ids.flip(0) for k, v in how.items()}
        if model is models[0]:
            more.pop("prefill_chunk_size", None)  # theirs runs the embeddings once for each chunk
        types = {"token_type_ids": more["token_type_ids"][:, :past]} if "token_type_ids" in more else {}
        places = (mask.cumsum(1) - 1).clamp(min=0)
        before = dict(attention_mask=mask[:, :past], position_ids=places[:, :past], use_cache=True) | types
        embeds = model.get_input_embeddings()(ids)
        kept = [model(ids[:, :past], **before).past_key_values for _ in range(2)]
        options = dict(attention_mask=mask, max_new_tokens=4, eos_token_id=None) | more
        if "num_beams" in how:
            for cache in kept:
                cache.batch_repeat_interleave(2)
        found.append(model.generate(inputs_embeds=embeds, past_key_values=kept[0], **options))  # all, as theirs takes them
        assert kept[0].get_seq_length() == T + 3
        if model is models[1]:  # those behind the cache, told by the mask; and with the ids, which are given back
            found.append(model.generate(inputs_embeds=embeds[:, past:], past_key_values=kept[1], **options))
            found.append(model.generate(ids, inputs_embeds=embeds, **options)[:, T:])
    assert all(torch.equal(found[0], other) for other in found)


def test_embeddings_that_a_cache_holds_already_are_refused(models):
    model = models[1]
    cache = model(IDS[:, :5], use_cache=True).past_key_values
    with pytest.raises(CacheError, match=r"holds 5 columns and inputs_embeds has 4: nothing is left .* an attention_mask over"):
        model.generate(inputs_embeds=model.transformer.wte(IDS[:, :4]), past_key_values=cache, max_new_tokens=2)
    assert cache.get_seq_length() == 5


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_a_cache_has_two_names(models, name):
    past = models[1](IDS[:, :4], use_cache=True).past_key_values
    found = models[1].generate(IDS, max_new_tokens=4, return_dict_in_generate=True, **{name: past})
    assert found.past_key_values is past and past.get_seq_length() == T + 3
    assert torch.equal(found.sequences, models[0].generate(IDS, max_new_tokens=4))


@pytest.mark.parametrize("cache", ["x", 5, object()], ids="str int object".split())
def test_what_is_no_cache_is_refused(models, cache):
    with pytest.raises(CacheError, match=r"past_key_values is a \w+; pass the KVCache"):
        models[1].generate(IDS, past_key_values=cache, max_new_tokens=2)


def test_positions_and_types_of_one_row_are_for_all(models):
    batch = IDS.repeat(2, 1)
    found = models[1].generate(batch, position_ids=torch.arange(T)[None] + 3, token_type_ids=IDS, max_new_tokens=3)
    wide = {"position_ids": (torch.arange(T)[None] + 3).repeat(2, 1), "token_type_ids": batch}
    assert torch.equal(found, models[0].generate(batch, **wide, max_new_tokens=3, attention_mask=torch.ones_like(batch)))


@pytest.mark.parametrize("how", [{}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 2}], ids=str)
def test_logits_to_keep_has_no_say(models, how):
    found = [model.generate(IDS, max_new_tokens=4, logits_to_keep=keep, **how) for model in models for keep in (0, 1, 3)]
    assert all(torch.equal(found[0], other) for other in found)


def test_two_hundred_times_one_end_token_is_one_end_token(models):
    for how in ({}, {"num_beams": 3}):
        many = models[1].generate(IDS, eos_token_id=[1] * 200, max_new_tokens=4, **how)
        assert torch.equal(many, models[1].generate(IDS, eos_token_id=1, max_new_tokens=4, **how))


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"do_sample": True, "seed": 1}], ids=str)
def test_an_end_token_of_minus_one_ends_no_text(models, how):
    found = models[1].generate(IDS, eos_token_id=-1, max_new_tokens=6, **how)
    assert found.shape == (1, T + 6)
    if "seed" not in how:
        assert torch.equal(found, models[0].generate(IDS, eos_token_id=-1, max_new_tokens=6, **how))


def test_beams_over_a_vocabulary_of_one():
    config = gptneo_fast.GPTNeoConfig(
        vocab_size=1,
        hidden_size=8,
        num_layers=1,
        num_heads=2,
        attention_types=[[["global"], 1]],
        eos_token_id=None,
        bos_token_id=0,
    )
    model = gptneo_fast.GPTNeoForCausalLM(config).eval()
    assert model.generate(torch.zeros(1, 3, dtype=torch.long), num_beams=2, max_new_tokens=3).tolist() == [[0] * 6]


def test_a_reader_of_a_refused_stream_hears_of_it():
    model, errors = gptneo_fast.load(DEMO, device="cpu"), queue.Queue()
    streamer = gptneo_fast.TextIteratorStreamer(model.tokenizer, timeout=20)

    def write():
        try:
            model.generate(IDS, streamer=streamer, temperature=-1)
        except InputError as error:
            errors.put(error)

    thread = threading.Thread(target=write)
    thread.start()
    with pytest.raises(InputError, match="temperature=-1"):
        list(streamer)
    thread.join()
    assert errors.get_nowait() is not None


def test_a_call_that_says_both_lengths_is_told_which_one_holds(models):
    with pytest.warns(gptneo_fast.errors.GPTNeoFastWarning, match="max_length has no say beside max_new_tokens"):
        found = models[1].generate(IDS, max_length=30, max_new_tokens=3, do_sample=False)
    assert found.shape == (1, T + 3)
    models[1].generation_config.max_length = 30  # a length of a file beside one of a call is as it should be
    assert torch.equal(models[1].generate(IDS, max_new_tokens=3, do_sample=False), found)
