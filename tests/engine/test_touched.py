"""What a user does to the model counts from the next step on, captured or not."""

import copy
import functools

import pytest
import torch
from torch import nn

import gptneo_fast
from gptneo_fast import Engine
from gptneo_fast.engine import graphs, rows as rows_module
from gptneo_fast.errors import ConfigError, InputError
from tests.support.peers import SMALL
from tests.support.serial import LENGTHS, Gate, ids_of, lively, own_forward, require_same, serial

V = SMALL["vocab_size"]


TOUCHES = {
    "hook on a block": lambda m: m.transformer.h[1].mlp.register_forward_hook(lambda module, args, out: out * 0.3),
    "hook on the head": lambda m: m.lm_head.register_forward_hook(lambda module, args, out: out.roll(1, -1)),
    "replaced norm": lambda m: setattr(m.transformer, "ln_f", nn.Identity()),
    "own forward": own_forward,
}


@pytest.mark.parametrize("touch", TOUCHES)
def test_what_a_user_did_to_the_model_counts(touch):
    model = lively()
    before = serial(model, ids_of(5), max_new_tokens=20)
    with Engine(model, 3) as engine:
        assert engine.submit(ids_of(5), max_new_tokens=20).result(60) == before
        TOUCHES[touch](model)
        jobs = [engine.submit(ids_of(n), max_new_tokens=20, eos_token_id=None) for n in (5, 160, 1)]
        for job in jobs:
            prompt = job.ids[: job.prompt]
            require_same(model, prompt, job.result(60), serial(model, prompt, max_new_tokens=20, eos_token_id=None))
    assert jobs[0].result() != before


def test_an_override_of_prepare_inputs_is_refused_and_not_ignored():
    class Own(gptneo_fast.GPTNeoForCausalLM):
        def prepare_inputs_for_generation(self, *args, **keywords):
            return super().prepare_inputs_for_generation(*args, **keywords)

    with Engine(Own(gptneo_fast.GPTNeoConfig(**SMALL))) as engine, pytest.raises(InputError, match=r"use model\.generate"):
        engine.submit([5])


@pytest.mark.parametrize("rows", [3, 5])
def test_steps_that_are_captured_give_the_same(model, rows, monkeypatch):
    """On this device a plain call stands for each graph; buckets of rows, slots laid out once, and a touch in between."""
    new_cache, steps = type(model.transformer).new_cache, []
    monkeypatch.setattr(type(model.transformer), "new_cache", lambda self, n, most=None: new_cache(self, n, most or 640))
    monkeypatch.setattr(graphs.Graphs, "serve", lambda self: bool(self.model.looked()))
    monkeypatch.setattr(rows_module.Rows, "_several", lambda self, ids: None)
    captured = graphs.Graphs._captured
    monkeypatch.setattr(graphs.Graphs, "_captured", lambda self, n: steps.append(n) or captured(self, n))
    model = copy.deepcopy(model)
    hooked = model.transformer.h[1].mlp
    with Engine(model, rows) as engine:
        jobs = [(ids_of(n), out, engine.submit(ids_of(n), max_new_tokens=out, eos_token_id=None)) for n, out in LENGTHS]
        for prompt, out, job in jobs:
            require_same(model, prompt, job.result(60), serial(model, prompt, max_new_tokens=out, eos_token_id=None))
        assert set(steps) == ({1, 2, 3} if rows == 3 else {1, 2, 4, 5}) and len(steps) == len(set(steps))
        handle = hooked.register_forward_hook(lambda module, args, out: out * 0.3)
        want = serial(model, [5, 6], max_new_tokens=9)
        assert engine.submit([5, 6], max_new_tokens=9).result(60) == want
        handle.remove()
        plain = serial(model, [5, 6], max_new_tokens=9)
        assert engine.submit([5, 6], max_new_tokens=9).result(60) == plain != want
        with torch.no_grad():
            model.lm_head.weight = nn.Parameter(model.lm_head.weight.roll(1, 0))  # another address
        assert engine.submit([5, 6], max_new_tokens=9).result(60) == serial(model, [5, 6], max_new_tokens=9) != plain
        assert len(steps) > len(set(steps))


def test_attention_that_is_patched_between_two_requests():
    """Its layers then hold all columns, for it may look at any; and again a window once the patch is gone."""
    model = lively()
    attention = model.transformer.h[1].attn.attention
    with Engine(model, 2) as engine:
        for patched in (False, True, False):
            if patched:
                attention._attn = functools.partial(attention._attn)
            elif "_attn" in vars(attention):
                del attention._attn
            for prompt in (ids_of(200), ids_of(9)):
                got = engine.submit(prompt, max_new_tokens=20).result(60)
                require_same(model, prompt, got, serial(model, prompt, max_new_tokens=20))


def test_a_layer_that_is_patched_without_a_sign_counts_from_the_next_step():
    model, gate = lively(), Gate(3)
    c_fc = model.transformer.h[0].mlp.c_fc
    with Engine(model, 1) as engine:
        first = engine.submit([5], max_new_tokens=4, logits_processor=[gate])
        second = engine.submit([6, 7], max_new_tokens=20)
        gate.wait()
        plain = c_fc.forward
        c_fc.forward = lambda x: plain(x) * 0.2
        gate.open()
        first.result(60)
        got = second.result(60)
    want = serial(model, [6, 7], max_new_tokens=20)
    del c_fc.forward
    assert got == want != serial(model, [6, 7], max_new_tokens=20)


def test_weights_that_change_under_autocast_count():
    model = lively()
    for p in model.parameters():
        p.requires_grad_(True)  # of which autocast keeps copies
    with torch.autocast("cpu", torch.bfloat16), Engine(model, 1) as engine:
        before = engine.submit([5, 6], max_new_tokens=20).result(60)
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(p.roll(1, 0))
        torch.clear_autocast_cache()
        want = serial(model, [5, 6], max_new_tokens=20)
        got = engine.submit([5, 6], max_new_tokens=20).result(60)
    require_same(model, [5, 6], got, want, 0.1)
    assert got != before


def without_cache(model):
    plain = model.forward
    model.forward = lambda input_ids=None, **_: plain(input_ids, return_dict=True)


def test_a_forward_that_keeps_no_cache_is_an_error_and_no_hang():
    model = lively()
    without_cache(model)
    with Engine(model, 1) as engine:
        for prompt in ([5], [5, 6, 7]):
            with pytest.raises(InputError, match="left 0 columns in past_key_values"):
                engine.submit(prompt, max_new_tokens=5).result(60)


def test_a_configuration_that_was_changed_is_an_error_for_each():
    model, gate = lively(), Gate(1)
    with Engine(model, 1) as engine:
        jobs = [engine.submit([5], max_new_tokens=3, logits_processor=[gate]), engine.submit([6], max_new_tokens=3)]
        gate.wait()
        layers, model.config.attention_layers = model.config.attention_layers, ("local", "local", "local")
        gate.open()
        for job in jobs:
            with pytest.raises(ConfigError, match="layer 0 is local"):
                job.result(60)
        with pytest.raises(ConfigError, match="layer 0 is local"):
            engine.submit([5])
        model.config.attention_layers = layers
        assert engine.submit([6], max_new_tokens=3).result(60) == serial(model, [6], max_new_tokens=3)
