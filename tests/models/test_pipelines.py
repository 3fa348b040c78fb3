"""Pipelines that decide, as model cards call them."""

from pathlib import Path

import pytest

import gptneo_fast
from gptneo_fast.errors import InputError
from tests.support.peers import peers

transformers = pytest.importorskip("transformers")
DEMO = Path(gptneo_fast.__file__).parent / "demo" / "model"
TEXTS = ["a good day", "the little dog was very sad and it cried"]


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
    if isinstance(value, list):
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
