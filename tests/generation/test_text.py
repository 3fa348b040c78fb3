"""Strings in and out: generate_text, stop strings, prompts of every kind, pipeline, scripts of model cards."""

import io
import sys

import pytest
import torch

import gptneo_fast
from gptneo_fast.demo import FOLDER
from gptneo_fast.errors import InputError, NonFiniteLogitsError, SetupError
from gptneo_fast.generation import text as texts
from gptneo_fast.generation.request import Request
from gptneo_fast.generation.session import Session

TALES = ["Once upon a time", "Long ago there was a brave", "One morning the little fox went", "The"]


@pytest.fixture(scope="module")
def model():
    return gptneo_fast.load(FOLDER, dtype="float32", device="cpu")


def test_a_string_gives_a_string_and_a_list_a_list_in_its_order(model):
    options = dict(max_new_tokens=25)
    alone = [model.generate_text(t, **options) for t in TALES]
    assert all(isinstance(t, str) and t for t in alone)
    assert model.generate_text(TALES, **options) == alone
    assert model.generate_text(TALES[::-1] * 12, **options) == alone[::-1] * 12  # more than one batch
    assert model.generate_text([], **options) == []
    assert model.generate_text(TALES[:1], return_full_text=True, **options) == [TALES[0] + alone[0]]


def test_an_error_in_the_middle_reaches_the_consumer_and_the_model_stays_usable(model, monkeypatch):
    before = model.generate_text(TALES[0], max_new_tokens=5)
    run, calls = type(model.transformer).run, []

    def breaks(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("out of luck")
        return run(self, *args, **kwargs)

    monkeypatch.setattr(type(model.transformer), "run", breaks)
    seen = []
    pieces = model.stream(TALES[0], max_new_tokens=50)
    with pytest.raises(RuntimeError, match="out of luck"):
        seen.extend(pieces)
    assert seen
    monkeypatch.undo()
    assert model.generate_text(TALES[0], max_new_tokens=5) == before


def test_a_stop_string_ends_the_text_and_is_not_part_of_it(model):
    whole = model.generate_text(TALES[0], max_new_tokens=60)
    for stop in (whole[20:23], whole[30:45], [whole[40], "never said"], whole[:2]):
        first = min(at for s in ([stop] if isinstance(stop, str) else stop) if (at := whole.find(s)) >= 0)
        expected = whole[:first]
        assert model.generate_text(TALES[0], max_new_tokens=60, stop_strings=stop) == expected
        assert "".join(model.stream(TALES[0], max_new_tokens=60, stop_strings=stop)) == expected
        texts = model.generate_text(TALES, max_new_tokens=60, stop_strings=stop)
        assert texts[0] == expected


def test_stop_strings_end_generate_where_transformers_ends(model):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPTNeoForCausalLM.from_pretrained(FOLDER, dtype=torch.float32, attn_implementation="eager")
    tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)
    batch = tokenizer(TALES[0], return_tensors="pt")
    text = model.generate_text(TALES[0], max_new_tokens=80)
    for stop in (text[10:12], text[31:50], ["zzz", text[25:27]], " ", TALES[0][-3:] + text[:2]):
        a = theirs.generate(**batch, stop_strings=stop, tokenizer=tokenizer, max_new_tokens=80)
        assert torch.equal(model.generate(**batch, stop_strings=stop, max_new_tokens=80), a)
        assert torch.equal(model.generate(**batch, stop_strings=stop, tokenizer=tokenizer, max_new_tokens=80), a)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=str)
def test_prompts_with_broken_logits_are_named_by_their_place_and_no_text_is_lost(model, options, monkeypatch):
    monkeypatch.setattr(texts, "_BATCH", 2)  # several batches, sorted by length: the caller's places are others
    tales = [TALES[0], "x", TALES[1] + TALES[2], "The dog and the cat", TALES[2]]
    whole = model.generate_text(tales, max_new_tokens=9, **options)
    poisoned = model.tokenizer.encode("x")[0]
    feed, steps = Session.feed, []

    def breaks(self, ids, keep=1):
        logits, rows = feed(self, ids, keep), (ids == poisoned).any(1) & (ids[:, -1] != poisoned)
        steps.append(int(rows.sum()))
        return logits.masked_fill(rows[:, None, None], float("nan")) if sum(map(bool, steps)) > 3 else logits

    monkeypatch.setattr(Session, "feed", breaks)
    monkeypatch.setattr(Request, "alone", False)  # whose steps are not fed one by one
    with pytest.raises(NonFiniteLogitsError, match="logits of prompt 1 were NaN or infinite after 5 tokens") as error:
        model.generate_text(tales, max_new_tokens=9, **options)
    found = error.value
    assert (found.rows, found.columns) == ([1], [5]) and [found.texts[i] for i in (0, 2, 3, 4)] == [
        whole[i] for i in (0, 2, 3, 4)
    ]
    assert found.texts[1] and len(found.texts[1]) < len(whole[1]) and (options or whole[1].startswith(found.texts[1]))


def test_a_row_with_broken_logits_ends_and_the_others_go_on(model):
    batch = model.tokenizer.pad(
        [model.tokenizer.encode(t) for t in TALES[:3]], pad_token_id=0, padding_side="left", return_tensors="pt"
    )
    T = batch.input_ids.shape[1]
    whole = model.generate(**batch, max_new_tokens=12)
    step, seen = type(model).step, 0

    def breaks(*args):
        nonlocal seen
        seen += 1
        out = step(model, *args)
        if seen == 5:
            out[1] = float("nan")
        return out

    model.step = breaks
    try:
        with pytest.raises(NonFiniteLogitsError, match="row 1 were NaN or infinite") as error:
            model.generate(**batch, max_new_tokens=12, pad_token_id=0)
        assert error.value.rows == [1]
        got = error.value.sequences
        assert torch.equal(got[[0, 2]], whole[[0, 2]])
        assert torch.equal(got[1, : T + 4], whole[1, : T + 4]) and (got[1, T + 4 :] == 0).all()
        seen = 0
        assert model.generate(**batch, max_new_tokens=12, remove_invalid_values=True).shape == whole.shape
    finally:
        del model.step


def test_processors_that_leave_no_token_are_named(model):
    def nothing(ids, scores):
        return torch.full_like(scores, -float("inf"))

    ids = model.tokenizer(TALES[0], return_tensors="pt").input_ids
    with pytest.raises(InputError, match=r"no token can be chosen for row 0: .*nothing"):
        model.generate(ids, logits_processor=[nothing], do_sample=True)


def test_a_prompt_that_no_token_is_left_for_is_named_by_its_place(model, monkeypatch):
    monkeypatch.setattr(texts, "_BATCH", 1)  # the longest prompt is the first batch, and row 0 of it
    with pytest.raises(InputError, match="no token can be chosen for row 1: SuppressTokens"):
        model.generate_text(["x", TALES[1]], suppress_tokens=list(range(model.config.vocab_size)))


def test_prompts_that_are_empty_or_too_long(model):
    assert model.generate_text("", max_new_tokens=8) == model.generate_text("<|endoftext|>", max_new_tokens=8)
    with pytest.raises(InputError, match="the prompt is empty"):
        model.generate_text(["a", ""], allow_empty=False)
    long = "Once upon a time there was a fox. " * 80
    with pytest.raises(InputError, match=r"past the model's 512 positions|tokens and the model 512 positions"):
        model.generate_text(long, max_new_tokens=8)
    text = model.generate_text(long, max_new_tokens=8, truncate="left")
    ids = model.tokenizer(long, return_tensors="pt").input_ids[:, -504:]
    assert text == model.tokenizer.decode(model.generate(ids, max_new_tokens=8)[0, 504:])
    with pytest.raises(InputError, match="truncate='right'"):
        model.generate_text("x", truncate="right")


@pytest.mark.parametrize("prompt", [None, b"bytes", 7, ["a", None], "\ud800"], ids=repr)
def test_prompts_that_are_no_text(model, prompt):
    with pytest.raises(InputError):
        model.generate_text(prompt)


def test_a_text_of_millions_of_characters_costs_what_its_positions_may_hold(model, monkeypatch):
    encode, lengths = type(model.tokenizer).encode, []

    def counted(self, text, *args, **options):
        lengths.append(len(text))
        return encode(self, text, *args, **options)

    monkeypatch.setattr(type(model.tokenizer), "encode", counted)
    huge = "".join(f"The fox saw {i} birds.\n" for i in range(200_000))
    with pytest.raises(InputError, match=rf"the prompt has {len(huge)} characters, which are at least \d+ tokens, past .* 512"):
        model.generate_text(huge, max_new_tokens=4)
    assert not lengths
    cut = model.generate_text(huge, max_new_tokens=4, truncate="left")
    assert lengths.pop() < 100_000
    assert cut == model.generate_text(huge[-60_000:], max_new_tokens=4, truncate="left")
    solid = "x" * 300_000  # no word begins in it
    assert model.generate_text(solid, max_new_tokens=4, truncate="left") and lengths[-1] == len(solid)


def test_a_model_without_a_tokenizer_says_what_to_do():
    model = gptneo_fast.GPTNeoForCausalLM.from_pretrained(FOLDER)
    with pytest.raises(SetupError, match=r"set model\.tokenizer"):
        model.generate_text("x")


def test_long_work_shows_a_bar_at_a_terminal_only(model, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for stderr, shown in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stderr)
        model.generate_text(["The"] * 40, max_new_tokens=1)
        assert ("40/40" in stderr.getvalue()) == shown
        model.generate_text(["The"] * 4, max_new_tokens=1)
        assert stderr.getvalue().count("4/4") == 0
    monkeypatch.setattr(sys, "stderr", stderr := io.StringIO())
    model.generate_text(["The"], max_new_tokens=1, progress=True)
    assert "1/1" in stderr.getvalue()


# Scripts, as they stand on the model cards of EleutherAI/gpt-neo-125m and -1.3B and in the documentation of GPT-Neo, on a
# local checkpoint that transformers wrote; only the import line is ours.


def test_the_script_of_the_documentation(checkpoint):
    import transformers

    texts = []
    for module in (transformers, gptneo_fast):
        GPTNeoForCausalLM, GPT2Tokenizer = module.GPTNeoForCausalLM, module.GPT2Tokenizer
        model = GPTNeoForCausalLM.from_pretrained(checkpoint)
        tokenizer = GPT2Tokenizer.from_pretrained(checkpoint)
        prompt = "In a shocking finding, scientists discovered a herd of unicorns living in a remote valley."
        input_ids = tokenizer(prompt, return_tensors="pt").input_ids
        torch.manual_seed(0)
        gen_tokens = model.generate(input_ids, do_sample=True, temperature=0.9, max_length=100)
        texts.append(tokenizer.batch_decode(gen_tokens)[0])
    assert texts[0] == texts[1] and texts[0].startswith(prompt)


def test_the_script_of_the_model_cards(checkpoint):
    import transformers

    results = []
    for module in (transformers, gptneo_fast):
        pipeline = module.pipeline
        generator = pipeline("text-generation", model=str(checkpoint))
        module.set_seed(5)
        results.append(generator("EleutherAI has", do_sample=True, min_length=20))
        # A list goes through a DataLoader there, which takes a number from the generator: compared without sampling.
        results.append(generator(["EleutherAI has", "The fox"], max_new_tokens=9, do_sample=False, return_full_text=False))
        module.set_seed(7)
        results.append(generator("The fox", max_length=30, do_sample=False))
    assert results[:3] == results[3:]
    assert results[0][0]["generated_text"].startswith("EleutherAI has")


def test_auto_classes_and_a_batch_of_a_transformers_tokenizer(checkpoint):
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
    batch = tokenizer(["The little fox", "Once upon a time there"], return_tensors="pt", padding=True)
    outs = []
    for module in (transformers, gptneo_fast):
        model = module.AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="eager")
        outs += [model(**batch).logits[batch.attention_mask.bool()], model.generate(**batch, max_new_tokens=9, pad_token_id=0)]
    torch.testing.assert_close(outs[0], outs[2], rtol=1e-4, atol=1e-4)
    assert torch.equal(outs[1], outs[3])
    assert gptneo_fast.AutoConfig.from_pretrained(checkpoint).model_type == "gpt_neo"
    ours = gptneo_fast.AutoTokenizer.from_pretrained(checkpoint, use_fast=True)
    assert ours("The fox").input_ids == tokenizer("The fox").input_ids
    assert isinstance(gptneo_fast.AutoModel.from_pretrained(checkpoint), gptneo_fast.GPTNeoModel)
    with pytest.raises(InputError, match="from_pretrained"):
        gptneo_fast.AutoModel()


def test_auto_classes_refuse_other_architectures(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    for name in ("AutoModelForCausalLM", "AutoConfig"):
        with pytest.raises(gptneo_fast.GPTNeoFastError, match=r"gpt2.*gpt_neo.* only"):
            getattr(gptneo_fast, name).from_pretrained(tmp_path)


def test_pipelines_of_other_tasks_are_refused(checkpoint):
    with pytest.raises(InputError, match="use one of text-generation, text-classification"):
        gptneo_fast.pipeline("summarization", model=str(checkpoint))
    with pytest.raises(InputError, match="needs model"):
        gptneo_fast.pipeline("text-generation")
