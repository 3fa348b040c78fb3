"""Embeddings of ragged texts are those of the SGPT recipe on transformers' model, one text at a time."""

import pytest
import torch

from gptneo_fast.errors import InputError
from tests.support.peers import SMALL, peers

V = SMALL["vocab_size"]


@pytest.fixture(scope="module", params=["GPTNeoModel", "GPTNeoForCausalLM"])
def models(request):
    return peers(request.param)


def texts():
    return [torch.randint(0, V, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (5, 1, 300, 40)]


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("pooling", ["mean", "weighted-mean", "last"])
@torch.no_grad()
def test_the_recipe(models, pooling, normalize):
    theirs, ours = models
    got = ours.embed(texts(), pooling, normalize)
    for text, vector in zip(texts(), got, strict=True):
        hidden = theirs.base_model(torch.tensor([text])).last_hidden_state[0].double()
        weights = {"mean": torch.ones(len(text)), "weighted-mean": torch.arange(1, len(text) + 1)}.get(pooling)
        want = hidden[-1] if weights is None else (weights.double() @ hidden) / weights.sum()
        want = want / want.norm() if normalize else want
        assert (vector - want).abs().max() < 1e-4
    assert torch.equal(ours.embed(texts()[0], pooling, normalize), ours.embed(texts()[:1], pooling, normalize)[0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.embed([[1], []]), "text 1 has 0 tokens; give from 1 to 640"),
        (lambda m: m.embed([[1] * 641]), "text 0 has 641 tokens"),
        (lambda m: m.embed([1], pooling="max"), "pooling='max' is unknown"),
    ],
)
def test_what_cannot_be_embedded_is_named(models, call, message):
    with pytest.raises(InputError, match=message):
        call(models[1])
