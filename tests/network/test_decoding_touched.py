"""Few rows on the CPU in one call of the extension count what was done to a model, and are left out where they cannot."""

# ruff: noqa: F811 (a fixture is imported, and then an argument)

import copy
import gc

import pytest
import torch
from torch import nn

from gptneo_fast.network import decoding
from tests.support.peers import peers

from .test_decoding import build, calls, pytestmark, steps, twin  # noqa: F401 (a fixture)


def agrees(model, cache, token):
    """What the model gives for one more token, beside a twin of it in plain torch made this moment."""
    place = torch.tensor([[cache.get_seq_length()]])
    other, mine = copy.deepcopy(cache), copy.deepcopy(cache)
    plain = copy.deepcopy(model)
    plain.transformer.requested_backend = "reference"
    want = plain.step(token, place, None, other)
    got = model.step(token, place, None, mine)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(model(token, past_key_values=copy.deepcopy(cache)).logits, want, atol=2e-5, rtol=2e-5)
    return got


def swap(a, b):
    a.data, b.data = b.data, a.data


def replace(module, name, value):
    setattr(module, name, nn.Parameter(value, requires_grad=False))


def anew(module, name):
    """Another parameter, which then stands behind its siblings."""
    value = getattr(module, name).detach() * 2
    delattr(module, name)
    replace(module, name, value)


CHANGES = {
    "a value in place": lambda m: m.transformer.h[1].mlp.c_fc.weight.mul_(1.5),
    "a parameter": lambda m: replace(m.transformer.h[1].mlp.c_fc, "weight", m.transformer.h[1].mlp.c_fc.weight * 1.5),
    "its data": lambda m: setattr(m.transformer.h[2].ln_1.weight, "data", m.transformer.h[2].ln_1.weight * 3),
    "its data, transposed": lambda m: setattr(
        m.transformer.h[0].attn.attention.q_proj.weight, "data", m.transformer.h[0].attn.attention.q_proj.weight.t()
    ),
    "two swapped": lambda m: swap(
        m.transformer.h[0].attn.attention.q_proj.weight, m.transformer.h[1].attn.attention.k_proj.weight
    ),
    "a norm's epsilon": lambda m: setattr(m.transformer.h[1].ln_2, "eps", 0.3),
    "ln_f's epsilon": lambda m: setattr(m.transformer.ln_f, "eps", 0.3),
    "a norm": lambda m: setattr(m.transformer.h[1], "ln_2", nn.LayerNorm(32, eps=0.2)),
    "a norm, registered": lambda m: m.transformer.h[1].add_module("ln_2", nn.LayerNorm(32, eps=0.2)),
    "a norm, put in its place": lambda m: m.transformer.h[1]._modules.update(ln_2=nn.LayerNorm(32)),
    "a norm's weight made anew": lambda m: anew(m.transformer.h[1].ln_2, "weight"),
    "a linear layer": lambda m: setattr(m.transformer.h[1].mlp, "c_proj", nn.Linear(128, 32)),
    "blocks in another order": lambda m: setattr(m.transformer, "h", nn.ModuleList(m.transformer.h[i] for i in (0, 2, 1))),
    "a block doubled": lambda m: m.transformer.h.__setitem__(2, m.transformer.h[1]),
    "a block by another's weights": lambda m: m.transformer.h.__setitem__(1, copy.deepcopy(m.transformer.h[2])),
    "the dtype": lambda m: m.double(),
    "the embeddings": lambda m: m.set_input_embeddings(nn.Embedding(97, 32)),
    "the head": lambda m: setattr(m, "lm_head", nn.Linear(32, 97, bias=False)),
    "the positions": lambda m: replace(m.transformer.wpe, "weight", m.transformer.wpe.weight * 2),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_changed_between_two_steps_counts(change):
    model = build()
    ids = torch.randint(0, 97, (1, 12), generator=torch.Generator().manual_seed(4))
    _, cache = steps(model, ids, [10, 1])
    before = agrees(model, cache, ids[:, 11:])
    if change == "the dtype":
        cache.keys, cache.values = ([t.double() for t in ts] for ts in (cache.keys, cache.values))
    torch.manual_seed(1)
    CHANGES[change](model)
    model.requires_grad_(False)
    after = agrees(model, cache, ids[:, 11:])
    if change != "the dtype":
        assert not torch.allclose(before, after, atol=1e-4)


def test_parameters_that_are_swapped_in_place_count(monkeypatch):
    model = build()
    ids = torch.randint(0, 97, (1, 12), generator=torch.Generator().manual_seed(4))
    _, cache = steps(model, ids, [10, 1])
    before = agrees(model, cache, ids[:, 11:])
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.double().float()
        model.load_state_dict({name: value * 1.5 for name, value in model.state_dict().items()})
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert not torch.allclose(before, agrees(model, cache, ids[:, 11:]), atol=1e-4)


def test_blocks_beside_a_touched_one_run_together(calls):
    theirs, ours = peers(num_layers=5)
    ids = torch.randint(0, 97, (1, 9), generator=torch.Generator().manual_seed(6))
    outs = []
    for model in (theirs, ours):
        model.transformer.h[2].mlp.register_forward_hook(lambda module, args, out: out * 1.5)
        with torch.no_grad():
            past = model(ids[:, :8], use_cache=True).past_key_values
            calls.clear()
            outs.append(model(ids[:, 8:], past_key_values=past).logits)
    torch.testing.assert_close(outs[1], outs[0], atol=1e-4, rtol=1e-4)
    assert calls == [(2, True), (2, True)]


def test_hidden_states_are_those_of_each_block(calls):
    theirs, ours = peers()
    ids = torch.randint(0, 97, (1, 9), generator=torch.Generator().manual_seed(6))
    outs = []
    for model in (theirs, ours):
        with torch.no_grad():
            past = model(ids[:, :8], use_cache=True).past_key_values
            calls.clear()
            outs.append(model(ids[:, 8:], past_key_values=past, output_hidden_states=True))
    assert calls == [(1, True)] * 3
    for got, want in zip(outs[1].hidden_states, outs[0].hidden_states, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_a_plan_ends_with_its_trunk():
    model = build()
    steps(model, torch.zeros(1, 2, dtype=torch.long), [1, 1])
    (planned,) = decoding._plans[model.transformer].values()
    number = planned.call._number
    del model, planned
    gc.collect()
    with pytest.raises(RuntimeError, match=f"there is no plan {number}"):
        torch.ops.gptneo_fast_csrc.decode(
            number, torch.zeros(1, 1, dtype=torch.long), None, None, [], [], torch.zeros(1, dtype=torch.int32), None, 1
        )


def test_tracing_and_transforms_do_not_see_it(calls):
    model = build()
    _, cache = steps(model, torch.ones(1, 2, dtype=torch.long), [2])
    calls.clear()
    token = torch.tensor([[5]])
    vmapped = torch.func.vmap(lambda ids: model(ids[None], use_cache=False).logits)(token.expand(3, 1))
    torch.jit.trace(lambda ids: model(ids, past_key_values=cache.fork()).logits, (token,), check_trace=False)
    assert vmapped.shape[0] == 3 and not calls


def test_gradients_go_through_a_cache_and_not_through_the_extension(calls):
    model = build()
    model.transformer.h[1].mlp.c_fc.weight.requires_grad_(True)
    past = model(torch.ones(1, 4, dtype=torch.long), use_cache=True).past_key_values
    model(torch.ones(1, 1, dtype=torch.long), past_key_values=past).logits.sum().backward()
    assert model.transformer.h[1].mlp.c_fc.weight.grad.abs().sum() > 0 and not calls
