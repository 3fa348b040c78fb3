"""Every kernel in the Triton interpreter: within its error budget, writing its result and nothing else."""

import subprocess
import sys
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from gptneo_fast import errors, kernels
from gptneo_fast.kernels import launch
from gptneo_fast.ops import ops, reference, testing
from tests.support.interpreting import bfloat16, watched

pytestmark = pytest.mark.skipif(not launch.INTERPRETED, reason="kernels are compiled here: benchmarks/gpu/run.py checks them")

CASES = [(name, sample) for name in ops.NAMES if hasattr(kernels, name) for sample in testing.SAMPLES[name]()]
IDS = [f"{name}: {sample.name}" for name, sample in CASES]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "sample"), CASES, ids=IDS)
def test_a_kernel_stays_within_its_error_budget_and_its_memory(name, sample, dtype, monkeypatch):
    function = watched(getattr(kernels, name), monkeypatch, sample.mutates)
    with bfloat16(monkeypatch) if dtype == torch.bfloat16 else nullcontext():
        assert testing.over_budget(name, function, sample.to(dtype)) is None


def test_the_bench_notices_what_a_kernel_does_wrong(monkeypatch):
    sample = next(testing.SAMPLES["layer_norm"]()).to(torch.float32)

    def over(function):
        return testing.over_budget("layer_norm", watched(function, monkeypatch), sample)

    def writes_beside_its_result(x, *rest):
        out = kernels.layer_norm(x, *rest)
        out.as_strided((1,), (1,), out.storage_offset() + out.numel()).zero_()
        return out

    def changes_its_argument(x, weight, *rest):
        out = kernels.layer_norm(x, weight, *rest)
        weight += 1
        return out

    with pytest.raises(AssertionError, match="wrote beside a result"):
        over(writes_beside_its_result)
    with pytest.raises(AssertionError, match="argument 1 was changed"):
        over(changes_its_argument)
    assert "finite" in over(lambda x, *rest: launch.empty(tuple(x.shape), x))


def test_interpreted_bfloat16_raises_outside_the_bench():
    sample = next(testing.SAMPLES["layer_norm"]()).to(torch.bfloat16)
    with pytest.raises(errors.SetupError, match=r"interpreter computes torch\.bfloat16 wrong"):
        sample.run(kernels.layer_norm)


def test_kernels_refuse_what_they_cannot_read():
    x, weight, bias, eps = next(testing.SAMPLES["layer_norm"]()).to(torch.float32).args
    for bad, words in [
        ((x.double(), weight, bias, eps), "not torch.float64"),
        ((x, weight.half(), bias, eps), "weight is torch.float16 on cpu, expected torch.float32 on cpu"),
        ((x, weight, torch.stack([bias, bias], 1)[:, 0], eps), "the last axis of bias has stride 2"),
    ]:
        with pytest.raises(errors.InputError, match=words):
            kernels.layer_norm(*bad)


def test_kernels_refuse_shapes_that_they_would_read_past():
    x, norm, weight, bias = torch.ones(2, 3, 16), torch.ones(16), torch.ones(24, 16), torch.ones(24)
    q, cache, ints = torch.ones(2, 1, 3, 16), torch.ones(2, 1, 8, 16), torch.zeros(4, dtype=torch.int32)
    for function, args, words in [
        (kernels.layer_norm, (x, norm, bias, 1e-5), r"layer_norm: bias has shape \[24\], expected \[16\]"),
        (kernels.norm_linear, (x, norm, norm, weight[:, :8].contiguous(), bias, 1e-5, False), r"weight has shape \[24, 8\]"),
        (kernels.norm_qkv, (x, norm, norm, weight, weight, weight[:8], 1e-5), r"wv has shape \[8, 16\], expected \[24, 16\]"),
        (kernels.linear_add, (x, weight, bias, x), r"residual has shape \[2, 3, 16\], expected \[2, 3, 24\]"),
        (kernels.attention, (q, q, q[:, :, :2], 0), r"v has shape \[2, 1, 2, 16\]"),
        (kernels.attention, (q, q, q, 0, ints), r"starts has shape \[4\], expected \[2\]"),
        (kernels.attention, (q, q, q, 0, ints[::2]), r"starts must be contiguous"),
        (kernels.attention, (q, q, q, 0, None, None, cache, cache[:, :, :4], ints[:2]), r"v_cache has shape \[2, 1, 4, 16\]"),
        (kernels.kv_append, (cache, cache, q, q, ints), r"lengths has shape \[4\]"),
        (kernels.embed, (ints[:2].long().view(1, 2), ints[:3].long().view(1, 3), weight, weight), r"position_ids has shape"),
    ]:
        with pytest.raises(errors.InputError, match=words):
            function(*args)


def test_weights_may_be_slices_and_a_batch_may_be_empty():
    x, norm, weight = torch.randn(1, 70, 16), (torch.ones(16), torch.zeros(16)), torch.randn(3, 16, 40)
    sliced = [w[:, 8:24] for w in weight]
    for got, expected in zip(
        kernels.norm_qkv(x, *norm, *sliced, 1e-5), reference.norm_qkv(x, *norm, *sliced, 1e-5), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    empty, bias = x[:0], torch.zeros(16)
    assert kernels.norm_linear(empty, *norm, sliced[0], bias, 1e-5, True).shape == (0, 70, 16)
    assert (
        kernels.linear_add(empty, sliced[0], bias, empty).shape == kernels.layer_norm(empty, *norm, 1e-5).shape == (0, 70, 16)
    )


def test_a_kernel_runs_on_the_device_of_its_tensors_whatever_the_current_one_is(monkeypatch):
    current, seen = [0], []

    @contextmanager
    def device(wanted):
        before, current[0] = current[0], wanted.index
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", device)

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **meta: seen.append((grid, current[0], args, meta))

    for index in (1, 0):
        launch.run(Kernel(), 3, SimpleNamespace(is_cuda=True, device=torch.device("cuda", index)), "x", BLOCK=8)
    launch.run(Kernel(), 0, SimpleNamespace(is_cuda=True, device=torch.device("cuda", 1)))
    assert seen == [((3,), 1, ("x",), {"BLOCK": 8}), ((3,), 0, ("x",), {"BLOCK": 8})]  # an empty grid launches nothing
    assert current == [0]


def test_without_the_interpreter_a_cpu_tensor_is_refused():
    code = "import torch; from gptneo_fast import kernels; x = torch.ones(2, 16); kernels.layer_norm(x, x[0], x[0], 1e-5)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PATH": "/usr/bin", "TRITON_INTERPRET": "0"}
    )
    assert "SetupError: layer_norm: kernels run on CUDA tensors, not on cpu" in done.stderr
