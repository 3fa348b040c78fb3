"""The kernels of a decode step in the interpreter: every edge within its budget, every order of arrival the same bits."""

from __future__ import annotations

import importlib
import itertools
import random

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder

from benchmarks.static.counting import Traffic
from gptneo_fast import kernels
from gptneo_fast.kernels import blocks, launch, skinny, tickets
from gptneo_fast.ops import reference, testing
from gptneo_fast.ops.testing import Sample
from tests.support.interpreting import watched

pytestmark = pytest.mark.skipif(not launch.INTERPRETED, reason="kernels are compiled here: benchmarks/gpu/run.py checks them")
EPS = 1e-5
attending = importlib.import_module("gptneo_fast.kernels.decode_attention")  # the package gives the function under that name


def rand(*shape, scale=1.0):
    return torch.randn(*shape, dtype=torch.float64) * scale


def int32(values):
    return torch.tensor(values, dtype=torch.int32)


def check(name, monkeypatch, args, mutates=(), dtypes=(torch.float32, torch.float16)):
    """The kernel of an op on these arguments: in budget, in its own memory; and every ticket counter at zero again."""
    sample = Sample("edge", args, mutates)
    for dtype in dtypes:
        function = watched(getattr(kernels, name), monkeypatch, mutates)
        assert testing.over_budget(name, function, sample.to(dtype)) is None, dtype
    assert not any(counters.any() for counters in tickets.of_stream.values())


ATTENTION = [
    # T, D, slots, window, lengths, starts
    *((1, D, 384, 256, (0, 255, 256, 400, 1000), None) for D in (4, 8, 16, 32, 48, 64, 128)),
    *((3, D, 384, 256, (0, 255, 256, 383, 1000), None) for D in (4, 48, 128)),
    (1, 16, 200, 0, (0, 62, 63, 64, 127, 128, 199), None),  # around the ends of splits
    (1, 8, 2048, 0, (2047, 1100), None),  # 32 splits
    (2, 16, 300, 0, (0, 254, 255, 256, 298), None),
    (16, 8, 271, 256, (0, 255, 500), None),  # a ring with no slot to spare
    (17, 8, 384, 256, (0, 240, 1000), None),
    (129, 4, 384, 256, (0, 1000), None),  # the longest step
    (129, 4, 700, 0, (0, 571), None),
    (1, 8, 384, 256, (5, 300, 0), (0, 0, 1)),
    (9, 8, 384, 256, (5, 300, 0, 700), (0, 4, 9, 9)),  # padded, some rows wholly
    (70, 8, 700, 0, (5, 600, 0), (0, 69, 70)),
    (4, 8, 140, 12, (3, 200, 139), (3, 0, 2)),  # a window that is no power of two
]


@pytest.mark.parametrize(("T", "D", "R", "window", "lengths", "starts"), ATTENTION)
def test_attention_to_the_cache_is_the_reference_s(T, D, R, window, lengths, starts, monkeypatch):
    B = len(lengths)
    q = rand(B, T, 2 * D).unflatten(-1, (2, D)).transpose(1, 2)
    cache = rand(B, 2, R, D), rand(B, 2, R, D)
    args = (q, *cache, int32(lengths), window, None if starts is None else int32(starts))
    check("decode_attention", monkeypatch, args, dtypes=(torch.float32, torch.float16) if T < 3 else (torch.float32,))


@pytest.mark.parametrize(("keys", "steps"), [(64, 1), (32, 2), (16, 8)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_attention_of_one_query_is_right_in_splits_of_any_size(keys, steps, dtype, monkeypatch):
    tile = attending.ONE[dtype.itemsize]._replace(BS=keys, steps=steps)
    monkeypatch.setitem(attending.ONE, dtype.itemsize, tile)
    for sample in testing.SAMPLES["decode_attention"]():
        assert testing.over_budget("decode_attention", kernels.decode_attention, sample.to(dtype)) is None
    for T, R, window, lengths in ((1, 384, 256, (0, 254, 255, 256, 1000)), (1, 600, 0, (64, 599)), (5, 384, 256, (251, 700))):
        q = rand(len(lengths), 1, T, 8)
        cache = rand(len(lengths), 1, R, 8), rand(len(lengths), 1, R, 8)
        check("decode_attention", monkeypatch, (q, *cache, int32(lengths), window), dtypes=(dtype,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_what_is_no_number_is_not_hidden(where, dtype):
    q, k, v = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 384, 8), torch.randn(1, 1, 384, 8)
    {"q": q, "k": k, "v": v}[where][0, 0, 0 if where == "q" else 5] = float("nan")
    q, k, v = (x.to(dtype) for x in (q, k, v))
    assert kernels.decode_attention(q, k, v, int32([300]), 0).isnan().all()
    seen = kernels.decode_attention(q, k, v, int32([300]), 256).isnan()
    assert seen.all() if where == "q" else not seen.any()  # token 5 has left the window


@triton.jit
def _exponentials(x_ptr, y_ptr, EXACT: tl.constexpr):
    at = tl.arange(0, 4096)
    tl.store(y_ptr + at, blocks.exp(tl.load(x_ptr + at), EXACT))


def test_exponentials_of_float32_are_right_to_an_ulp():
    x = torch.cat([torch.linspace(-86.9, 0, 4094), torch.tensor([-float("inf"), float("nan")])])
    y = torch.empty(4096)
    _exponentials[(1,)](x, y, EXACT=True)
    exact = x[:-2].double().exp()
    assert ((y[:-2].double() - exact).abs() / exact).max() < 2**-23
    assert y[-2] == 0 and y[-1].isnan()


def test_a_window_that_is_one_split_has_nothing_to_merge(monkeypatch):
    monkeypatch.setattr(attending, "arrives_last", lambda *_: pytest.fail("took a ticket"))
    q, cache = torch.randn(1, 1, 1, 4), (torch.randn(1, 1, 384, 4), torch.randn(1, 1, 384, 4))
    kernels.decode_attention(q, *cache, int32([1000]), 256)
    with pytest.raises(pytest.fail.Exception, match="took a ticket"):
        kernels.decode_attention(q, *cache, int32([382]), 0)


@pytest.mark.parametrize("B", [1, 2, 3, 8, 9, 16, 17, 33])
@pytest.mark.parametrize(("T", "D", "starts"), [(1, 16, False), (2, 48, True), (12, 4, True)])
def test_append_puts_every_row_of_every_batch_into_its_slots(B, T, D, starts, monkeypatch):
    C, R = 2 * D, 10
    lengths = int32([(7 * i) % 31 for i in range(B)])  # before, at and after the ring's end
    begin = int32([i % (T + 1) for i in range(B)]) if starts else None
    weights = (rand(C, C, scale=C**-0.5) for _ in range(3))
    caches = rand(B, 2, R, D), rand(B, 2, R, D)
    check(
        "norm_qkv_append",
        monkeypatch,
        (rand(B, T, C), 1 + rand(C, scale=0.1), rand(C), *weights, EPS, *caches, lengths, begin),
        mutates=(7, 8),
        dtypes=(torch.float32,),
    )


@pytest.mark.parametrize("rows", [1, 2, 9, 17, 64, 65])
@pytest.mark.parametrize("K", [20, 768, 1536])
def test_few_rows_times_a_weight(rows, K, monkeypatch):
    x, gamma, beta, residual = rand(rows, 1, K), 1 + rand(K, scale=0.1), rand(K), rand(rows, 1, 37)
    weight, bias = rand(37, K, scale=K**-0.5), rand(37)
    check("linear_add", monkeypatch, (x, weight, bias, residual))
    shift = 100 if rows <= skinny.MOST_ROWS else 0  # a mean far from zero
    check("norm_linear", monkeypatch, (x + shift, gamma, beta, weight, bias, EPS, True), dtypes=(torch.float32,))
    check("lm_head", monkeypatch, (x, gamma, beta, weight, EPS), dtypes=(torch.float16,))


@pytest.mark.parametrize("K", [2048, 2560, 3072])
def test_the_widths_of_released_models(K, monkeypatch):
    x, gamma, beta = rand(1, 1, K), 1 + rand(K, scale=0.1), rand(K)
    weight = rand(37, K, scale=K**-0.5)
    check("linear_add", monkeypatch, (x, weight, rand(37), rand(1, 1, 37)))
    check("linear_add", monkeypatch, (x.expand(5, 1, K) + rand(5, 1, 1), weight, rand(37), rand(5, 1, 37)))
    check("lm_head", monkeypatch, (x, gamma, beta, weight, EPS))


def test_weights_that_lie_at_an_odd_place(monkeypatch):
    """Pairs of 16-bit elements are read as one word only where all of them begin on four bytes."""
    memory = rand(1 + 5 * 64)
    weight = memory[1:].view(5, 64)
    sample = Sample("odd", (rand(1, 1, 64), weight, rand(5), rand(1, 1, 5))).to(torch.float16)
    x, _, bias, residual = sample.args
    weight = memory.half()[1:].view(5, 64)
    assert weight.storage_offset() == 1
    got = kernels.linear_add(x, weight, bias, residual)
    torch.testing.assert_close(got, reference.linear_add(x, weight, bias, residual), rtol=2**-9, atol=2**-9)


def test_logits_of_a_row_begin_on_sixteen_bytes():
    x, weight = torch.randn(3, 1, 16), torch.randn(13, 16)
    for functions in (kernels, reference):
        logits = functions.lm_head(x, torch.ones(16), torch.zeros(16), weight, EPS)
        assert logits.shape == (3, 1, 13) and logits.stride() == (16, 16, 1), functions.__name__


class _Order:
    """The programs of every launch in another order than their numbers."""

    def __init__(self, monkeypatch, order):
        set_grid_idx = InterpreterBuilder.set_grid_idx

        def moved(builder, x, y, z):
            if x == 0:
                self.places = order(builder.grid_dim[0])
            set_grid_idx(builder, self.places[x], y, z)

        monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", moved)


def test_splits_may_arrive_in_every_order_and_give_the_same_bits(monkeypatch):
    lengths, window = int32([230, 75]), 0  # 4 splits and 2
    q, k, v = torch.randn(2, 1, 1, 8), torch.randn(2, 1, 240, 8), torch.randn(2, 1, 240, 8)
    x, weight, bias, residual = torch.randn(2, 768), torch.randn(16, 768), torch.randn(16), torch.randn(2, 16)
    assert skinny.tile("linear_add", 2, 16, 768, 2, 132).splits == 4

    def both():
        attended = kernels.decode_attention(q, k, v, lengths, window)
        return attended, kernels.linear_add(x.half(), weight.half(), bias.half(), residual.half())

    expected = both()
    orders = list(itertools.permutations(range(4)))
    assert len(orders) == 24
    for order in orders:

        def arranged(n, order=order):
            return [group + i for group in range(0, n, 4) for i in order[: n - group]] if n % 4 == 0 else list(range(n))

        with monkeypatch.context() as patch:
            _Order(patch, arranged)
            got = both()
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)), order
    assert not any(counters.any() for counters in tickets.of_stream.values())


@pytest.mark.parametrize("seed", range(5))
def test_programs_of_a_whole_launch_may_arrive_in_any_order(seed, monkeypatch):
    B, H, T, D = 3, 2, 20, 8
    q, k, v = torch.randn(B, H, T, D), torch.randn(B, H, 640, D), torch.randn(B, H, 640, D)
    x, weight, bias = torch.randn(33, 3072).half(), torch.randn(20, 3072).half(), torch.randn(20).half()
    lengths = int32([600, 3, 300])

    def both():
        return kernels.decode_attention(q, k, v, lengths, 0), kernels.linear_add(x, weight, bias, x[:, :20].contiguous())

    expected, rng = both(), random.Random(seed)
    _Order(monkeypatch, lambda n: rng.sample(range(n), n))
    assert all(torch.equal(a, b) for a, b in zip(both(), expected, strict=True))


@pytest.mark.parametrize("window", [0, 256])
@pytest.mark.parametrize("others", [1, 4])
def test_a_row_s_bits_do_not_depend_on_its_company(others, window):
    q, k, v = torch.randn(1 + others, 2, 1, 16), torch.randn(1 + others, 2, 384, 16), torch.randn(1 + others, 2, 384, 16)
    lengths = int32([300, *[(1000 if window else 70) * i for i in range(others)]])
    together = kernels.decode_attention(q, k, v, lengths, window)
    alone = kernels.decode_attention(q[:1], k[:1], v[:1], lengths[:1], window)
    assert torch.equal(together[:1], alone)


@pytest.mark.parametrize(("length", "window"), [(1000, 256), (300, 256), (100, 256), (700, 0), (63, 0)])
@pytest.mark.parametrize("T", [1, 5])
def test_attention_reads_each_visible_key_once_and_no_other(length, window, T):
    R = 384 if window else 1024
    q, k, v = torch.randn(1, 2, T, 16), torch.randn(1, 2, R, 16), torch.randn(1, 2, R, 16)
    with Traffic(keys=[k], values=[v]) as traffic:
        kernels.decode_attention(q, k, v, int32([length]), window)
    keys = min(length + T, window + T - 1) if window else length + T
    expected = keys * 2 * 16 * 4  # heads, D, bytes
    for name in ("keys", "values"):
        assert traffic.read[name].total == traffic.read[name].distinct == expected, name
    assert traffic.launches == ["attend"]


@pytest.mark.parametrize("rows", [1, 5, 16, 40])
def test_products_of_few_rows_read_each_weight_once(rows):
    C, F, V = 64, 256, 97
    x, gamma, beta = torch.randn(rows, 1, C), torch.randn(C), torch.randn(C)
    wq, wk, wv, up, down, head = (torch.randn(n, k) for n, k in ((C, C), (C, C), (C, C), (F, C), (C, F), (V, C)))
    cache = torch.zeros(rows, 4, 8, 16), torch.zeros(rows, 4, 8, 16)
    lengths, bias_up, bias_down = int32([0] * rows), torch.randn(F), torch.randn(C)
    with Traffic(weights=[wq, wk, wv, up, down, head], cache=list(cache)) as traffic:
        kernels.norm_qkv_append(x, gamma, beta, wq, wk, wv, EPS, *cache, lengths)
        y = kernels.norm_linear(x, gamma, beta, up, bias_up, EPS, True)
        kernels.linear_add(y, down, bias_down, x)
        kernels.lm_head(x, gamma, beta, head, EPS)
    needed = sum(w.numel() for w in (wq, wk, wv, up, down, head)) * 4
    read = traffic.read["weights"]
    assert read.distinct == needed and read.total <= needed + 64 * C * 4  # V is odd: its last tile repeats a row
    assert traffic.written["cache"].total == traffic.written["cache"].distinct == 2 * rows * C * 4
    per_op = 1 if rows <= skinny.NORM_ROWS else 2
    assert len(traffic.launches) == 3 * per_op + 1


def test_more_rows_than_few_go_to_the_kernels_of_prefill():
    x, weight, bias = torch.randn(skinny.MOST_ROWS + 1, 16), torch.randn(16, 16), torch.randn(16)
    with Traffic() as traffic:
        kernels.linear_add(x, weight, bias, x)
        kernels.linear_add(x[:-1], weight, bias, x[:-1])
    assert traffic.launches == ["gemm", "skinny"]
    cache, lengths = (torch.zeros(13, 2, 10, 8), torch.zeros(13, 2, 10, 8)), int32([0] * 13)
    with Traffic() as traffic:
        kernels.norm_qkv_append(x.view(13, 5, 16), bias, bias, weight, weight, weight, EPS, *cache, lengths)
    assert traffic.launches == ["_layer_norm_kernel", "gemm", "_kv_append_kernel"]
