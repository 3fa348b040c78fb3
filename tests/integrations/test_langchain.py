"""LangChain's HuggingFacePipeline over our models and over transformers': the same texts, whole and in pieces."""

import pytest

from tests.support.peers import demo

transformers = pytest.importorskip("transformers")
langchain_huggingface = pytest.importorskip("langchain_huggingface")
from langchain_core.prompts import PromptTemplate  # noqa: E402

NAMES = ["the river", "a little fox", "Ruby"]


def chain(kind, **options):
    model, tokenizer = demo(kind)
    how = {"max_new_tokens": 24, "do_sample": False, "return_full_text": False} | options
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer, **how)
    return PromptTemplate.from_template("Once upon a time {name}") | langchain_huggingface.HuggingFacePipeline(
        pipeline=pipe, batch_size=3
    )


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 7}], ids=str)
@pytest.mark.parametrize("kind", ["accelerated", "converted"])
def test_a_chain_gives_the_texts_that_it_gives_over_transformers(kind, options, fused_calls):
    found = []
    for each in ("plain", kind):
        made = chain(each, **options)
        transformers.set_seed(3)
        texts = [made.invoke({"name": NAMES[0]}), *made.batch([{"name": name} for name in NAMES])]
        if "num_beams" not in options:  # they do not stream
            pieces = list(made.stream({"name": NAMES[1]}))
            assert len(pieces) > 1
            texts.append("".join(pieces))
        found.append(texts)
        assert bool(fused_calls) is (each != "plain") and all(texts)
    assert found[1] == found[0]
