"""The 125m shape on the CPU beside transformers eager in the same run, equality checked before anything is timed.

`make bench` keeps what this measures in benchmarks/results/cpu.json, of which the README's table is made.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from benchmarks.models import DTYPES, pair
from gptneo_fast.tools.verify import first_divergence, twin

NEW, PREFILL, LONG = 64, 512, 1920
RUNNERS = ["transformers eager", "gptneo_fast"]

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="`make gpu` measures this machine")


@pytest.fixture(params=[1, 2], ids=lambda n: f"{n} threads")
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def prompt(tokens: int) -> Tensor:
    """Random ids [1, tokens]."""
    return torch.randint(0, 50257, (1, tokens), generator=torch.Generator().manual_seed(tokens))


def continuation(model, ids: Tensor, new: int = NEW) -> Tensor:
    """Greedy tokens, exactly `new` of them."""
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0
    )


@functools.cache
def check_tokens(dtype: str, context: int) -> None:
    """Ours are those of transformers, or leave them first where the choice was within the error of the dtype."""
    theirs, ours = pair("125m", DTYPES[dtype])
    ids = prompt(context)
    found = first_divergence(twin(ours, ours.dtype), continuation(ours, ids), continuation(theirs, ids), torch.ones_like(ids))
    assert found is None or found.margin <= found.error, found


@functools.cache
def check_logits(dtype: str) -> None:
    """Ours err from float64 by at most twice (mean: 1.5 times) what transformers' err, and one rounding."""
    theirs, ours = pair("125m", DTYPES[dtype])
    ids = prompt(PREFILL)
    exact, usual, got = (m(ids).logits.double() for m in (twin(ours, torch.float64), theirs, ours))
    may, error = (usual - exact).abs() + (exact.to(ours.dtype).double() - exact).abs(), (got - exact).abs()
    assert error.max() <= 2 * may.max() and error.mean() <= 1.5 * may.mean()


def keep(benchmark, work: str, runner: str, dtype: str, threads: int, tokens: int) -> None:
    """What the results file says of a measurement."""
    benchmark.group = f"{work}, {dtype}, {threads} threads"
    median = benchmark.stats.stats.median
    benchmark.extra_info.update(
        work=work, runner=runner, dtype=dtype, threads=threads, ms=median * 1e3, tokens_per_second=tokens / median
    )


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@torch.no_grad()
def test_decode(benchmark, threads, dtype, runner):
    """The whole call, prompt of 128 included."""
    check_tokens(dtype, 128)
    theirs, ours = pair("125m", DTYPES[dtype])
    benchmark.pedantic(continuation, (ours if runner == "gptneo_fast" else theirs, prompt(128)), rounds=5, warmup_rounds=1)
    keep(benchmark, f"128 + {NEW} tokens", runner, dtype, threads, NEW)


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@torch.no_grad()
def test_prefill(benchmark, threads, dtype, runner):
    check_logits(dtype)
    theirs, ours = pair("125m", DTYPES[dtype])
    model = ours if runner == "gptneo_fast" else theirs
    benchmark.pedantic(model, (prompt(PREFILL),), {"logits_to_keep": 1}, rounds=5, warmup_rounds=1)
    keep(benchmark, f"prefill {PREFILL}", runner, dtype, threads, PREFILL)


@pytest.mark.parametrize("context", [128, LONG])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@torch.no_grad()
def test_a_step_at_a_length(benchmark, threads, dtype, context):
    """One token after a context that the cache holds: what growing costs."""
    _, model = pair("125m", DTYPES[dtype])
    out = model(prompt(context), use_cache=True, logits_to_keep=1)
    token, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
    cache.reserve(NEW)

    def steps():
        for _ in range(16):
            place = torch.tensor([[cache.get_seq_length()]])
            model.step(token, place, None, cache)
        cache.crop(context)

    benchmark.pedantic(steps, rounds=5, warmup_rounds=1)
    keep(benchmark, f"16 steps after {context}", "gptneo_fast", dtype, threads, 16)
