"""Hooks that look at a cache while requests run together."""

import torch

from gptneo_fast import Engine
from tests.support.peers import peers


def test_a_hook_that_reads_the_cache_changes_no_token():
    _, model = peers()
    prompts, lengths, seen = [list(range(3, 13)), list(range(5, 15))], (60, 180), []
    alone = [
        model.generate(torch.tensor([ids]), max_new_tokens=n, do_sample=False)[0, 10:].tolist()
        for ids, n in zip(prompts, lengths, strict=True)
    ]

    def look(module, args, keywords, output):
        seen.extend(layer.keys.shape[2] for layer in output.past_key_values.layers)  # past the ring, too

    model.transformer.register_forward_hook(look, with_kwargs=True)
    with Engine(model, max_rows=2) as engine:
        jobs = [engine.submit(ids, max_new_tokens=n, do_sample=False) for ids, n in zip(prompts, lengths, strict=True)]
        assert [list(job.result())[-n:] for job, n in zip(jobs, lengths, strict=True)] == alone
    assert max(seen) > 135
