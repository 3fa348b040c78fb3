"""Costs: equal to the published floors, to what torch counts, to the parameters that a model has."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import gptneo_fast
from benchmarks.models import config_of
from benchmarks.static import costs

SMALL = gptneo_fast.GPTNeoConfig(vocab_size=97, hidden_size=32, num_heads=4, num_layers=3, window_size=7)
BF16 = torch.bfloat16


FLOORS = {  # milliseconds as the plan prints them; None where it gives none
    "125m": ("0.084", "0.145", "0.989", "0.50", "5.24"),
    "1.3B": ("0.883", "1.210", "5.710", "6.52", "54.7"),
    "2.7B": ("1.778", None, None, "13.45", "110.1"),
}


@pytest.mark.parametrize("shape", FLOORS)
def test_floors_are_those_of_the_plan(shape):
    seconds = costs.floors(shape, BF16, bandwidth=3.0e12, rate=798e12)
    for (work, got), expected in zip(seconds.items(), FLOORS[shape], strict=True):
        if expected is not None:
            assert f"{got * 1e3:.{len(expected.partition('.')[2])}f}" == expected, work


@pytest.mark.parametrize(("shape", "expected"), [("125m", "11,901"), ("1.3B", "1,133"), ("2.7B", "562")])
def test_tokens_per_second_are_those_of_the_plan(shape, expected):
    assert f"{1 / costs.total(costs.decode_step(config_of(shape), 1, 128, BF16)).floor(3.0e12):,.0f}" == expected


@pytest.mark.parametrize("window", [0, 1, 4, 100])
@pytest.mark.parametrize("past", [0, 1, 3, 4, 9])
@pytest.mark.parametrize("tokens", [1, 2, 5, 8])
def test_pairs_are_those_that_the_mask_leaves(tokens, past, window):
    queries = range(past, past + tokens)
    visible = sum(1 for q in queries for k in range(q + 1) if not window or k > q - window)
    assert costs.pairs(tokens, past, window) == visible


def test_weights_are_the_parameters_of_the_model_without_the_positions():
    model = gptneo_fast.GPTNeoForCausalLM(SMALL)
    expected = sum(p.numel() for p in model.parameters()) - model.transformer.wpe.weight.numel()
    for work in (costs.decode_step(SMALL, 1, 9, BF16, tile=1), costs.prefill(SMALL, 1, 9, torch.float32)):
        element = 2 if work[-1].op == "sample" else 4
        padding = 0 if element == 2 else 128 - 97  # the default tile
        assert costs.total(work).weights == element * (expected + padding * SMALL.hidden_size)


def test_flops_of_linear_layers_are_what_torch_counts():
    model, ids = gptneo_fast.GPTNeoForCausalLM(SMALL, backend="reference"), torch.randint(0, 97, (2, 11))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids, logits_to_keep=1, use_cache=False)
    counted = counter.get_flop_counts()["Global"]
    linear = counted[torch.ops.aten.mm] + counted.get(torch.ops.aten.addmm, 0)
    ours = [c for c in costs.prefill(SMALL, 2, 11, torch.float32) if c.op not in ("attention", "lm_head")]
    assert costs.total(ours).flops == linear - 2 * 2 * 97 * 32  # torch's head has no padded rows


def test_a_step_reads_what_the_cache_holds_and_no_more():
    config, dtype = SMALL.replace(max_position_embeddings=2048), torch.float16
    for context in (3, 7, 8, 200):
        cache = costs.total(costs.decode_step(config, 5, context, dtype)).cache
        windows = [min(context, config.window(layer) or context) for layer in range(3)]
        assert cache == 2 * 5 * 32 * 2 * (sum(windows) + 3)  # keys and values read, and one of each written a layer


@pytest.mark.parametrize("length", [5, 135, 400])
def test_a_prefill_fills_the_cache_that_the_model_allocates(length):
    appended = [c for c in costs.prefill(SMALL, 3, length, BF16) if c.op == "kv_append"]
    assert appended[0].cache == gptneo_fast.cache_bytes(SMALL, 3, length, BF16)


def test_launches_are_as_planned():
    config = config_of("1.3B")
    L = config.num_layers
    assert costs.total(costs.decode_step(config, 1, 128, BF16)).launches == 5 * L + 3
    assert costs.total(costs.prefill(config, 1, 128, BF16)).launches == 8 * L + 3
    assert costs.total(costs.prefill(config, 1, 128, BF16, cache=False)).launches == 7 * L + 3


def test_a_total_is_the_sum_and_its_floor_the_slower_of_memory_and_arithmetic():
    a = costs.Cost("a", weights=10, cache=20, activations=1000, flops=6)
    whole = costs.total([a * 2, costs.Cost("b", weights=1, flops=100, launches=0)])
    assert (whole.weights, whole.cache, whole.activations, whole.flops, whole.launches) == (21, 40, 2000, 112, 2)
    assert whole.floor(bandwidth=61.0, rate=1e9) == 1.0
    assert whole.floor(bandwidth=1e9, rate=56.0) == 2.0


def test_the_command_prints_every_op_of_a_step(capsys):
    costs.main(["--model", "125m", "--batch", "8", "--context", "1024", "--dtype", "fp16"])
    printed = capsys.readouterr().out
    for op in ("norm_qkv_append", "decode_attention", "kv_append", "attention", "lm_head", "sample", "total"):
        assert f"| {op} " in printed
    costs.main([])
    assert "| 1.3B " in capsys.readouterr().out
