"""Pipelines that decide, as model cards call them."""

from pathlib import Path

import pytest
import torch

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


SHAPE = dict(vocab_size=1240, bos_token_id=0, eos_token_id=0, pad_token_id=0)
ROOM = ("In a quiet valley there lived a merry boy named Ben. The fox was red, and the dog was blue. "
        "A king gave the girl some plums by the lake. ")  # fmt: skip


@pytest.mark.parametrize("strategy", [None, "simple", "first", "average", "max"])
@pytest.mark.filterwarnings("ignore:Tokenizer does not support real words")
def test_entities_are_those_of_transformers(strategy):
    labels = {0: "O", 1: "B-X", 2: "I-X", 3: "B-Y"}
    theirs, ours = peers("GPTNeoForTokenClassification", **SHAPE, num_labels=4)
    theirs.config.id2label = ours.config.id2label = labels
    options = {} if strategy is None else {"aggregation_strategy": strategy}
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO)
    want = transformers.pipeline("token-classification", model=theirs, tokenizer=tokenizer, **options)([TEXTS[0], ROOM])
    for task in ("token-classification", "ner", None):
        found = gptneo_fast.pipeline(task, model=ours, tokenizer=gptneo_fast.AutoTokenizer.from_pretrained(DEMO), **options)
        for got, row in zip(found([TEXTS[0], ROOM]), want, strict=True):
            assert [{**g, "score": pytest.approx(float(g["score"]), abs=1e-4)} for g in got] == row
    called = []
    ours.transformer.h[0].register_forward_hook(lambda *_: called.append(1))
    found("a day")
    assert called  # the model itself, and no copy


def test_features_are_those_of_transformers():
    theirs, ours = peers("GPTNeoModel", **SHAPE)
    want = transformers.pipeline("feature-extraction", model=theirs, tokenizer=transformers.AutoTokenizer.from_pretrained(DEMO))
    for task in ("feature-extraction", None):
        got = gptneo_fast.pipeline(task, model=ours, tokenizer=gptneo_fast.AutoTokenizer.from_pretrained(DEMO))
        torch.testing.assert_close(torch.tensor(got(TEXTS[0])), torch.tensor(want(TEXTS[0])), atol=1e-4, rtol=1e-4)
        for a, b in zip(got(TEXTS, return_tensors=True), want(TEXTS, return_tensors=True), strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
        assert len(list(got(iter(TEXTS)))) == 2
    with pytest.raises(InputError, match="inputs 1 is 3; give a string"):
        got(["a", 3])


def answers(model, tokenizer, question, context, most=384, stride=128, longest=15, behind=True):
    """{(first token, last token) of the context: probability}, by the words of the docstring, one piece after the other."""
    asked, ids = tokenizer.encode(question), tokenizer.encode(context)
    room, found, begin = most - len(asked), [], 0
    while True:
        piece = ids[begin : begin + room]
        with torch.no_grad():
            out = model(torch.tensor([asked + piece if behind else piece + asked]))
        own = slice(len(asked), None) if behind else slice(len(piece))
        first, last = (x[0, own].double().softmax(0) for x in (out.start_logits, out.end_logits))
        for i in range(len(piece)):
            for j in range(i, min(i + longest, len(piece))):
                found.append((begin + i, begin + j, float(first[i] * last[j])))
        if begin + room >= len(ids):
            return found
        begin += room - stride


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(
    ("context", "lengths"), [(ROOM, {}), (ROOM * 5, {"max_seq_len": 60, "doc_stride": 20})], ids=["one", "pieces"]
)
def test_answers_are_the_likeliest_pieces(context, lengths, side):
    _, model = peers("GPTNeoForQuestionAnswering", **SHAPE)
    tokenizer = gptneo_fast.AutoTokenizer.from_pretrained(DEMO)
    ask = gptneo_fast.pipeline("question-answering", model=model, tokenizer=tokenizer)
    question = "Who was red?"
    places = tokenizer(context, return_offsets_mapping=True)["offset_mapping"]
    tokenizer.padding_side = side  # left: the context stands before the question
    likely = answers(model, tokenizer, question, context, *lengths.values(), longest=6, behind=side == "right")
    want: dict[str, float] = {}
    for i, j, score in sorted(likely, key=lambda found: -found[2])[: 3 if not lengths else None]:
        text = context[places[i][0] : places[j][1]].lower()
        want[text] = max(score, want.get(text, 0.0))
    how = lengths | {"max_answer_len": 6, "align_to_words": False}
    got = ask(question=question, context=context, top_k=3, **how)
    best = max(want.items(), key=lambda item: item[1])
    assert context[got[0]["start"] : got[0]["end"]] == got[0]["answer"] and len(got) == 3
    if not lengths:
        assert {g["answer"].lower() for g in got} <= set(want) and got[0]["score"] == pytest.approx(best[1], rel=1e-3)
    assert got[0]["answer"].lower() in want and got[0]["score"] >= 0.999 * best[1]  # those of one text are added
    one = ask({"question": question, "context": context}, **how)
    assert one["answer"] == ask([{"question": question, "context": context}], **how)[0]["answer"]
    words = ask(question=question, context=context, **lengths)
    before, first, last, after = (context[at : at + 1] for at in (
        words["start"] - 1, words["start"], words["end"] - 1, words["end"]
    ))  # fmt: skip
    assert not (before.isalnum() and first.isalnum()) and not (last.isalnum() and after.isalnum())
    assert ask(question=question, context=context, handle_impossible_answer=True, top_k=2)[0]["answer"]


def test_questions_that_are_none_are_refused():
    _, model = peers("GPTNeoForQuestionAnswering", **SHAPE)
    ask = gptneo_fast.pipeline(model=model, tokenizer=gptneo_fast.AutoTokenizer.from_pretrained(DEMO))
    for given, options, message in (
        (None, {"question": "Who?"}, "needs question=... and context=..."),
        ({"question": "Who?"}, {}, "is no question with its context"),
        ({"question": "Who?", "context": ROOM}, {"top_k": 0}, "top_k=0 is not an integer from 1"),
        ({"question": "Who?", "context": ROOM}, {"colour": 1}, "colour is no option of question-answering"),
        (None, {"question": ["a", "b"], "context": ["c"] * 3}, "2 questions and 3 contexts"),
    ):
        with pytest.raises(InputError, match=message):
            ask(given, **options)
