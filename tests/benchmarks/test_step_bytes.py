"""A decode step moves what its floor says and no more, in as many launches as were planned: counted, not computed."""

import pytest
import torch

import gptneo_fast
from benchmarks.static import costs
from benchmarks.static.counting import Launches, Traffic
from gptneo_fast.generation.captured.params import SamplingParams
from gptneo_fast.generation.captured.runner import Runner
from gptneo_fast.ops.constants import FINISHED, GREEDY, PLACE, STATUS

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="bytes are counted in the interpreter")
L, COLUMNS = 2, 64
CONFIG = gptneo_fast.GPTNeoConfig(
    vocab_size=70, hidden_size=32, num_layers=L, num_heads=2, window_size=16, max_position_embeddings=COLUMNS
)


def stepper(B, context):
    """(model, runner, a captured step's work) with random keys and values; the step's token is number `context`."""
    model = gptneo_fast.GPTNeoForCausalLM(CONFIG, backend="triton").eval().requires_grad_(False)
    runner = Runner(model, B, COLUMNS)
    for tensor in (*runner.cache.keys, *runner.cache.values):
        tensor.normal_()
    flags, seeds = torch.zeros(CONFIG.vocab_size, dtype=torch.uint8), torch.zeros(B, dtype=torch.int64)
    step = runner.step_for(SamplingParams(GREEDY, [1.0, 1.0, 0.0, 1.0], [0, 0, COLUMNS], flags, seeds, penalty=False))
    runner.lengths.fill_(context - 1)
    runner.state[STATUS], runner.state[PLACE] = 0, context - 1
    runner.counts[2] = COLUMNS
    return model, runner, step


@pytest.mark.parametrize(
    ("B", "context"), [(1, 40), (1, 10), (3, 40), (20, 40)], ids=lambda value: str(value)
)  # past the window of 16 and within it; vectors, few rows, more rows
def test_weights_and_cache_are_read_once(B, context):
    model, runner, step = stepper(B, context)
    matrices = [p for p in model.parameters() if p.dim() == 2 and p is not model.transformer.wpe.weight]
    vectors = [p for p in model.parameters() if p.dim() == 1]  # norms and biases, which every program reads again
    with Traffic(matrices=matrices, vectors=vectors, cache=[*runner.cache.keys, *runner.cache.values]) as traffic:
        step.replay()
    assert (runner.state[STATUS] != FINISHED).all() and (runner.lengths == context).all()  # it was a step
    read, written = traffic.read, traffic.written
    floor = costs.total(costs.decode_step(CONFIG, B, context, torch.float32, tile=1))
    cache = read["cache"].total + written["cache"].total
    assert cache == floor.cache
    assert read["matrices"].total + read["vectors"].distinct + cache <= 1.02 * floor.bytes
    assert read["matrices"].distinct + read["vectors"].distinct == floor.weights  # and nothing was left out
    launches = [name for name in traffic.launches if name != "aten.zeros"]  # tickets, made once: see the last test
    norms = 2 * L + 1 if B > 16 else 0  # for many rows a kernel of their own
    assert len(launches) == 5 * L + 3 + norms, launches
    print(f"re-reads of norms and biases: {read['vectors'].repeated} bytes; activations: {read['other'].total} read")


def test_a_step_that_reads_a_weight_twice_is_over_the_floor():
    model, _, _ = stepper(1, 10)
    floor = costs.total(costs.decode_step(CONFIG, 1, 10, torch.float32, tile=1))
    x, ln = torch.randn(1, 1, 32), model.transformer.ln_f
    from gptneo_fast import kernels

    with Traffic(weights=model.lm_head.weight) as traffic:
        for _ in range(2):
            kernels.lm_head(x, ln.weight, ln.bias, model.lm_head.weight, 1e-5)
    assert traffic.read["weights"].total == 2 * traffic.read["weights"].distinct
    assert traffic.read["weights"].repeated > 0.02 * floor.bytes


def test_every_step_after_the_first_is_5_launches_a_layer_and_3_and_nothing_else():
    _, runner, step = stepper(3, 20)
    step.replay()  # memory that is kept from step to step is made by the first
    runner.lengths.fill_(19)
    with Launches() as counted:
        step.replay()
    assert len(counted.launches) == 5 * L + 3, counted.launches
    assert costs.total(costs.decode_step(CONFIG, 3, 20, torch.float32)).launches == 5 * L + 3
