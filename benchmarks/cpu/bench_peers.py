"""Decoding on one thread beside other runtimes with the same weights: one round is one call of each.

`make peers` installs them and keeps what this measures in benchmarks/results/peers_<kind>.json. The tokens of every runner
are those of transformers, or all are choices within the error of the dtype, before any is timed.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial

import pytest
import torch

from benchmarks.cpu.peers import Peer, peers
from benchmarks.cpu.peers.compiled import Compiled
from benchmarks.cpu.turns import beside_rounding, continuation, decode, generators, leaves, prompt
from benchmarks.models import DTYPES, EMBEDDED, STORIES, loaded, pair
from benchmarks.tables import OURS

CONTEXT, NEW, THREADS = 128, 64, 1


def runnable(dtype: torch.dtype, bits: int | None = None) -> tuple[list[type[Peer]], dict[str, str]]:
    """The peers that run here in a dtype, or with weights in few bits, and of the others why not."""
    reasons = {peer: peer.why_not(dtype, bits) for peer in peers()}
    return [peer for peer, why in reasons.items() if not why], {peer.name: why for peer, why in reasons.items() if why}


NONE = "none of the optional runtimes is installed; `make peers` measures them"
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="`make gpu` measures this machine"),
    pytest.mark.skipif(runnable(torch.float32)[0] == [Compiled], reason=NONE),
]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)
    torch.compiler.reset()
    gc.collect()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("shape", ["125m", *STORIES, EMBEDDED])
@torch.no_grad()
def test_peers(benchmark, shape, dtype):
    """The whole call, prompt included, as `test_decode` of bench_cpu."""
    theirs, ours = pair(shape, DTYPES[dtype])
    for p in (*theirs.parameters(), *ours.parameters()):
        p.requires_grad_(False)  # exporters would keep it
    ids = prompt(CONTEXT, ours.config.vocab_size)
    expected = continuation(theirs, ids, NEW)
    those, missing = runnable(DTYPES[dtype])
    runners: dict[str, Callable] = generators(shape, dtype) | {peer.name: peer(theirs, THREADS).decode for peer in those}
    coarse = {peer.name: peer.coarse for peer in those}
    tokens = {n: leaves(ours, run(ids, NEW), expected, NEW, coarse.get(n, torch.float32)) for n, run in runners.items()}
    decode(benchmark, (f"{shape}, {CONTEXT} + {NEW} tokens", dtype, THREADS), runners, (ids, NEW, ours.config), warm=True)
    for row in benchmark.extra_info["rows"]:
        found = tokens[row["runner"]]
        row["tokens"] = "equal" if found is None else f"others from token {found} on"
    benchmark.extra_info["missing"] = [{"runner": name, "dtype": dtype, "why": why} for name, why in missing.items()]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", ["125m", *STORIES])
@torch.no_grad()
def test_peers_in_few_bits(benchmark, shape, bits):
    """The same with weights that each runtime has rounded from float32 in its own way; ours otherwise in bfloat16."""
    theirs, exact = pair(shape, torch.float32)
    for p in (*theirs.parameters(), *exact.parameters()):
        p.requires_grad_(False)
    ids, dtype = prompt(CONTEXT, exact.config.vocab_size), f"int{bits}"
    ours = loaded(exact, quantize=dtype, dtype=torch.bfloat16)
    those, missing = runnable(torch.float32, bits)
    runners: dict[str, Callable] = {OURS: partial(continuation, ours)}
    runners |= {peer.name: peer(theirs, THREADS, bits).decode for peer in those}
    off = {name: beside_rounding(exact, ours, run(ids, NEW), NEW) for name, run in runners.items()}
    assert off[OURS] <= 2  # a choice between two logits, each of which may err
    decode(benchmark, (f"{shape}, {CONTEXT} + {NEW} tokens", dtype, THREADS), runners, (ids, NEW, ours.config), warm=True)
    for row in benchmark.extra_info["rows"]:
        row["tokens"], row["off"] = "of its own rounding", off[row["runner"]]
    benchmark.extra_info["missing"] = [{"runner": name, "dtype": dtype, "why": why} for name, why in missing.items()]
