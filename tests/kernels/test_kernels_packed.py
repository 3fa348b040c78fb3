"""Weights in 8 and 4 bits on interpreted kernels: within the budget of the weight that they stand for, and no byte beside."""

from __future__ import annotations

import copy
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

import gptneo_fast
from benchmarks.static.counting import Launches
from gptneo_fast import errors, kernels
from gptneo_fast.kernels import launch, tickets
from gptneo_fast.ops import ops, reference, testing
from gptneo_fast.ops.quantized import Format, QuantizedWeight
from gptneo_fast.ops.testing import Sample
from tests.support.interpreting import bfloat16, watched

pytestmark = pytest.mark.skipif(not launch.INTERPRETED, reason="kernels are compiled here: benchmarks/gpu/run.py checks them")
REPO = Path(__file__).parents[2]
EPS = 1e-5
logprob_file = importlib.import_module("gptneo_fast.kernels.logprob")  # the package gives the function under that name
FORMATS = [Format(8), Format(4, 32), Format(4, 64), Format(4, 128)]
DTYPES = [torch.float32, torch.float16]


def rand(*shape, scale=1.0):
    return torch.randn(*shape, dtype=torch.float64) * scale


def int32(values):
    return torch.tensor(values, dtype=torch.int32)


def norm(C):
    return 1 + rand(C, scale=0.1), rand(C)


def weight(N, K, how):
    return QuantizedWeight.of(rand(N, K, scale=K**-0.5).float(), how)


def check(name, monkeypatch, args, dtypes=DTYPES, mutates=()):
    """The kernel of an op on packed weights: within the budget of what they stand for, in its own memory, all bytes kept."""
    places = [i for i, a in enumerate(args) if isinstance(a, QuantizedWeight)]
    assert places
    for dtype in dtypes:
        plain = [a.dequantize(dtype) if i in places else a for i, a in enumerate(args)]

        def on_packed(*given, places=places, args=args):
            given, packed = list(given[: len(args)]), given[len(args) :]
            for i, values, scales in zip(places, packed[::2], packed[1::2], strict=True):
                given[i] = kernels.Packed(values, scales, args[i].shape[1])
            return getattr(kernels, name)(*given)

        extra = [t for i in places for t in args[i].row_by_row()]
        inner = watched(on_packed, monkeypatch, mutates)
        sample = Sample("packed", tuple(plain), mutates).to(dtype)
        fault = testing.over_budget(name, lambda *given, inner=inner, extra=extra: inner(*given, *extra), sample)
        assert fault is None, f"{dtype}: {fault}"
    assert not any(counters.any() for counters in tickets.of_stream.values())


@pytest.mark.parametrize("how", FORMATS, ids=str)
@pytest.mark.parametrize(("rows", "K", "N"), [
    *((1, 20, 37), (1, 768, 21), (1, 1100, 9), (2, 200, 33), (7, 768, 21), (16, 20, 37), (17, 200, 33), (64, 130, 37)),
    *((65, 200, 33), (130, 20, 37), (520, 20, 37)),
])  # fmt: skip
def test_products_of_packed_weights(rows, K, N, how, monkeypatch):
    x, w, bias = rand(rows, 1, K), weight(N, K, how), rand(N)
    check("linear_add", monkeypatch, (x, w, bias, rand(rows, 1, N)), dtypes=DTYPES[rows % 2 :][:1])
    shift = 100 if rows <= 64 else 0  # a mean far from zero
    check("norm_linear", monkeypatch, (x + shift, *norm(K), w, bias, EPS, True), dtypes=DTYPES[:1])
    check("lm_head", monkeypatch, (x, *norm(K), w, EPS), dtypes=DTYPES[1 - rows % 2 :][:1])


@pytest.mark.parametrize(
    ("rows", "ran"), [(1, "packed_gemv"), (64, "skinny"), (65, "gemm"), (512, "gemm"), (513, "_unpack gemm")]
)
def test_what_takes_packed_weights(rows, ran):
    x, w = torch.randn(rows, 20), weight(24, 20, FORMATS[rows % 4])
    with Launches() as seen:
        kernels.linear_add(x, kernels.Packed(*w.row_by_row(), 20), torch.ones(24), torch.randn(rows, 24))
    assert [name for name in seen.launches if not name.startswith("aten")] == ran.split()


def test_packed_weights_in_bfloat16(monkeypatch):
    with bfloat16(monkeypatch):
        for rows, how in ((1, FORMATS[0]), (5, FORMATS[1]), (17, FORMATS[2]), (70, FORMATS[0]), (70, FORMATS[3])):
            args = (rand(rows, 1, 200), weight(33, 200, how), rand(33), rand(rows, 1, 33))
            check("linear_add", monkeypatch, args, dtypes=[torch.bfloat16])


@pytest.mark.parametrize("how", FORMATS, ids=str)
@pytest.mark.parametrize(
    ("B", "T", "starts"), [(1, 1, False), (2, 1, True), (3, 4, True), (9, 2, False), (9, 8, True)], ids=str
)
def test_q_k_and_v_of_packed_weights_and_their_slots(B, T, starts, how, monkeypatch):
    H, D, R = 2, 24, 10
    C = H * D
    lengths = int32([(7 * i) % 31 for i in range(B)])
    begin = int32([i % (T + 1) for i in range(B)]) if starts else None
    weights = [weight(C, C, how) for _ in range(3)]
    args = (rand(B, T, C), *norm(C), *weights, EPS)
    caches = rand(B, H, R, D), rand(B, H, R, D)
    check("norm_qkv_append", monkeypatch, (*args, *caches, lengths, begin), dtypes=DTYPES[T % 2 :][:1], mutates=(7, 8))
    if B * T > 64:
        check("norm_qkv", monkeypatch, args)


@pytest.mark.parametrize("rows", [1, 3, 70])
def test_weights_of_several_formats_go_together(rows, monkeypatch):
    C = 40
    weights = weight(C, C, FORMATS[0]), rand(C, C, scale=C**-0.5), weight(C, C, FORMATS[2])
    caches = rand(rows, 2, 10, C // 2), rand(rows, 2, 10, C // 2)
    args = (rand(rows, 1, C), *norm(C), *weights, EPS, *caches, int32([5] * rows), None)
    check("norm_qkv_append", monkeypatch, args, dtypes=DTYPES[:1], mutates=(7, 8))


def test_no_rows_are_no_work():
    w, x, gamma = weight(24, 40, FORMATS[1]), torch.randn(0, 3, 40), torch.ones(40)
    assert kernels.norm_linear(x, gamma, gamma, w, torch.ones(24), EPS, True).shape == (0, 3, 24)
    assert kernels.lm_head(x, gamma, gamma, w, EPS).shape == (0, 3, 24)


@pytest.mark.parametrize("how", FORMATS, ids=str)
def test_rows_of_a_packed_embedding(how, monkeypatch):
    wte, wpe = weight(41, 200, how), rand(32, 200)
    ids, types = torch.arange(18).view(2, 9) * 2, torch.arange(18).view(2, 9) + 7
    check("embed", monkeypatch, (ids, torch.arange(9)[None], wte, wpe))
    check("embed", monkeypatch, (ids, ids.flip(0) % 32, wte, wpe, types))


@pytest.mark.parametrize("how", FORMATS, ids=str)
def test_log_probabilities_of_a_packed_head_unpack_a_chunk_of_it_at_a_time(how, monkeypatch):
    V, C = 97, 48
    seen, unpacked = [], logprob_file.packed.unpacked
    monkeypatch.setattr(logprob_file, "UNPACKED", 40 * C * 4)
    monkeypatch.setattr(logprob_file.packed, "unpacked", lambda w, x: (seen.append(w.shape), unpacked(w, x))[1])
    check("logprob", monkeypatch, (rand(12, C), weight(V, C, how), torch.arange(12) * 8), dtypes=DTYPES[:1])
    assert seen == [(40, C), (40, C), (17, C)]


def test_kernels_refuse_packed_weights_that_they_would_read_wrong():
    x, w = torch.randn(2, 1, 100), weight(16, 100, FORMATS[2])
    (values, scales), bias, residual = w.row_by_row(), torch.ones(16), torch.randn(2, 1, 16)
    for own, its, K, words in [
        (values.to(torch.int16), scales, 100, r"values of torch.int16 and scales of torch.bfloat16"),
        (values, scales.float(), 100, r"scales keep their dtype"),
        (values[:, ::2], scales, 100, r"values of weight must be contiguous"),
        (values, torch.cat([scales] * 3, 1), 100, r"has values \[16, 64\] and scales \[16, 6\]"),
        (values, scales[:8], 100, r"scales \[8, 2\]"),
        (values, scales, 64, r"weight \[16, 64\] has values \[16, 64\]"),
        (values.to("meta"), scales, 100, r"values of weight are on meta, expected cpu"),
        (torch.zeros(16 * 64 + 8, dtype=torch.uint8)[8:].view(16, 64), scales, 100, "begin at byte 8"),
        (values, scales, 101, r"weight has shape \[16, 101\], expected \[16, 100\]"),
    ]:
        with pytest.raises(errors.InputError, match=words):
            kernels.linear_add(x, kernels.Packed(own, its, K), bias, residual)


def calls(how, dtype=torch.float32, device="cpu"):
    """(op, arguments with packed weights) of every op that takes them."""
    B, T, C, H = 2, 3, 40, 2

    def new(*shape):
        return torch.randn(*shape, device=device).to(dtype)

    def packed(N, K):
        return QuantizedWeight.of(torch.randn(N, K), how).to(device)

    x, gamma, cache = new(B, T, C), new(C), (new(B, H, 8, C // H), new(B, H, 8, C // H))
    ids = torch.arange(B * T, device=device).view(B, T)
    qkv = packed(C, C), packed(C, C), packed(C, C)
    yield "embed", (ids, ids[:1], packed(11, C), new(9, C))
    yield "embed", (ids, ids[:1], packed(11, C), new(9, C), ids)
    yield "norm_linear", (x, gamma, gamma, packed(24, C), new(24), EPS, True)
    yield "norm_qkv", (x, gamma, gamma, *qkv, EPS)
    yield "norm_qkv", (x, gamma, gamma, qkv[0], new(C, C), qkv[2], EPS)
    yield "norm_qkv_append", (x, gamma, gamma, *qkv, EPS, *cache, torch.zeros(B, dtype=torch.int32, device=device))
    yield "linear_add", (x, packed(24, C), new(24), new(B, T, 24))
    yield "lm_head", (x, gamma, gamma, packed(11, C), EPS)
    yield "logprob", (x[0], packed(11, C), ids[0])


@pytest.mark.parametrize("how", FORMATS, ids=str)
def test_an_op_on_packed_weights_is_its_reference_and_tells_tracers_the_shapes(how):
    for name, args in calls(how):
        expected, got = getattr(reference, name)(*args), getattr(ops, name)(*args)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            faked = [mode.from_tensor(a) if isinstance(a, Tensor) else copy.copy(a) for a in args]
            for a in faked:
                if isinstance(a, QuantizedWeight):
                    a._buffers = {key: mode.from_tensor(t) for key, t in a._buffers.items()}
            fake = getattr(ops, name)(*faked)
        for e, g, f in zip(*(x if isinstance(x, tuple) else (x,) for x in (expected, got, fake)), strict=True):
            assert torch.equal(e, g), name
            assert (f.shape, f.dtype, f.stride()) == (e.shape, e.dtype, e.stride()), name


@pytest.mark.parametrize("how", [FORMATS[0], FORMATS[2]], ids=str)
def test_tracers_take_the_two_halves_of_a_packed_weight(how):
    for name, args in calls(how):
        halves = [a.row_by_row()[0] if isinstance(a, QuantizedWeight) else a for a in args]
        scales = [a.row_by_row()[1] for a in args if isinstance(a, QuantizedWeight)]
        overload = getattr(torch.ops.gptneo_fast, name).default
        names = [a.name for a in overload._schema.arguments if a.name.endswith("scales")]
        if len(names) == len(scales):
            torch.library.opcheck(overload, tuple(halves), dict(zip(names, scales, strict=True)))


@pytest.mark.slow  # .ci/run compiles them, too
@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_packed_kernels_of_125m_compile_without_spills_and_with_wide_loads(quantize):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(REPO)}
    command = "-W ignore -m benchmarks.static.compile_report --model 125m --dtype bf16 --sm 90 --quantize".split()
    done = subprocess.run(
        [sys.executable, *command, quantize], capture_output=True, text=True, timeout=600, check=False, cwd=REPO, env=env
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr
    assert {"packed_gemv", "skinny", "gemm", "_unpack"} <= {
        line.split("|")[5].strip() for line in done.stdout.splitlines() if "|" in line
    }


def test_a_model_in_4_bits_generates_on_kernels_what_it_does_on_the_reference():
    config = gptneo_fast.GPTNeoConfig(
        vocab_size=97, hidden_size=48, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]], window_size=7,
        max_position_embeddings=64,
    )  # fmt: skip
    plain = gptneo_fast.GPTNeoForCausalLM(config, backend="reference").eval()
    with torch.no_grad():
        for p in plain.parameters():
            p.copy_(torch.randn_like(p) * 0.1 + (1 if p.dim() == 1 else 0))
    plain.quantize_("int4")
    ours = copy.deepcopy(plain)
    ours.transformer.requested_backend = "triton"
    ids = torch.randint(97, (2, 5))
    expected = plain.generate(ids, max_new_tokens=3, do_sample=False)
    with Launches() as seen:
        got = ours.generate(ids, max_new_tokens=3, do_sample=False)
    assert torch.equal(got, expected)
    assert "skinny" in seen.launches and "_embed_kernel" in seen.launches
    assert torch.equal(ours.generate(ids[:1], max_new_tokens=2, do_sample=False), expected[:1, :7])
