"""Pipelines that decide, as model cards call them."""

from pathlib import Path

import pytest

import gptneo_fast
from gptneo_fast.errors import GPTNeoFastError, InputError
from tests.support.peers import peers

transformers = pytest.importorskip("transformers")
DEMO = Path(gptneo_fast.__file__).parent / "demo" / "model"
TEXTS = ["a good day", "the little dog was very sad and it cried"]


def test_a_pipeline_has_the_names_of_scikit_learn_and_of_its_model():
    shape = dict(vocab_size=1240, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    models = peers("GPTNeoForSequenceClassification", **shape)
    made = []
    for of, model in zip((transformers, gptneo_fast), models, strict=True):
        tokenizer = of.AutoTokenizer.from_pretrained(DEMO)
        made.append(of.pipeline("text-classification", model=model, tokenizer=tokenizer))
    theirs, ours = made
    assert ours.predict(TEXTS) == ours.transform(TEXTS) == ours(TEXTS) == approximately(theirs.predict(TEXTS))
    assert (ours.device, ours.dtype) == (theirs.device, theirs.dtype)


@pytest.mark.parametrize("kind", ["single_label_classification", "multi_label_classification", "regression", None])
@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"top_k": None}, {"function_to_apply": "none"}], ids=str)
def test_texts_are_classified_as_in_transformers(kind, options):
    shape = dict(vocab_size=1240, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    theirs, ours = peers("GPTNeoForSequenceClassification", **shape, num_labels=1 if kind == "regression" else 3)
    theirs.config.problem_type = ours.config.problem_type = kind
    want = transformers.pipeline(
        "text-classification", model=theirs, tokenizer=transformers.AutoTokenizer.from_pretrained(DEMO)
    )
    for task in ("text-classification", "sentiment-analysis", None):
        got = gptneo_fast.pipeline(task, model=ours, tokenizer=gptneo_fast.AutoTokenizer.from_pretrained(DEMO))
        for text in (TEXTS, TEXTS[1]):
            if isinstance(text, str) and kind == "regression":
                continue
            assert got(text, **options) == approximately(want(text, **options))


def approximately(value):
    if not isinstance(value, dict):
        return [approximately(v) for v in value]
    return {"label": value["label"], "score": pytest.approx(value["score"], abs=1e-4)}


def test_a_model_that_cannot_do_the_task_is_refused(tmp_path):
    _, ours = peers("GPTNeoForTokenClassification")
    for task in ("text-generation", "text-classification"):
        with pytest.raises(InputError, match=f"task '{task}' needs a GPTNeoFor"):
            gptneo_fast.pipeline(task, model=ours)
    with pytest.raises(InputError, match="'summarization' is not offered"):
        gptneo_fast.pipeline("summarization", model=ours)
    with pytest.raises(InputError, match="top_k=0 is not an integer"):
        gptneo_fast.pipeline(model=peers("GPTNeoForSequenceClassification")[1])("x", top_k=0)


def test_a_model_that_gives_outputs_for_tensors_still_tells_a_text():
    model = gptneo_fast.load(DEMO, device="cpu")
    alone = gptneo_fast.pipeline("text-generation", model=model)("Once upon", max_new_tokens=4, do_sample=False)
    model.generation_config.update(return_dict_in_generate=True, output_hidden_states=True)
    assert gptneo_fast.pipeline("text-generation", model=model)("Once upon", max_new_tokens=4, do_sample=False) == alone


PAIR = {"text": "a good day", "text_pair": "it cried"}
CALLS = [
    (TEXTS[0], {"top_k": None}),
    (TEXTS[0], {"function_to_apply": "SIGMOID"}),
    (TEXTS, {"batch_size": 2}),
    ([PAIR, TEXTS[1]], {"batch_size": 2}),
    (PAIR, {}),
    (PAIR, {"top_k": 1}),
    ([[["a good day", "it cried"]]], {}),
    ("it cried " * 400, {"truncation": True}),
    (TEXTS, {"truncation": True, "max_length": 2}),
    (TEXTS[0], {"padding": "max_length", "max_length": 12}),
]


@pytest.mark.parametrize("told", [{}, {"top_k": 2}, {"top_k": None}, {"function_to_apply": "none", "batch_size": 2}], ids=str)
def test_texts_pairs_and_options_are_understood_as_in_transformers(told):
    shape = dict(vocab_size=1240, bos_token_id=0, eos_token_id=0, pad_token_id=0, num_labels=3)
    pipes = []
    for library, model in zip((transformers, gptneo_fast), peers("GPTNeoForSequenceClassification", **shape), strict=True):
        tokenizer = library.AutoTokenizer.from_pretrained(DEMO)
        tokenizer.pad_token = tokenizer.eos_token
        pipes.append(library.pipeline("text-classification", model=model, tokenizer=tokenizer, **told))
    for inputs, options in CALLS:
        want, got = (pipe(inputs, **options) for pipe in pipes)
        assert got == approximately(want), (inputs, options)
    want, got = (pipe(text for text in TEXTS) for pipe in pipes)
    assert list(got) == approximately(list(want))


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        (None, {}, "inputs is None"),
        (b"x", {}, "inputs is b'x'"),
        (["x", 3], {}, "inputs 1 is 3"),
        ({"txt": "x"}, {}, "inputs 0 is {'txt': 'x'}"),
        ([["x", "y"]], {}, "inputs 0 is "),
        ("x", {"top_k": "2"}, "top_k='2'"),
        ("x", {"top_k": -(10**400)}, r"top_k=-10+\.\.\. is not"),
        ("x", {"function_to_apply": 3}, "function_to_apply=3"),
        ("x", {"batch_size": "2"}, "batch_size='2'"),
        ("x", {"max_length": 10**400}, r"cut to 10+\.\.\. tokens"),
        ("x", {"truncation": 3}, "truncation is 3"),
        ("x", {"trunkation": True}, "did you mean 'truncation'"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_what_cannot_be_classified_is_named(inputs, options, message):
    model = peers("GPTNeoForSequenceClassification", vocab_size=1240, pad_token_id=0)[1]
    with pytest.raises(GPTNeoFastError, match=message):
        gptneo_fast.pipeline(model=model, tokenizer=DEMO)(inputs, **options)
