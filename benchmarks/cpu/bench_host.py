"""What a step costs the host, apart from the work: a model too small to compute anything, on one thread of a CPU.

python -m benchmarks.cpu.bench_host ROW   # launches of a layer on a card that does nothing, into results/host.json as ROW
"""

from __future__ import annotations

import contextlib
import json
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import pytest
import torch

import gptneo_fast
from benchmarks.cpu.idle_card import idle_card
from benchmarks.cpu.turns import keep
from benchmarks.models import pair
from benchmarks.static.counting import swapped
from gptneo_fast.generation.captured.capturing import EagerStep
from gptneo_fast.generation.captured.params import SamplingParams
from gptneo_fast.generation.captured.runner import Runner
from gptneo_fast.network import fused
from gptneo_fast.network.masks import Rows
from gptneo_fast.ops import ops
from gptneo_fast.ops.constants import COUNT, GREEDY, STATUS

LAYERS, TOKENS = 24, 256
RESULTS = Path(__file__).parents[1] / "results" / "host.json"
PROMPT, PASSES = 130, 3000  # more rows than `skinny` takes


@pytest.fixture
def model():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    config = gptneo_fast.GPTNeoConfig(
        hidden_size=8, num_heads=2, num_layers=LAYERS, vocab_size=16, window_size=16, max_position_embeddings=512
    )
    yield gptneo_fast.GPTNeoForCausalLM(config).eval()
    torch.set_num_threads(before)


@torch.no_grad()
def test_a_launched_step(benchmark, model):
    """Python and dispatch of the stepwise path: what a captured step saves."""
    cache = gptneo_fast.KVCache(model.config, 1, dtype=torch.float32, device="cpu", max_length=512)
    token, place = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64)
    model.step(token, place, None, cache)

    def steps():
        for _ in range(16):
            model.step(token, place, None, cache)
        cache.crop(1)

    benchmark.pedantic(steps, rounds=9, warmup_rounds=1)
    keep(benchmark, f"host cost of a launched step, {LAYERS} layers", "fp32", 1, 16)


def test_a_replayed_token(benchmark, model):
    """The runner's loop where a replay costs nothing: looks, tokens handed over. A graph's launch comes on top."""
    runner = Runner(model, 1, 512)
    drawing = SamplingParams(
        GREEDY, [1.0, 1.0, 0.0, 1.0], [0, 0, TOKENS], runner.flags, torch.zeros(1, dtype=torch.int64), False
    )
    runner.steps[GREEDY, False] = EagerStep(lambda: None, "what is left is measured")
    ids = torch.zeros(1, 1, dtype=torch.int64)

    def begin(*_):
        runner.state.zero_()
        runner.state[COUNT], runner.state[STATUS] = TOKENS, 0

    runner.begin = begin
    runner._host_out, runner._seen_columns = torch.empty(runner.out.shape, dtype=torch.int32), 0

    def tokens():
        runner._seen_columns = 0
        for piece, *_ in runner.run(ids, None, drawing, 16):
            piece.split(1, 1)

    benchmark.pedantic(tokens, rounds=9, warmup_rounds=1)
    keep(benchmark, "host cost of a replayed token, replay left out", "fp32", 1, TOKENS)


@pytest.mark.parametrize("anew", [True, False], ids=["a look", "asking whether one is due"])
@pytest.mark.parametrize("shape", ["125m", "TinyStories-1M"])
def test_what_looking_costs(benchmark, shape, anew):
    """Whether a module was touched: a look at all of them, which a request takes once, and what each step asks."""
    ours = pair(shape, torch.float32)[1]

    def looks():
        for _ in range(100):
            ours.looked(anew)

    benchmark.pedantic(looks, rounds=9, warmup_rounds=1)
    what = "a look at the modules" if anew else "asking whether a look is due"
    keep(benchmark, f"host cost of {what}, {shape}", "fp32", 1, 100)


@contextlib.contextmanager
def launched_from_the_cpu():
    """An idle card on which the ops' kernels, not their references, compute on CPU tensors.

    cuBLASLt's part of a layer is called on no rows: its dispatch counts, its work does not.
    """
    library = torch.library.Library("gptneo_fast", "IMPL")
    for name in ops.NAMES:
        library.impl(name, ops._append if name == "kv_append" else ops._launcher(name), "CPU", allow_override=True)

    def on_no_rows(product):
        return lambda bias, rows, weight, out, **how: product(bias, rows[:0], weight, out=out[:0], **how)

    with contextlib.ExitStack() as stack:
        for name in ("addmm", "_addmm_activation"):
            stack.enter_context(swapped(torch, name, on_no_rows))
        card = stack.enter_context(idle_card())
        counters = torch.zeros(1 << 14, dtype=torch.int32)
        stack.enter_context(mock.patch("gptneo_fast.kernels.tickets.zeros", return_value=counters))
        yield card


@torch.no_grad()
def a_layer(past: int, T: int) -> dict[str, float]:
    """Microseconds and launches of a layer, mean of a global and a local one, for T new tokens after `past`."""
    config = gptneo_fast.GPTNeoConfig(
        hidden_size=64, num_heads=1, num_layers=2, vocab_size=64, max_position_embeddings=512, window_size=256
    )
    model = gptneo_fast.GPTNeoForCausalLM(config).eval().bfloat16()
    cache = gptneo_fast.KVCache(config, 1, dtype=torch.bfloat16, device="cpu", max_length=512)
    if past:
        cache.reserve(past)
        cache.advance(past, None)
    cache.reserve(T)
    x, rows, blocks = torch.randn(1, T, 64).bfloat16(), Rows(), model.transformer.h

    def layers():
        y = x
        for i, block in enumerate(blocks):
            y = fused.block(block, y, rows=rows, cache=cache, layer=i, window=fused.window_of(block), op=ops)

    with launched_from_the_cpu() as card:
        layers()
        before = card.launches
        layers()
        launches, took = card.launches - before, []
        for _ in range(PASSES):
            begin = time.perf_counter()
            layers()
            took.append(time.perf_counter() - begin)
    return {"us": round(min(took) / len(blocks) * 1e6), "launches": launches / len(blocks)}


def main(row: str) -> None:
    torch.set_num_threads(1)
    cpu = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    commit = subprocess.run(["git", "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True).stdout.strip()
    found = {
        "commit": commit,
        "cpu": cpu.partition(": ")[2],
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "triton")},
        "prefill_layer": a_layer(0, PROMPT),
        "decode_layer": a_layer(100, 1),
    }
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps(kept | {row: found}, indent=1) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
