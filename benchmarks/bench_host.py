"""What a step costs the host, apart from the work: a model too small to compute anything, on one thread of a CPU."""

from __future__ import annotations

import pytest
import torch

import gptneo_fast
from benchmarks.bench_cpu import keep
from gptneo_fast.engine.capturing import EagerStep
from gptneo_fast.engine.plan import Drawing
from gptneo_fast.engine.runner import Runner
from gptneo_fast.sampling import COUNT, GREEDY, STATUS

LAYERS, TOKENS = 24, 256


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
    keep(benchmark, f"host cost of a launched step, {LAYERS} layers", "gptneo_fast", "fp32", 1, 16)


def test_a_replayed_token(benchmark, model):
    """The runner's loop where a replay costs nothing: looks, tokens handed over. A graph's launch comes on top."""
    runner = Runner(model, 1, 512)
    drawing = Drawing(GREEDY, [1.0, 1.0, 0.0, 1.0], [0, 0, TOKENS], runner.flags, torch.zeros(1, dtype=torch.int64), False)
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
    keep(benchmark, "host cost of a replayed token, replay left out", "gptneo_fast", "fp32", 1, TOKENS)
