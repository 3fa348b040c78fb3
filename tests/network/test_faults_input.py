"""Faults of prompts and calls, 44 to 56, beyond those in test_generate.py and test_text.py: each names value and limit."""

import numpy as np
import pytest
import torch

import gptneo_fast
from gptneo_fast.demo import FOLDER
from gptneo_fast.errors import CacheError, InputError, NonFiniteLogitsError, UnknownOptionError
from gptneo_fast.generation.request import Request
from gptneo_fast.generation.session import Session
from tests.support.peers import SMALL, peers

CLASSES = [
    gptneo_fast.GPTNeoModel,
    gptneo_fast.GPTNeoForCausalLM,
    gptneo_fast.GPTNeoForSequenceClassification,
    gptneo_fast.GPTNeoForTokenClassification,
    gptneo_fast.GPTNeoForQuestionAnswering,
]


@pytest.fixture(scope="module")
def demo():
    model = gptneo_fast.load(FOLDER, dtype="float32", device="cpu")
    model.tokenizer.pad_token = model.tokenizer.eos_token
    return model


@pytest.fixture(scope="module", params=CLASSES, ids=lambda c: c.__name__)
def model(request):
    torch.manual_seed(0)
    return request.param(gptneo_fast.GPTNeoConfig(**SMALL, pad_token_id=0)).eval()


@pytest.fixture(scope="module")
def causal():
    torch.manual_seed(0)
    return peers(scale=4)[1]


def refused(model, words, *args, monkeypatch, kind=InputError, **kwargs):
    """A forward call is refused before the trunk runs, and the model answers the next call."""
    with monkeypatch.context() as patch:
        patch.setattr(type(model.base_model), "run", lambda *a, **k: pytest.fail("the model ran"))
        with pytest.raises(kind, match=words):
            model(*args, **kwargs)
    assert torch.isfinite(model(torch.tensor([[5, 6, 7]]))[0]).all()


def test_44_an_empty_prompt_is_the_beginning_of_a_text_or_an_error(demo):
    begun = demo.generate_text("", max_new_tokens=6)
    assert "".join(demo.stream("", max_new_tokens=6)) == begun
    assert demo.generate_text(["", "The"], max_new_tokens=6)[0] == begun
    assert demo.generate_text([]) == []
    for call in (lambda: demo.generate_text(["a", ""], allow_empty=False), lambda: demo.stream("", allow_empty=False)):
        with pytest.raises(InputError, match="the prompt is empty"):
            call()


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (torch.tensor([[5, 97]]), r"input_ids\[0, 1\] is 97; it must be from 0 to 96"),
        (torch.tensor([[5, 6], [-1, 5]]), r"input_ids\[1, 0\] is -1; it must be from 0 to 96"),
        (torch.tensor([[2**40]]), r"input_ids\[0, 0\] is 1099511627776"),
        (torch.tensor([[float("nan")]]), r"input_ids is torch\.float32; give integers"),
        (torch.tensor([[True]]), r"input_ids is torch\.bool; give integers"),
        (torch.zeros(1, 2, 3, dtype=torch.long), r"input_ids has shape \[1, 2, 3\]; expected \[B, T\]"),
        (torch.zeros(2, 0, dtype=torch.long), r"input_ids has shape \[2, 0\]"),
        (torch.ones(1, 2, dtype=torch.long, device="meta"), r"input_ids is on meta, the model on cpu; move it with"),
        ([[5, 6]], "input_ids is a list; give an integer tensor"),
        ("text", "input_ids is a str; give an integer tensor"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_45_and_46_ids_that_are_none_are_refused_by_every_class(model, ids, words, monkeypatch):
    refused(model, words, ids, monkeypatch=monkeypatch)


@pytest.mark.parametrize(("name", "limit"), [("token_type_ids", 96), ("position_ids", 639)])
def test_45_other_ids_have_limits_of_their_own(model, name, limit, monkeypatch):
    x = torch.tensor([[5, 6]])
    refused(
        model,
        rf"{name}\[0, 1\] is {limit + 1}; it must be from 0 to {limit}",
        x,
        monkeypatch=monkeypatch,
        **{name: torch.tensor([[0, limit + 1]])},
    )
    refused(model, rf"{name} is torch\.float32", x, monkeypatch=monkeypatch, **{name: torch.tensor([[0.0, 1.0]])})


@pytest.mark.parametrize("cls", CLASSES[1:4], ids=lambda c: c.__name__)
def test_45_labels_of_another_kind_or_shape_are_named(cls):
    model = cls(gptneo_fast.GPTNeoConfig(**SMALL, pad_token_id=0, num_labels=3, problem_type="single_label_classification"))
    x = torch.randint(3, 97, (2, 4))
    for labels in ([[1, 1]], "x", torch.ones(2, 4), torch.ones(2, 4) > 0, torch.ones(3, 4).long(), torch.ones(4, 2).long()):
        with pytest.raises(InputError, match=r"labels (is a list|is a str|is torch\.|has shape)"):
            model(x, labels=labels)


@pytest.mark.parametrize("cls", CLASSES[1:4], ids=lambda c: c.__name__)
def test_45_labels_beyond_the_classes_are_named_before_the_loss(cls):
    model = cls(gptneo_fast.GPTNeoConfig(**SMALL, pad_token_id=0, num_labels=3))
    x = torch.randint(3, 97, (2, 4))
    limit = 97 if cls is gptneo_fast.GPTNeoForCausalLM else 3
    labels = torch.tensor([0, 2]) if cls is gptneo_fast.GPTNeoForSequenceClassification else torch.full((2, 4), 2)
    good = labels.clone()
    good.view(-1)[0] = -100
    assert torch.isfinite(model(x, labels=good).loss)
    for value in (limit, -1, 2**40):
        bad = labels.clone()
        bad.view(-1)[1] = value
        with pytest.raises(InputError, match=rf"labels\[.*1\] is {value}; it must be from 0 to {limit - 1}, or -100"):
            model(x, labels=bad)


def test_46_ids_of_any_integer_kind_and_strides_are_fine(model):
    x = torch.randint(3, 97, (2, 9))
    expected = model(x[:, :-1].contiguous())[0]
    for same in (x[:, :-1], x[:, :-1].int(), x[:, :-1].short(), x.t().contiguous().t()[:, :-1], x[:, :-1].to(torch.uint8)):
        assert torch.equal(model(same)[0], expected)
    assert torch.equal(model(x[0, :-1])[0].flatten(), model(x[:1, :-1])[0].flatten())


def test_47_more_than_the_positions_is_refused_with_the_numbers(model, causal, monkeypatch):
    long = torch.full((1, 641), 5)
    refused(model, r"0 cached \+ 641 new tokens exceed the model's 640 positions", long, monkeypatch=monkeypatch)
    with pytest.raises(InputError, match=r"630.*20.*640|640"):
        causal.generate(long[:, :630], max_new_tokens=20)
    embeds = causal.get_input_embeddings()(long[:, :630])
    with pytest.raises(InputError, match="640"):
        causal.generate(inputs_embeds=embeds, attention_mask=torch.arange(630)[None] > 3, max_new_tokens=20)
    cache = causal(long[:, :600]).past_key_values
    with pytest.raises(InputError, match=r"600 cached \+ 41 new tokens exceed the model's 640 positions"):
        causal(long[:, :41], past_key_values=cache)
    assert causal(long[:, :40], past_key_values=cache).past_key_values.get_seq_length() == 640


def test_51_masks_are_refused_handled_or_taken_as_they_are(model, causal, monkeypatch):
    x = torch.randint(3, 97, (2, 5))
    for shape in ((2, 4), (3, 5), (5,), (2, 1, 5)):
        refused(model, "attention_mask", x, attention_mask=torch.ones(shape), monkeypatch=monkeypatch)
    assert torch.isfinite(model(x, attention_mask=torch.tensor([[0] * 5, [1] * 5]))[0]).all()  # a row of zeros: zeros
    with pytest.raises(InputError, match="row 1 of attention_mask is all padding"):
        causal.generate(x, attention_mask=torch.tensor([[1] * 5, [0] * 5]))


RIGHT = [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}, {"repetition_penalty": 1.3}, {"use_cache": False}]


@pytest.mark.parametrize("options", RIGHT, ids=str)
@pytest.mark.parametrize("embeds", [False, True])
def test_51_a_prompt_padded_on_the_right_continues_as_it_would_alone(causal, options, embeds):
    if embeds and "use_cache" in options:
        pytest.skip("inputs_embeds need the cache")
    x, mask = torch.randint(3, 97, (4, 12)), torch.ones(4, 12, dtype=torch.long)
    mask[0, 7:], mask[1, :3], mask[2, :2], mask[2, 9:] = 0, 0, 0, 0  # right, left, both, none
    options = dict(max_new_tokens=10, pad_token_id=0, eos_token_id=2, **options)
    many = options.get("num_return_sequences", 1)

    def run(x, mask):
        if not embeds:
            return causal.generate(x, attention_mask=mask, **options)
        return causal.generate(inputs_embeds=causal.get_input_embeddings()(x), attention_mask=mask, **options)

    out = run(x, mask)
    if not embeds:
        assert torch.equal(out[:, :12], x.repeat_interleave(many, 0))  # prompts come back as they were given
        out = out[:, 12:]
    for i in range(4):
        tokens = x[i : i + 1, mask[i].bool()]
        alone = run(tokens, torch.ones_like(tokens))[:, 0 if embeds else tokens.shape[1] :]
        got = out[i * many : (i + 1) * many]
        assert torch.equal(got[:, : alone.shape[1]], alone) and (got[:, alone.shape[1] :] == 0).all()


def test_51_right_padding_behind_a_cache_is_refused(causal):
    x = torch.randint(3, 97, (1, 6))
    cache = causal(x[:, :2]).past_key_values
    with pytest.raises(InputError, match="padded on the right cannot continue past_key_values"):
        causal.generate(x, attention_mask=torch.tensor([[1, 1, 1, 1, 1, 0]]), past_key_values=cache)


def test_52_an_end_token_of_the_configuration_may_lie_beyond_a_small_vocabulary(causal):
    x = torch.randint(3, 97, (1, 5))
    config = causal.generation_config
    before = config.eos_token_id
    try:
        config.eos_token_id = 50256
        assert causal.generate(x, max_new_tokens=5).shape == (1, 10)
        with pytest.raises(InputError, match="eos_token_id 50256 is not in the vocabulary of 97"):
            causal.generate(x, max_new_tokens=5, eos_token_id=50256)
    finally:
        config.eos_token_id = before


def test_53_an_unknown_keyword_is_a_type_error_with_the_nearest_one(model, demo, monkeypatch):
    refused(
        model,
        "no argument 'atention_mask'; did you mean 'attention_mask'",
        torch.tensor([[5]]),
        atention_mask=None,
        kind=UnknownOptionError,
        monkeypatch=monkeypatch,
    )
    assert issubclass(UnknownOptionError, TypeError)
    calls = {
        "did you mean 'max_new_tokens'": [
            lambda: demo.generate_text("x", max_new_token=3),
            lambda: demo.stream("x", max_new_token=3),
            lambda: gptneo_fast.pipeline("text-generation", model=FOLDER)("x", max_new_token=3),
        ],
        "did you mean 'revision'": [lambda: type(demo).from_pretrained(FOLDER, revison="main")],
    }
    for words, several in calls.items():
        for call in several:
            with pytest.raises(UnknownOptionError, match=words):
                call()


@pytest.fixture
def break_at_step_4(monkeypatch):
    """Call it with a value, and the logits of the fourth step of a generation have it."""

    def arm(value):
        feed, calls = Session.feed, []

        def breaks(self, *args, **kwargs):
            calls.append(1)
            logits = feed(self, *args, **kwargs)
            return torch.full_like(logits, value) if len(calls) == 4 else logits

        monkeypatch.setattr(Session, "feed", breaks)
        monkeypatch.setattr(Request, "alone", False)  # whose steps are not fed one by one

    return arm


STRATEGIES = [{}, {"do_sample": True, "seed": 1}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 3}]


@pytest.mark.parametrize("options", STRATEGIES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_56_logits_that_break_end_the_row_with_an_error_in_every_strategy(demo, options, value, break_at_step_4, monkeypatch):
    ids = demo.tokenizer("Once upon a time", return_tensors="pt").input_ids
    P, expected = ids.shape[1], demo.generate(ids, max_new_tokens=20, **options)
    break_at_step_4(value)
    with pytest.raises(NonFiniteLogitsError, match="row 0 were NaN or infinite") as error:
        demo.generate(ids, max_new_tokens=20, **options)
    assert error.value.rows == [0]
    if "num_beams" not in options:
        assert torch.equal(error.value.sequences[:, : P + 3], expected[:, : P + 3])
    monkeypatch.undo()
    assert torch.equal(demo.generate(ids, max_new_tokens=20, **options), expected)


def test_56_a_stream_gives_what_was_whole_and_then_the_error(demo, break_at_step_4, monkeypatch):
    whole, pieces = demo.generate_text("Once upon a time", max_new_tokens=8), []
    break_at_step_4(float("nan"))
    with pytest.raises(NonFiniteLogitsError):
        pieces.extend(demo.stream("Once upon a time", max_new_tokens=8))
    monkeypatch.undo()
    assert pieces and whole.startswith("".join(pieces))
    assert "".join(demo.stream("Once upon a time", max_new_tokens=8)) == whole


def test_56_a_broken_prompt_of_a_beam_search_leaves_the_others_whole(demo, monkeypatch):
    tales = ["Once upon a time", "Long ago there was a brave", "The"]
    batch = demo.tokenizer(tales, padding=True, padding_side="left", return_tensors="pt")
    options = dict(num_beams=3, num_return_sequences=2, max_new_tokens=12, pad_token_id=0)
    P, expected = batch.input_ids.shape[1], demo.generate(**batch, **options)
    feed, calls = Session.feed, []

    def breaks(self, *args, **kwargs):
        calls.append(1)
        logits = feed(self, *args, **kwargs)
        if len(calls) == 4:
            logits[4] = float("nan")  # the second beam of the second prompt
        return logits

    monkeypatch.setattr(Session, "feed", breaks)
    with pytest.raises(NonFiniteLogitsError, match="row 2, 3 were NaN") as error:
        demo.generate(**batch, **options)
    got = error.value.sequences
    assert error.value.rows == [2, 3]
    assert torch.equal(got[[0, 1, 4, 5]], expected[[0, 1, 4, 5]])
    assert torch.equal(got[2, :P], batch.input_ids[1]) and (got[2, P + 3 :] == 0).all() and (got[2, P : P + 3] != 0).all()
    calls.clear()
    assert demo.generate(**batch, **options, remove_invalid_values=True).shape == expected.shape


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"attention_mask": [[1] * 4] * 2}, "attention_mask is a list"),
        ({"attention_mask": "x"}, "attention_mask is a str"),
        ({"token_type_ids": torch.zeros(2, 9, dtype=torch.long)}, r"token_type_ids has shape \[2, 9\]; expected \[2 or 1, 4\]"),
        ({"token_type_ids": torch.zeros(3, 4, dtype=torch.long)}, r"token_type_ids has shape \[3, 4\]"),
        ({"logits_to_keep": 1.5}, r"logits_to_keep 1\.5 is no integer"),
        ({"logits_to_keep": "x"}, "logits_to_keep 'x' is no integer"),
        ({"logits_to_keep": torch.tensor([4])}, r"position beyond the 4 of the input: \[4\]"),
        ({"logits_to_keep": torch.tensor([1.0])}, r"logits_to_keep is torch\.float32"),
        ({"input_ids": None, "inputs_embeds": [[[0.0]]]}, "inputs_embeds is a list"),
        ({"input_ids": None, "inputs_embeds": torch.zeros(2, 4, 32).double()}, "inputs_embeds is float64, the model"),
        ({"past_key_values": 5}, "past_key_values is a int"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_side_arguments_of_another_kind_or_shape_are_named(causal, arguments, words, monkeypatch):
    monkeypatch.setattr(type(causal.transformer), "run", lambda *a, **k: pytest.fail("the model ran"))
    if "logits_to_keep" in arguments:
        monkeypatch.undo()
    with pytest.raises((InputError, CacheError), match=words):
        causal(**({"input_ids": torch.randint(3, 97, (2, 4))} | arguments))


@torch.no_grad()
def test_positions_to_keep_are_numbers_of_any_library(causal):
    x = torch.randint(3, 97, (2, 4))
    whole = causal(x).logits
    for keep in (
        np.int64(2),
        torch.tensor(2),
        torch.tensor([2, 3]),
        [2, 3],
        torch.tensor([-2, -1]),
        torch.tensor([[2, 3], [-2, -1]]),
    ):
        torch.testing.assert_close(causal(x, logits_to_keep=keep).logits, whole[:, 2:])
