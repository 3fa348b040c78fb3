"""What launches cost the host, in calls of Python functions, which no other load of the machine changes; and what compiles."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton

import gptneo_fast
from gptneo_fast import kernels
from gptneo_fast.generation.captured.pool import weights_of
from gptneo_fast.kernels import launch
from gptneo_fast.network import fused
from gptneo_fast.network.masks import Rows
from gptneo_fast.network.modules import parameters
from gptneo_fast.ops import backends

REPO = Path(__file__).parents[2]


@pytest.fixture
def model():
    config = gptneo_fast.GPTNeoConfig(
        hidden_size=64, num_heads=1, num_layers=2, vocab_size=64, window_size=256, max_position_embeddings=512
    )
    return gptneo_fast.GPTNeoForCausalLM(config).eval().requires_grad_(False)


def python_calls(function):
    """How many Python functions a call of `function` enters."""
    count = 0

    def watch(frame, event, arg):
        nonlocal count
        count += event == "call"

    sys.setprofile(watch)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.skipif(not launch.INTERPRETED, reason="launches are cut off in the interpreter")
@pytest.mark.parametrize(("past", "T", "launches", "most"), [(0, 130, 8, 200), (100, 1, 5, 175)], ids=["prefill", "decode"])
def test_a_layer_asks_python_for_no_more_than_it_needs(model, monkeypatch, past, T, launches, most):
    cache = gptneo_fast.KVCache(model.config, 1, dtype=torch.float32, device="cpu", max_length=512)
    if past:
        cache.reserve(past)
        cache.advance(past, None)
    cache.reserve(T)
    x, block, made = torch.zeros(1, T, 64), model.transformer.h[0], []
    monkeypatch.setattr(launch, "run", lambda kernel, *_, **__: made.append(kernel.__name__))
    for slow in ("cdiv", "next_power_of_2"):  # from the host they cost 10 us a call
        monkeypatch.setattr(triton, slow, lambda *_: pytest.fail("a launcher counts with triton's function of kernels"))

    @torch.no_grad()
    def layer():
        fused.block(block, x, rows=Rows(), cache=cache, layer=0, window=0, op=kernels)

    layer()
    assert len(made) == launches
    assert python_calls(layer) <= most


def test_the_walk_over_parameters_meets_each_and_sees_what_is_replaced(model):
    assert {id(p) for p in parameters(model)} == {id(p) for p in model.parameters()}
    before = weights_of(model)
    assert weights_of(model) == before
    linear = model.transformer.h[1].mlp.c_fc
    linear.weight = torch.nn.Parameter(linear.weight.clone())  # of the same shape and dtype
    assert weights_of(model) != before
    before = weights_of(model)
    model.transformer.h[1].mlp.add_module("adapter", torch.nn.Linear(4, 4))
    assert weights_of(model) != before
    before = weights_of(model)
    model.transformer.ln_f.eps *= 2
    assert weights_of(model) != before


def test_one_trainable_parameter_anywhere_takes_plain_torch(model, monkeypatch):
    chosen = []
    monkeypatch.setattr(backends, "choose", lambda *args: chosen.append(args[-1]) or backends.Choice)
    monkeypatch.setattr(backends.Choice, "functions", None, raising=False)
    x = torch.zeros(1, 1, 64)
    model.transformer.functions(x)
    model.transformer.h[1].mlp.c_proj.bias.requires_grad_(True)
    model.transformer.functions(x)
    with torch.no_grad():
        model.transformer.functions(x)
    assert chosen == [False, True, False]


def in_a_process(*command):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(REPO)}
    done = subprocess.run([sys.executable, "-W", "ignore", *command], capture_output=True, text=True, env=env, cwd=REPO)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_no_size_that_varies_makes_triton_compile_again():
    """Lengths, batches and slots, 1, 16 and odd ones among them; each choice of tiles is one binary."""
    found = json.loads(in_a_process("tests/support/specialised.py", "125m", "bf16"))
    assert found["launches"] > 1000
    assert {kernel for kernel, *_ in found["binaries"]} > {"_embed_kernel", "gemm", "attend", "gemv", "skinny"}
    assert [(kernel, tiles, n) for kernel, tiles, n in found["binaries"] if n > 1] == []


def test_a_launchpad_for_another_card_asks_for_its_multiprocessors_anew():
    code = """
import torch
from torch._subclasses import FakeTensorMode
from benchmarks.static.aot import Launchpad
from gptneo_fast.kernels import launch
for capability in (80, 90):
    with Launchpad(capability), FakeTensorMode():
        print(launch.multiprocessors(torch.empty(1, device="cuda")))
"""
    assert in_a_process("-c", code).split() == ["108", "132"]
