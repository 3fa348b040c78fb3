"""torch.compile: a whole forward pass is one graph, on the reference functions and on the ops."""

import pytest
import torch

from gptneo_fast.ops import backends, ops
from tests.support.peers import peers


@pytest.fixture(params=["reference", "ops"])
def model(request, monkeypatch):
    """A causal model on either namespace; with `ops` a tracer sees one node for each op."""
    _, model = peers(num_layers=2)
    if request.param == "ops":
        monkeypatch.setattr(backends, "choose", lambda *_: backends.Choice("triton", "a test", ops))
    torch.compiler.reset()
    yield model
    torch.compiler.reset()


def compiled(function):
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def test_forward_without_cache(model):
    x = torch.randint(3, 97, (2, 11))
    with torch.no_grad():
        expected = model(x, use_cache=False)
        out = compiled(model)(x, use_cache=False)
    torch.testing.assert_close(out.logits, expected.logits)
    assert list(out) == list(expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_one_graph_on_the_cpu_too(dtype):
    torch.compiler.reset()
    _, model = peers(num_layers=2, dtype=dtype)
    x = torch.randint(3, 97, (2, 50))  # more rows than the engine's
    with torch.no_grad():
        expected = model(x, use_cache=False).logits
        got = compiled(model)(x, use_cache=False).logits
    assert (got - expected).abs().max() <= 8 * torch.finfo(dtype).eps * expected.abs().max()
    torch.compiler.reset()


def test_forward_with_a_mask(model):
    x, mask = torch.randint(3, 97, (2, 11)), torch.ones(2, 11, dtype=torch.long)
    mask[0, :4] = 0
    with torch.no_grad():
        expected = model(x, attention_mask=mask, use_cache=False).logits
        got = compiled(model)(x, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()])


def test_forward_with_a_cache_past_the_window(model):
    x = torch.randint(3, 97, (2, 30))
    with torch.no_grad():
        whole, step = model(x).logits, compiled(model)
        out = step(x[:, :20])
        pieces = [out.logits]
        for i in range(20, 30):
            out = step(x[:, i : i + 1], past_key_values=out.past_key_values)
            pieces.append(out.logits)
    assert out.past_key_values.get_seq_length() == 30
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-4)


def test_gradients_of_a_compiled_loss():
    _, model = peers(num_layers=2)
    x = torch.randint(3, 97, (2, 11))
    model(x, labels=x).loss.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    compiled(model)(x, labels=x, use_cache=False).loss.backward()
    for p, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad)


def test_the_default_compiler_gives_the_same_logits():
    _, model = peers(num_layers=2)
    x = torch.randint(3, 97, (1, 9))
    with torch.no_grad():
        expected = model(x, use_cache=False).logits
        got = torch.compile(model, fullgraph=True)(x, use_cache=False).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_ops_are_nodes_of_the_exported_graph(monkeypatch):
    _, model = peers(num_layers=2)
    monkeypatch.setattr(backends, "choose", lambda *_: backends.Choice("triton", "a test", ops))
    seen = []

    def backend(graph, inputs):
        seen.extend(str(n.target) for n in graph.graph.nodes if n.op == "call_function")
        return graph.forward

    with torch.no_grad():
        torch.compile(model, fullgraph=True, backend=backend)(torch.randint(3, 97, (1, 9)), use_cache=False)
    assert sum("gptneo_fast" in name for name in seen) == 1 + 2 * 5 + 1  # embedding, five ops a layer, final norm


def halved(model):
    model.transformer.h[1].mlp.c_fc.register_forward_hook(lambda module, args, out: out * 0.5)


def replaced(model):
    attention = model.transformer.h[0].attn.attention
    attention.q_proj = torch.nn.Sequential(attention.q_proj, torch.nn.Tanh())


def patched(model):
    c_fc = model.transformer.h[1].mlp.c_fc
    plain = c_fc.forward
    c_fc.forward = lambda x: plain(x) * 2


@pytest.mark.parametrize("touch", [halved, replaced, patched])
@torch.no_grad()
def test_what_was_done_to_a_module_counts_when_it_is_traced(touch):
    theirs, ours = peers(num_layers=2)
    x = torch.randint(3, 97, (2, 11))
    for each in (theirs, ours):
        touch(each)
    torch.compiler.reset()
    torch.testing.assert_close(compiled(ours)(x, use_cache=False).logits, theirs(x, use_cache=False).logits)


@pytest.mark.parametrize("touch", [replaced, patched])
@torch.no_grad()
def test_what_is_done_to_a_module_afterwards_has_it_traced_again(touch):
    """As transformers' model; a hook that comes later is not seen in either, which is torch's own rule."""
    theirs, ours = peers(num_layers=2)
    x = torch.randint(3, 97, (2, 11))
    torch.compiler.reset()
    run = compiled(ours)
    run(x, use_cache=False)
    for each in (theirs, ours):
        touch(each)
    torch.testing.assert_close(run(x, use_cache=False).logits, theirs(x, use_cache=False).logits)
