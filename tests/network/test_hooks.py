"""Hooks and patched forwards count, in forward, cached steps, generation and backward: the same as in transformers."""

import pytest
import torch
from torch import nn

from tests.support.peers import peers
from tests.support.touching import IDS, LAYERS, RUNS, backward, cached, close, forward, generate, tensors

pytest.importorskip("transformers")


@pytest.mark.parametrize("run", RUNS)
@torch.no_grad()
def test_hooks_on_every_module_get_the_tensors_of_transformers(run):
    seen = []
    for model in peers(**LAYERS):
        got = {}
        for name, module in model.named_modules():
            calls = got.setdefault(name, [])
            module.register_forward_pre_hook(
                lambda module, args, kw, calls=calls: calls.append(tensors(args) + tensors([kw.get("attention_mask")])),
                with_kwargs=True,
            )
            module.register_forward_hook(
                lambda module, args, kw, out, calls=calls: calls.append(["result", *tensors(out)]), with_kwargs=True
            )
            if run is backward:
                module.register_full_backward_hook(
                    lambda module, grads, out, calls=calls: calls.append(tensors(grads) + tensors(out))
                )
        run(model)
        seen.append(got)
    theirs, ours = seen
    assert list(ours) == list(theirs)
    for name, calls in theirs.items():
        if name in ("", "transformer"):  # their keywords differ by what is worked out before the call: results alone
            calls, ours[name] = ([c for c in each[name] if c[:1] == ["result"]] for each in (theirs, ours))
        assert len(ours[name]) == len(calls) > 0 or name.endswith(".h"), name
        for a, b in zip(ours[name], calls, strict=True):
            assert len(a) == len(b), name
            for x, y in zip(a, b, strict=True):
                assert x == y == "result" if isinstance(x, str) else close(x, y, name) is None


@pytest.mark.parametrize("kind", ["forward", "pre", "patched", "backward"])
@torch.no_grad()
def test_what_one_module_is_made_to_return_changes_the_result(kind):
    """One module at a time, the blocks beside it fused."""
    theirs, ours = peers(**LAYERS)
    names = [
        name for name, _ in theirs.named_modules() if name.count(".") > 1 or name.endswith(("ln_f", "drop", "lm_head", "wte"))
    ]

    def change(out):
        return (change(out[0]), *out[1:]) if isinstance(out, tuple) else out * 1.5 + 0.1 if out.is_floating_point() else out

    for name in names:
        found = []
        for model in (theirs, ours):
            module = model.get_submodule(name)
            if kind == "forward":
                handle = module.register_forward_hook(lambda module, args, out: change(out))
            elif kind == "pre":
                handle = module.register_forward_pre_hook(
                    lambda module, args, kw: (tuple(map(change, args)), kw), with_kwargs=True
                )
            elif kind == "backward":
                handle = module.register_full_backward_hook(
                    lambda module, grads, out: tuple(g * 2 for g in grads if g is not None)
                )
            else:
                plain = module.forward
                module.forward = lambda *args, plain=plain, **kw: change(plain(*args, **kw))
            runs = (backward,) if kind == "backward" else (forward, generate) if kind == "patched" else (cached, generate)
            found.append([run(model) for run in runs])
            if kind == "patched":
                del module.forward
            else:
                handle.remove()
        for a, b in zip(*found, strict=True):
            close(b, a, name)
    assert ours.looked(anew=True)


@torch.no_grad()
def test_a_hook_set_and_removed_while_a_model_generates_is_obeyed_from_that_token_on():
    found = []
    for model in peers(**LAYERS):
        handles = []

        def touching(ids, scores, model=model, handles=handles):
            if ids.shape[1] == IDS.shape[1] + 2:
                handles.append(model.transformer.h[1].mlp.c_fc.register_forward_hook(lambda module, args, out: out * -2))
            if ids.shape[1] == IDS.shape[1] + 5:
                handles[0].remove()
                model.transformer.h[0].mlp = nn.Identity()
            return scores

        found.append(
            model.generate(
                IDS,
                attention_mask=torch.ones_like(IDS),
                max_new_tokens=12,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                logits_processor=[touching],
            )
        )
    assert torch.equal(*found)


@torch.no_grad()
def test_hooks_on_all_modules_and_patched_classes_count(monkeypatch):
    theirs, ours = peers(**LAYERS)
    calls = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: calls.append(type(module).__name__))
    counts = []
    for model in (theirs, ours):
        calls.clear()
        cached(model)
        counts.append({name: calls.count(name) for name in ("Linear", "LayerNorm", "Dropout", "Embedding", "GPTNeoBlock")})
    handle.remove()
    assert counts[0] == counts[1]
    plain = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: plain(self, x) * 1.01)
    close(cached(ours), cached(theirs))
    assert torch.equal(generate(ours), generate(theirs))


@pytest.mark.parametrize("cls", ["GPTNeoForCausalLM", "GPTNeoModel", "GPTNeoSelfAttention"])
@torch.no_grad()
def test_a_forward_patched_for_a_whole_class_is_obeyed_at_every_token(cls, monkeypatch):
    """Attention that looks past its window among them: the cache then keeps every key."""
    import transformers
    from transformers.models.gpt_neo import modeling_gpt_neo

    import gptneo_fast
    from gptneo_fast.network import modules

    theirs, ours = peers(**LAYERS | {"max_position_embeddings": 400})
    ids = torch.randint(3, 97, (1, 300), generator=torch.Generator().manual_seed(1))
    homes = [(modules, modeling_gpt_neo)] if cls == "GPTNeoSelfAttention" else [(gptneo_fast, transformers)]
    for kind in (getattr(home, cls) for pair in homes for home in pair):
        plain = kind.forward
        if cls == "GPTNeoForCausalLM":

            def changed(self, *args, plain=plain, **kw):
                out = plain(self, *args, **kw)
                out.logits = out.logits.roll(3, -1)
                return out

        elif cls == "GPTNeoModel":

            def changed(self, *args, plain=plain, **kw):
                out = plain(self, *args, **kw | {"return_dict": True})
                out.last_hidden_state = out.last_hidden_state.flip(-1)
                return out

        else:

            def changed(self, hidden_states, attention_mask=None, layer_past=None, **kw):
                q, k, v = (
                    p(hidden_states).unflatten(-1, (4, 8)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
                )
                k, v = (k, v) if layer_past is None else layer_past.update(k, v, self.layer_id)
                weights = (q @ k.transpose(-1, -2) * 0 + attention_mask).softmax(-1)  # the mean of all before
                return self.out_proj((weights @ v).transpose(1, 2).flatten(2)), weights

        monkeypatch.setattr(kind, "forward", changed)
    tokens = [
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        for model in (theirs, ours)
    ]
    assert torch.equal(*tokens)


def test_inputs_prepared_in_another_way_are_no_matter_for_a_captured_step():
    _, ours = peers(**LAYERS)
    ours.prepare_inputs_for_generation = ours.prepare_inputs_for_generation
    look = ours.looked()
    assert not look and not look.prepare and look.forward
