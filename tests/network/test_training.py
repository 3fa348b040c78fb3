"""Gradients, autocast, checkpointing, dropout, transforms of functions: the same as in transformers."""

import pytest
import torch
from torch import nn

from tests.support.peers import peers
from tests.support.touching import IDS, LAYERS, backward, cached, close

pytest.importorskip("transformers")


def test_whether_gradients_are_wanted_is_decided_by_what_flows():
    """A frozen model with a hook that adds a vector which is to be learnt."""
    found = []
    for model in peers(**LAYERS):
        model.requires_grad_(False)
        vector = torch.zeros(32, requires_grad=True)
        model.transformer.h[0].register_forward_hook(lambda module, args, out, v=vector: (out[0] + v, *out[1:]))
        model(IDS, labels=IDS).loss.backward()
        found.append(vector.grad)
    assert found[0].abs().max() > 0
    close(found[1], found[0])


@pytest.mark.parametrize("use_cache", [True, False])
def test_gradients_reach_the_attention_weights_that_were_returned(use_cache):
    found = []
    for model in peers(**LAYERS):
        out = model(IDS, output_attentions=True, use_cache=use_cache)
        for weights in out.attentions:
            weights.retain_grad()
        out.logits[:, -1, 5].sum().backward()
        found.append([weights.grad for weights in out.attentions])
    for theirs, ours in zip(*found, strict=True):
        close(ours, theirs)


def test_gradients_flow_through_a_cache_over_several_calls():
    found = []
    for model in peers(**LAYERS):
        past, total = None, 0.0
        for begin, end in ((0, 6), (6, 7), (7, 8), (8, 19)):
            out = model(IDS[:, begin:end], past_key_values=past, use_cache=True)
            past, total = out.past_key_values, total + out.logits.square().mean()
        total.backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    close(found[1], found[0])


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_autocast_with_the_cache_on_computes_what_transformers_does(kind):
    """It errs at most twice as much as theirs, against their own in float32."""

    def run(model, enabled):
        model.zero_grad()
        with torch.autocast("cpu", kind, enabled=enabled):
            loss = model(IDS, labels=IDS, use_cache=True).loss
            loss.backward()
            with torch.no_grad():
                logits = cached(model)
        return loss.detach(), logits.float(), torch.cat([p.grad.flatten() for p in model.parameters()])

    theirs, ours = peers(**LAYERS)
    for exact, a, b in zip(run(theirs, False), run(theirs, True), run(ours, True), strict=True):
        error = (a - exact).abs().max()
        assert 0 < (b - exact).abs().max() <= 2 * error + torch.finfo(kind).eps * exact.abs().max()


@pytest.mark.parametrize("reentrant", [True, False, None])
def test_checkpointing_gives_the_gradients_of_plain_training(reentrant):
    _, model = peers(**LAYERS)
    want = backward(model)
    model.train().config.use_cache = False
    model.gradient_checkpointing_enable(*([] if reentrant is None else [{"use_reentrant": reentrant}]))
    model.transformer.h[0].mlp.register_forward_hook(lambda module, args, out: out + 0)
    close(backward(model), want)


@pytest.mark.parametrize("where", ["resid_dropout", "attention_dropout", "embed_dropout"])
def test_dropout_of_a_module_counts_when_it_is_set_afterwards(where):
    found = []
    for model in peers(**LAYERS):
        for name, module in model.named_modules():
            if isinstance(module, nn.Dropout) and name.endswith(
                {"resid_dropout": "mlp.dropout", "attention_dropout": "attn_dropout", "embed_dropout": "drop"}[where]
            ):
                module.p = 0.5
        model.train()
        torch.manual_seed(3)
        found.append(model(IDS).logits.detach())
    close(found[1], found[0])


def test_forward_mode_goes_through_the_modules():
    theirs, ours = peers(**LAYERS)
    embeds, tangent = torch.randn(1, 7, 32), torch.randn(1, 7, 32)
    found = []
    for model in (theirs, ours):
        model.requires_grad_(False)
        run = lambda e, model=model: model(inputs_embeds=e, use_cache=False).logits  # noqa: E731
        found.append(torch.func.jvp(run, (embeds,), (tangent,))[1])
    assert found[0].abs().max() > 0
    close(found[1], found[0])


def test_vmap_over_texts_and_gradients_of_each():
    found = []
    for model in peers(**LAYERS):
        weights = {name: p.detach() for name, p in model.named_parameters()}

        def loss(weights, ids, mask, model=model):
            labels = torch.where(mask > 0, ids, -100)[None]
            options = {"attention_mask": mask[None], "labels": labels, "use_cache": False}
            return torch.func.functional_call(model, weights, (ids[None],), options).loss

        mask = torch.ones_like(IDS)
        mask[0, 11:] = 0
        grads = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(weights, IDS, mask)
        found.append(torch.cat([g.flatten() for g in grads.values()]))
    assert found[0].abs().max() > 0
    close(found[1], found[0])


def test_flops_are_counted_as_for_transformers():
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    for model in peers(**LAYERS):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            cached(model)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]
