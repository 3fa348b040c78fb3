"""lm-eval's HFLM over our models and over transformers': the same likelihoods and texts."""

import pytest
import torch

from tests.support.peers import demo

HFLM = pytest.importorskip("lm_eval.models.huggingface").HFLM
from lm_eval.api.instance import Instance  # noqa: E402

STORY = "Once upon a time there was a little fox who lived in a wood and sang."
PAIRS = [
    ("Once upon a time", " there was a little fox"),
    ("The dog", " went to the river"),
    ("", " hello"),
    (STORY * 9, " Then"),
]
TEXTS = [STORY * 60, "The cat", "Hello"]  # the first is longer than the model, and is rolled over
UNTIL = [
    ("Once upon a time", {"until": ["."], "max_gen_toks": 30}),
    ("The dog", {"until": ["."], "max_gen_toks": 30}),
    (STORY * 9, {"until": ["\n"], "max_gen_toks": 40, "do_sample": False}),
    ("A girl", {"until": ["\n"], "max_gen_toks": 40, "do_sample": False}),
]


def asked(method, arguments):
    requests = [Instance(request_type=method.__name__, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]
    return method(requests, disable_tqdm=True)


@pytest.fixture(scope="module")
def expected():
    return answers("plain", 2)


def answers(kind, batch_size):
    model, tokenizer = demo(kind)
    judge = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, device="cpu")
    pairs = asked(judge.loglikelihood, PAIRS)
    return (
        torch.tensor([logprob for logprob, _ in pairs]),
        [greedy for _, greedy in pairs],
        torch.tensor(asked(judge.loglikelihood_rolling, [(text,) for text in TEXTS])),
        asked(judge.generate_until, UNTIL),
    )


@pytest.mark.parametrize("batch_size", [1, 2, 4])
@pytest.mark.parametrize("kind", ["accelerated", "converted", "ours"])
def test_likelihoods_and_texts_are_those_over_transformers(kind, batch_size, expected, fused_calls):
    likelihoods, greedy, rolled, texts = answers(kind, batch_size)
    torch.testing.assert_close(likelihoods, expected[0], atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(rolled, expected[2], atol=1e-3, rtol=1e-4)
    assert greedy == expected[1] and texts == expected[3] and all(texts)
    assert set(fused_calls) == {0, 1, 2, 3}
