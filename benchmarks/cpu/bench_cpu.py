"""Shapes on the CPU beside transformers eager, a call of theirs before each of ours, equality checked before any is timed.

`make bench` keeps what this measures in benchmarks/results/cpu_<kind>.json, of which the README's table is made.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.cpu.turns import beside, check_tokens, decode, generators, keep, prompt
from benchmarks.models import DTYPES, STORIES, config_of, pair
from benchmarks.tables import PEER
from gptneo_fast.tools.verify import twin

NEW, PREFILL, LONG, FEW = 64, 512, 1920, 8
ROOM = 20 << 30  # 1.3B in bfloat16 twice, and in float64 where tokens differ

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="`make gpu` measures this machine")


@pytest.fixture(params=[1, 2], ids=lambda n: f"{n} threads")
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@functools.cache
def check_logits(shape: str, dtype: str) -> None:
    """Ours err from float64 by at most twice (mean: 1.5 times) what transformers' err, and one rounding."""
    theirs, ours = pair(shape, DTYPES[dtype])
    ids = prompt(PREFILL)
    exact, usual, got = (m(ids).logits.double() for m in (twin(ours, torch.float64), theirs, ours))
    may, error = (usual - exact).abs() + (exact.to(ours.dtype).double() - exact).abs(), (got - exact).abs()
    assert error.max() <= 2 * may.max() and error.mean() <= 1.5 * may.mean()


def in_turns(benchmark, call: Callable[[Any], Any], models: tuple[Any, Any]) -> dict[str, list[float]]:
    """Time `call` of ours, and before each round that of theirs, whose seconds are returned."""
    theirs, ours = models
    return beside(benchmark, functools.partial(call, ours), {PEER: functools.partial(call, theirs)})


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("shape", ["125m", *STORIES])
@torch.no_grad()
def test_decode(benchmark, threads, dtype, shape):
    """The whole call, prompt of 128 included."""
    check_tokens(shape, dtype, 128, NEW)
    work = f"{shape}, 128 + {NEW} tokens", dtype, threads
    decode(benchmark, work, generators(shape, dtype), (prompt(128), NEW, config_of(shape)))


@pytest.mark.parametrize("options", [{"top_k": 50}, {"top_k": 0, "top_p": 0.9}], ids=["top_k 50", "top_p 0.9 of all"])
@pytest.mark.parametrize("shape", ["125m", "TinyStories-1M"])
@torch.no_grad()
def test_sampled(benchmark, threads, shape, options):
    """Drawn tokens, the same ones from the same seed; prompt included."""
    ids, models = prompt(128), pair(shape, torch.float32)

    def drawn(model):
        torch.manual_seed(7)
        how = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": True, "pad_token_id": 0}
        return model.generate(ids, attention_mask=torch.ones_like(ids), **how, **options)

    assert torch.equal(*map(drawn, models))
    peer = in_turns(benchmark, drawn, models)
    how = " ".join(f"{name} {value}" for name, value in options.items())
    keep(benchmark, f"{shape}, 128 + {NEW} tokens, {how}", "fp32", threads, NEW, peer)


def free_memory() -> int:
    """Bytes that the kernel says are to be had."""
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), 0)


@pytest.mark.skipif(free_memory() < ROOM, reason=f"1.3B beside transformers and its check take {ROOM >> 30} GiB")
@torch.no_grad()
def test_decode_of_2_6_gigabytes(benchmark):
    """1.3B in bfloat16: so few tokens that the prompt is most of what a check of them costs."""
    threads = torch.get_num_threads()
    check_tokens("1.3B", "bf16", FEW, FEW)
    work = f"1.3B, {FEW} + {FEW} tokens", "bf16", threads
    decode(benchmark, work, generators("1.3B", "bf16"), (prompt(FEW), FEW, config_of("1.3B")))
    pair.cache_clear()


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

    peer = in_turns(benchmark, steps, models)
    keep(benchmark, f"125m, 4 steps of {rows} rows after 128", dtype, threads, 4 * rows, peer)


@pytest.mark.parametrize(
    ("shape", "dtype", "tokens"),
    [
        *((shape, dtype, PREFILL) for shape in ("125m", "TinyStories-1M") for dtype in ("fp32", "bf16")),
        ("125m", "fp32", LONG),  # transformers' bf16 would take minutes where the CPU does not multiply it
    ],
)
@torch.no_grad()
def test_prefill(benchmark, threads, shape, dtype, tokens):
    check_logits(shape, dtype)
    peer = in_turns(benchmark, lambda model: model(prompt(tokens), logits_to_keep=1), pair(shape, DTYPES[dtype]))
    keep(benchmark, f"{shape}, prefill {tokens}", dtype, threads, tokens, peer)


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

    peer = in_turns(benchmark, steps, models)
    keep(benchmark, f"125m, 8 steps after {context}", dtype, threads, 8, peer)
