"""Prompts are read in chunks, together where they are short, and what they share once."""

import copy

import pytest
import torch

from gptneo_fast import Engine
from tests.support.peers import SMALL
from tests.support.serial import Gate, ids_of, lively, own_forward, require_same, serial

V = SMALL["vocab_size"]


def test_a_long_prompt_never_holds_up_the_others_for_more_than_a_chunk(model, reads):
    with Engine(model, 3, prefill_chunk_size=50) as engine:
        first = engine.submit([4, 5], max_new_tokens=600, eos_token_id=None, do_sample=True)  # a step at a time
        next(iter(first))
        rest = [engine.submit(ids_of(n), max_new_tokens=3) for n in (400, 30, 30)]
        for job in rest:
            job.result(60)
        first.cancel()
    between = 0
    for tokens in reads:
        between = 0 if tokens is None else between + tokens
        assert between <= 50
    assert sum(n or 0 for n in reads) == 1 + 399 + 29 + 29


@pytest.mark.parametrize("touch", [None, own_forward])
def test_short_prompts_are_read_together(model, reads, touch):
    """Padded by a quarter at most, up to a chunk."""
    model, gate = copy.deepcopy(model), Gate(1)
    if touch is not None:
        touch(model)
    lengths = (20, 17, 19, 9, 8, 300, 1, 1)
    with Engine(model, 9, prefill_chunk_size=64) as engine:
        first = engine.submit([5], max_new_tokens=2, logits_processor=[gate])
        gate.wait()
        jobs = [engine.submit(ids_of(n), max_new_tokens=20) for n in lengths]
        gate.open()
        for job in jobs:
            prompt = job.ids[: job.prompt]
            require_same(model, prompt, job.result(60), serial(model, prompt, max_new_tokens=20))
        first.result(60)
    assert [n for n in reads if n][:3] == [57, 7, 1] and sum(n or 0 for n in reads) == 57 + 8 + 7 + 299


def test_a_shared_prefix_is_computed_once(model, reads):
    prefix, gate = ids_of(200), Gate(1)
    with Engine(model, 5) as engine:
        engine.submit([5], max_new_tokens=2, logits_processor=[gate])
        gate.wait()
        jobs = [engine.submit(ids_of(n), prefix=prefix, max_new_tokens=9) for n in (1, 5, 150, 1)]
        gate.open()
        for job in jobs:
            assert job.prompt == len(job.ids) - len(job.tokens) and job.ids[:200] == prefix
            require_same(model, job.ids[: job.prompt], job.result(60), serial(model, job.ids[: job.prompt], max_new_tokens=9))
    assert sum(n or 0 for n in reads) == 200 + 0 + 4 + 149 + 0


def test_continuations_of_one_prompt_read_it_once(model, reads):
    """Where they are asked for together, which a busy machine may keep them from: then it is read again."""
    prompt, how = ids_of(150), {"do_sample": True, "max_new_tokens": 30}
    want = [serial(model, prompt, seed=(2**64 - 2 + j) % 2**64, **how) for j in range(5)]
    read = []
    while len(read) < 5 and 149 not in read:
        reads.clear()
        assert list(model.generate_many([prompt], num_return_sequences=5, seed=2**64 - 2, **how)) == [want]
        read.append(sum(n or 0 for n in reads))
    assert read[-1] == 149, read


def changed_weights(model):
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight.data.mul_(1.5)


def hooked_attention(model):
    model.transformer.h[1].attn.register_forward_hook(lambda module, args, out: (out[0] * 0.3, *out[1:]))


@pytest.mark.parametrize("change", [changed_weights, hooked_attention])
def test_a_prefix_is_that_of_the_model_as_it_is(change, reads):
    model, prefix = lively(), ids_of(50)
    with Engine(model, 2) as engine:
        before = engine.submit([5], prefix=prefix, max_new_tokens=20).result(60)
        change(model)
        after = engine.submit([5], prefix=prefix, max_new_tokens=20).result(60)
    assert after == serial(model, [*prefix, 5], max_new_tokens=20) != before
    assert sum(n or 0 for n in reads) == 100
