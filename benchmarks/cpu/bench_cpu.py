"""Shapes on the CPU beside transformers eager, a call of theirs before each of ours, equality checked before any is timed.

`make bench` keeps what this measures in benchmarks/results/cpu.json, of which the README's table is made.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.models import DTYPES, STORIES, pair
from gptneo_fast.tools.verify import first_divergence, twin

NEW, PREFILL, LONG, ROUNDS = 64, 512, 1920, 5

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
def check_tokens(shape: str, dtype: str, context: int) -> None:
    """Ours are those of transformers, or leave them first where the choice was within the error of the dtype."""
    theirs, ours = pair(shape, DTYPES[dtype])
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


def keep(benchmark, work: str, dtype: str, threads: int, tokens: int, peer: list[float] | None = None) -> None:
    """What the results file says of a measurement. peer: seconds of each call of transformers', where there was one."""
    benchmark.group = f"{work}, {dtype}, {threads} threads"
    row = {"work": work, "dtype": dtype, "threads": threads}
    medians = {"gptneo_fast": benchmark.stats.stats.median} | ({"transformers eager": statistics.median(peer)} if peer else {})
    benchmark.extra_info["rows"] = [
        row | {"runner": runner, "ms": median * 1e3, "tokens_per_second": tokens / median} for runner, median in medians.items()
    ]


def beside(benchmark, call: Callable[[Any], Any], models: tuple[Any, Any]) -> list[float]:
    """Time `call` of ours, `ROUNDS` times after a first, and before each that of theirs, whose seconds are returned."""
    theirs, ours = models
    seconds: list[float] = []

    def first() -> None:
        begin = time.perf_counter()
        call(theirs)
        seconds.append(time.perf_counter() - begin)

    call(theirs), call(ours)
    benchmark.pedantic(call, (ours,), setup=first, rounds=ROUNDS)
    return seconds


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("shape", ["125m", *STORIES])
@torch.no_grad()
def test_decode(benchmark, threads, dtype, shape):
    """The whole call, prompt of 128 included."""
    check_tokens(shape, dtype, 128)
    peer = beside(benchmark, lambda model: continuation(model, prompt(128)), pair(shape, DTYPES[dtype]))
    keep(benchmark, f"{shape}, 128 + {NEW} tokens", dtype, threads, NEW, peer)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("rows", [4, 16])
@torch.no_grad()
def test_steps_of_a_batch(benchmark, threads, dtype, rows):
    """Four steps of several rows after a prompt of 128 each."""
    ids = torch.randint(0, 50257, (rows, 128), generator=torch.Generator().manual_seed(rows))
    models = pair("125m", DTYPES[dtype])
    caches = {id(model): model(ids, use_cache=True, logits_to_keep=1).past_key_values for model in models}

    def steps(model):
        for _ in range(4):
            model(ids[:, :1], past_key_values=caches[id(model)], logits_to_keep=1)
        caches[id(model)].crop(-4)

    peer = beside(benchmark, steps, models)
    keep(benchmark, f"125m, 4 steps of {rows} rows after 128", dtype, threads, 4 * rows, peer)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@torch.no_grad()
def test_prefill(benchmark, threads, dtype):
    check_logits(dtype)
    peer = beside(benchmark, lambda model: model(prompt(PREFILL), logits_to_keep=1), pair("125m", DTYPES[dtype]))
    keep(benchmark, f"125m, prefill {PREFILL}", dtype, threads, PREFILL, peer)


@pytest.mark.parametrize("context", [128, LONG])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@torch.no_grad()
def test_a_step_at_a_length(benchmark, threads, dtype, context):
    """One token after a context that the cache holds: what growing costs."""
    models = pair("125m", DTYPES[dtype])
    caches = {id(model): model(prompt(context), use_cache=True, logits_to_keep=1).past_key_values for model in models}

    def steps(model):
        for _ in range(8):
            model(torch.tensor([[5]]), past_key_values=caches[id(model)])
        caches[id(model)].crop(-8)

    peer = beside(benchmark, steps, models)
    keep(benchmark, f"125m, 8 steps after {context}", dtype, threads, 8, peer)
