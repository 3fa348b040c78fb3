"""Every activation that transformers names, by its values and gradients, alone and in a model."""

import pytest
import torch

import gptneo_fast
from gptneo_fast.config import ACTIVATIONS, GELU_NEW
from gptneo_fast.network.activations import activation
from tests.support.peers import peers

activations = pytest.importorskip("transformers.activations")


def test_the_names_are_those_of_transformers():
    assert set(ACTIVATIONS) == set(activations.ACT2CLS) and set(GELU_NEW) < set(ACTIVATIONS)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_is_that_of_transformers(name):
    found = []
    for module in (activations.ACT2FN[name], activation(name)):
        x = torch.linspace(-14, 14, 4001, requires_grad=True)
        y = module(x)
        y.sum().backward()
        found.append((y.detach(), x.grad))
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("name", ["relu", "gelu", "prelu", "xielu", *GELU_NEW])
@torch.no_grad()
def test_a_model_computes_and_generates_with_it(name):
    theirs, ours = peers(activation_function=name, num_layers=2)
    assert bool(ours.looked(anew=True)) is (name in GELU_NEW)
    x = torch.randint(3, 97, (2, 11))
    torch.testing.assert_close(ours(x).logits, theirs(x).logits, atol=1e-4, rtol=1e-4)
    options = dict(attention_mask=torch.ones_like(x), max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(ours.generate(x, **options), theirs.generate(x, **options))


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
@torch.no_grad()
def test_what_an_activation_has_learnt_is_loaded_in_its_own_dtype_and_saved(dtype, tmp_path):
    theirs, ours = peers(activation_function="xielu", num_layers=2)
    x = torch.randint(3, 97, (2, 11))
    for i, model in enumerate((theirs, ours)):
        for n, tensor in enumerate((model.transformer.h[1].mlp.act.alpha_p, model.transformer.h[0].mlp.act.beta)):
            tensor.fill_(0.3 + n)
        model.save_pretrained(tmp_path / str(i))
    loaded = [type(m).from_pretrained(tmp_path / str(i), dtype=dtype) for m in (theirs, ours) for i in range(2)]
    want = loaded[0](x).logits
    assert {n: t.dtype for n, t in loaded[0].state_dict().items()} == {n: t.dtype for n, t in loaded[3].state_dict().items()}
    for model in loaded:
        torch.testing.assert_close(model(x).logits, want, atol=1e-2 if dtype == "bfloat16" else 1e-4, rtol=1e-4)


def test_activations_that_a_checkpoint_has_not_start_as_those_of_a_new_model(tmp_path):
    peers()[1].save_pretrained(tmp_path)
    for name in ("prelu", "xielu"):
        with pytest.warns(UserWarning, match=r"has no weights for .*mlp\.act\..*freshly initialised"):
            model = gptneo_fast.GPTNeoForCausalLM.from_pretrained(tmp_path, activation_function=name)
        found, fresh = model.transformer.h[0].mlp.act.state_dict(), activation(name).state_dict()
        assert found.keys() == fresh.keys() and all(torch.equal(found[n], fresh[n]) for n in fresh)
