"""Hooks that look at a cache while requests run together."""

import torch

from gptneo_fast import Engine
from tests.support.peers import peers


def test_a_hook_that_reads_or_edits_the_cache_changes_what_it_would_alone():
    def running(edit):
        _, model = peers(max_position_embeddings=640)

        def look(module, args, keywords, output):
            for layer in output.past_key_values.layers:
                k = layer.keys
                if edit and k.shape[2] > 20:
                    k[:, :, 3] = 0

        model.transformer.register_forward_hook(look, with_kwargs=True)
        return model

    prompts, lengths = [list(range(3, 13)), list(range(5, 15))], (60, 180)
    for edit in (False, True):
        model = running(edit)
        alone = [
            model.generate(torch.tensor([ids]), max_new_tokens=n, do_sample=False)[0, 10:].tolist()
            for ids, n in zip(prompts, lengths, strict=True)
        ]
        with Engine(model, max_rows=2) as engine:
            jobs = [engine.submit(ids, max_new_tokens=n, do_sample=False) for ids, n in zip(prompts, lengths, strict=True)]
            assert [list(job.result())[-n:] for job, n in zip(jobs, lengths, strict=True)] == alone
