"""What `generate` refuses, before anything is launched: options, ids and names."""

import pytest
import torch

import gptneo_fast
from gptneo_fast.errors import InputError, UnknownOptionError
from tests.support.peers import peers
from tests.support.prompts import prompt


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    return peers(pad_token_id=0, scale=6.0)


BAD = [
    ({"max_new_tokens": -1}, "max_new_tokens=-1 is not an integer from 0"),
    ({"max_new_tokens": 10**9}, "past the model's 640 positions"),
    ({"max_new_tokens": 1.5}, "max_new_tokens=1.5"),
    ({"max_new_tokens": True}, "max_new_tokens=True"),
    ({"max_length": 5}, "the prompt has 11 tokens and max_length is 5"),
    ({"temperature": -1}, "temperature=-1"),
    ({"temperature": float("nan")}, "temperature=nan"),
    ({"temperature": float("inf")}, "temperature=inf"),
    ({"temperature": "1"}, "temperature='1'"),
    ({"top_p": -1}, "top_p=-1 is not a number from 0 to 1"),
    ({"top_p": 1.5}, "top_p=1.5"),
    ({"top_p": float("nan")}, "top_p=nan"),
    ({"top_k": -1}, "top_k=-1"),
    ({"min_p": 2}, "min_p=2"),
    ({"repetition_penalty": 0}, "repetition_penalty=0"),
    ({"repetition_penalty": float("inf")}, "repetition_penalty=inf"),
    ({"num_beams": 0}, "num_beams=0"),
    ({"num_return_sequences": 2}, "needs do_sample=True or num_beams"),
    ({"num_return_sequences": 3, "num_beams": 2}, "num_return_sequences=3 exceeds num_beams=2"),
    ({"stop_strings": ""}, "stop_strings=''"),
    ({"stop_strings": ["x"] * 10000}, "stop_strings="),
    ({"stop_strings": "x"}, "stop_strings needs a tokenizer"),
    ({"eos_token_id": 97}, "eos_token_id 97 is not in the vocabulary of 97"),
    ({"eos_token_id": -2}, "eos_token_id -2"),
    ({"seed": -1}, "seed=-1"),
    ({"seed": 2**64}, "seed="),
    ({"seed": 1.0}, "seed=1.0"),
    ({"bad_words_ids": [[]]}, "bad_words_ids"),
    ({"bad_words_ids": [[200]]}, "bad_words_ids names token 200"),
    ({"sequence_bias": {(200,): 1.0}}, "sequence_bias names token 200"),
    ({"penalty_alpha": 0.6}, "penalty_alpha=0.6 is not offered: .* use top_p"),
    ({"num_beam_groups": 2}, "num_beam_groups=2 is not offered: use num_beams"),
    ({"watermarking_config": {}}, "watermarking_config=.* logits_processor"),
    ({"constraints": [1]}, "prefix_allowed_tokens_fn"),
    ({"dola_layers": "high"}, "dola_layers='high' is not offered"),
    ({"cache_implementation": "static"}, "bounded"),
    ({"prompt_lookup_num_tokens": 3, "num_beams": 2}, "prompt_lookup_num_tokens does not go with num_beams"),
    ({"attention_mask": torch.ones(1, 4)}, r"attention_mask has shape \[1, 4\], input_ids \[1, 11\]"),
    ({"attention_mask": torch.zeros(1, 11)}, "row 0 of attention_mask is all padding"),
]


@pytest.mark.parametrize(("options", "words"), BAD, ids=lambda v: str(v)[:50])
def test_bad_options_are_refused_before_any_launch(models, options, words, monkeypatch):
    model = models[1]
    monkeypatch.setattr(type(model.transformer), "run", lambda *a, **k: pytest.fail("the model ran"))
    batch = {k: v for k, v in prompt("one").items() if k not in options}
    with pytest.raises(InputError, match=words):
        model.generate(**batch, **options)


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (torch.tensor([[5, 97]]), r"input_ids\[0, 1\] is 97; it must be from 0 to 96"),
        (torch.tensor([[5, -1]]), r"input_ids\[0, 1\] is -1"),
        (torch.tensor([[5, 2**40]]), "input_ids"),
        (torch.tensor([[5.0, 6.0]]), "give integers"),
        (torch.tensor([[True, False]]), "give integers"),
        (torch.zeros(1, 2, 3, dtype=torch.long), "shape"),
        (torch.zeros(1, 0, dtype=torch.long), "shape"),
        ([[1, 2]], "list"),
        (torch.full((1, 641), 5), "640"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_bad_ids_are_refused(models, ids, words):
    with pytest.raises(InputError, match=words):
        models[1].generate(ids)


def test_ids_that_are_fine(models):
    _, model = models
    ids = prompt("one", T=12)["input_ids"]
    expected = model.generate(ids[:, :-1].contiguous(), max_new_tokens=4)
    for same in (ids[:, :-1], ids[0, :-1], ids[:, :-1].int()):
        assert torch.equal(model.generate(same, max_new_tokens=4), expected)
    assert torch.equal(model.generate(ids, max_new_tokens=0), ids)
    assert torch.equal(model.generate(inputs=ids, temperature=0.0, do_sample=True), model.generate(ids))


def test_an_unknown_option_is_a_type_error_with_the_nearest_name(models):
    with pytest.raises(UnknownOptionError, match="no option 'max_new_token'; did you mean 'max_new_tokens'"):
        models[1].generate(**prompt("one"), max_new_token=5)
    with pytest.raises(TypeError):
        models[1].generate(**prompt("one"), temprature=5)
    with pytest.raises(UnknownOptionError, match="did you mean 'top_k'"):
        gptneo_fast.GenerationConfig().topk = 3
