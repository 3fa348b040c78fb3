"""Decode and prefill of the 125m shape on the CPU, beside transformers eager in the same run, equality checked first.

pytest benchmarks                       # one thread; THREADS=2 for two
"""

from __future__ import annotations

import os

import pytest
import torch

from benchmarks.models import DTYPES, pair

PROMPT, NEW, PREFILL = 128, 64, 512
MODELS = ["transformers eager", "gptneo_fast"]


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("THREADS", "1")))
    yield
    torch.set_num_threads(before)


def tokens(model, ids):
    """Greedy continuation of NEW tokens."""
    mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0)


def first_difference_is_a_tie(theirs, ours, ids) -> bool:
    """Whether two greedy continuations agree up to a step whose two best logits are closer than the dtype's error."""
    a, b = tokens(theirs, ids), tokens(ours, ids)
    if torch.equal(a, b):
        return True
    at = int((a != b).nonzero()[0, 1])
    logits = theirs(a[:, :at]).logits[0, -1].float()
    x, y = (ours(a[:, :at]).logits[0, -1].float(), logits)
    margin = logits.topk(2).values.diff().abs().item()
    return margin <= 2 * (x - y).abs().max().item()


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@torch.no_grad()
def test_decode(benchmark, model, dtype):
    theirs, ours = pair("125m", DTYPES[dtype])
    ids = torch.randint(0, 50257, (1, PROMPT), generator=torch.Generator().manual_seed(1))
    assert first_difference_is_a_tie(theirs, ours, ids)
    chosen = ours if model == "gptneo_fast" else theirs
    benchmark.group = f"125m, decode {NEW} tokens after {PROMPT}, {dtype}, {torch.get_num_threads()} threads"
    benchmark.pedantic(tokens, (chosen, ids), rounds=3, warmup_rounds=1)
    benchmark.extra_info["tokens_per_second"] = NEW / benchmark.stats.stats.median


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@torch.no_grad()
def test_prefill(benchmark, model, dtype):
    theirs, ours = pair("125m", DTYPES[dtype])
    ids = torch.randint(0, 50257, (1, PREFILL), generator=torch.Generator().manual_seed(2))
    a, b = (m(ids).logits.float() for m in (theirs, ours))
    assert (a - b).abs().max() <= {"fp32": 1e-3, "bf16": 0.2}[dtype] * a.std()
    chosen = ours if model == "gptneo_fast" else theirs
    benchmark.group = f"125m, prefill {PREFILL}, {dtype}, {torch.get_num_threads()} threads"
    benchmark.pedantic(chosen, (ids,), {"logits_to_keep": 1}, rounds=3, warmup_rounds=1)
