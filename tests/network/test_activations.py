"""Every activation that transformers names, by its values and gradients, alone and in a model."""

import pytest
import torch

from gptneo_fast.config import ACTIVATIONS, GELU_NEW
from gptneo_fast.network.activations import activation
from tests.support.peers import SMALL, peers

activations = pytest.importorskip("transformers.activations")


def test_the_names_are_those_of_transformers_but_one():
    assert set(ACTIVATIONS) == set(activations.ACT2CLS) - {"xielu"} and set(GELU_NEW) < set(ACTIVATIONS)


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


@pytest.mark.parametrize("name", ["relu", "gelu", "prelu", *GELU_NEW])
@torch.no_grad()
def test_a_model_computes_and_generates_with_it(name):
    theirs, ours = peers(activation_function=name, num_layers=2)
    assert bool(ours.looked(anew=True)) is (name in GELU_NEW)
    x = torch.randint(3, 97, (2, 11))
    torch.testing.assert_close(ours(x).logits, theirs(x).logits, atol=1e-4, rtol=1e-4)
    options = dict(attention_mask=torch.ones_like(x), max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(ours.generate(x, **options), theirs.generate(x, **options))


def test_the_one_with_buffers_and_a_dtype_of_its_own_is_refused_by_name(tmp_path):
    import transformers

    import gptneo_fast
    from gptneo_fast.errors import ConfigError
    from gptneo_fast.integrations.transformers import accelerate

    config = transformers.GPTNeoConfig(**SMALL, activation_function="xielu")
    theirs = transformers.GPTNeoForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    for refused in (lambda: gptneo_fast.GPTNeoForCausalLM.from_pretrained(tmp_path), lambda: accelerate(theirs)):
        with pytest.raises(ConfigError, match=r"activation_function 'xielu' has buffers .*; use one of gelu_new"):
            refused()
