"""Linear layers of a few rows in C++ compute what the reference does, at every odd shape, with every instruction set."""

import pytest
import torch

from gptneo_fast.ops import backends, cpu, extension, ops, reference, widened
from gptneo_fast.ops.testing import EPS, SAMPLES, Sample, over_budget

pytestmark = pytest.mark.skipif(extension.why_not() is not None, reason=f"no extension: {extension.why_not()}")
DTYPES = cpu.DTYPES
WIDEST = torch.ops.gptneo_fast_csrc.lanes() if extension.why_not() is None else 0
LANES = [n for n in (4, 8, 16) if n <= WIDEST] + [0] * (WIDEST == 16)  # with VNNI where there is no limit


@pytest.fixture(params=LANES, ids=lambda n: f"{n} lanes" if n else "all lanes")
def lanes(request, monkeypatch):
    """The instruction set that computes, of those that this CPU has, by the floats of its vectors."""
    monkeypatch.setattr(cpu.Plan, "max_lanes", request.param)
    return request.param or WIDEST


def test_it_has_every_op():
    assert set(ops.NAMES) == set(cpu.__all__)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", cpu.__all__)
def test_it_stays_within_the_error_budget(name, dtype, lanes):
    for sample in SAMPLES[name]():
        assert not over_budget(name, getattr(cpu, name), sample.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_of_scores_exist_in_chunks_of_rows_and_pieces_of_columns(dtype, lanes, monkeypatch):
    """A token stands in any piece; the last chunk is of a few rows, the last piece of a few columns."""
    N, C, V, rows = 100, 48, 97, 40
    found, statistics = [], cpu.statistics
    monkeypatch.setattr(cpu, "_CHUNK", 4 * V * rows)
    monkeypatch.setattr(cpu, "_COLUMNS", 10)
    monkeypatch.setattr(cpu, "statistics", lambda logits, targets: found.append(logits) or statistics(logits, targets))
    targets = torch.arange(N) % V
    sample = Sample("pieces", (random(N, C), random(V, C, seed=1) * 2 * C**-0.5, targets)).to(dtype)
    assert not over_budget("logprob", cpu.logprob, sample)
    assert [sum(piece.shape[1] for piece in logits) for logits in found] == [V] * 3
    assert [len(logits[0]) for logits in found] == [rows, rows, N - 2 * rows]
    assert [len(logits) for logits in found[:2]] == [10, 10] and found[0][-1].shape[1] == 7


@pytest.mark.parametrize("V", [1, 5, 8, 1023, 1025])
def test_statistics_do_not_depend_on_where_logits_are_cut(V, lanes):
    """Tokens alike, likeliest or without any chance; pieces of one logit. Errors beside torch's, in the mean over rows."""
    rows = 96
    logits = random(rows, V, seed=V).float()
    logits[0], logits[1, V // 2] = 1.5, -1e4
    targets = torch.tensor([0, V // 2, V // 3, V - 1]).repeat(rows // 4)
    exact, usual = reference.statistics(logits.double(), targets), reference.statistics(logits, targets)
    for cuts in ([V], [1] * min(V, 3) + [V - 3] * (V > 3), [V // 2, V - V // 2] if V > 1 else [1]):
        found = cpu.statistics(logits.split([n for n in cuts if n], 1), targets)
        assert torch.equal(found[1], exact[1])
        for got, plain, want in zip(found[::2] + found[3:], usual[::2] + usual[3:], exact[::2] + exact[3:], strict=True):
            may = 2 * (plain - want).norm() + torch.finfo(torch.float32).eps * want.norm()
            assert (got - want).norm() <= may


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 16, 32])
@pytest.mark.parametrize(("K", "N"), [(1, 301), (15, 317), (16, 320), (65, 303), (100, 129), (1100, 40)])
def test_lanes_and_pieces_may_be_cut_anywhere(rows, K, N, dtype, lanes):
    w, b = random(N, K, seed=1) * K**-0.5, random(N, seed=2)
    x, residual = random(1, rows, K, seed=3), random(1, rows, N, seed=4)
    norm = (1 + 0.1 * random(K, seed=5), 0.1 * random(K, seed=6))
    fused = Sample("norm, gelu", (x, *norm, w, b, EPS, True)).to(dtype)
    assert cpu._takes(fused.args[0], fused.args[3]) == (rows <= cpu.ROWS[dtype])
    assert not over_budget("norm_linear", cpu.norm_linear, fused)
    assert not over_budget("linear_add", cpu.linear_add, Sample("residual", (x, w, b, residual)).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("K", [2800, 4500])  # of which two rows of weights are read at a time, and eight
def test_how_many_rows_of_weights_are_read_at_a_time_changes_no_bit(K, dtype, lanes):
    w, x, zero = random(37, K, seed=1) * K**-0.5, random(1, 2, K, seed=3), random(37, seed=2) * 0
    alone = Sample("a row", (x[:, :1], w, zero, torch.zeros(1, 1, 37, dtype=x.dtype))).to(dtype)
    assert not over_budget("linear_add", cpu.linear_add, alone)
    both = cpu.linear_add(x.to(dtype), w.to(dtype), zero.to(dtype), torch.zeros(1, 2, 37, dtype=dtype))
    assert torch.equal(cpu.linear_add(*alone.args), both[:, :1])


def one_large(*shape, lanes):
    """Ones after a 2^24 beside which float32 loses every 1 that is added: in a lane alone those that are of that lane."""
    x = torch.ones(*shape)
    x[..., 0] = 2**24
    return x, (shape[-1] - 1) // lanes + 2  # the 1s that may be lost: the lane's, and two in adding up the lanes


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
@pytest.mark.parametrize("K", [15, 31, 63, 100, 127])
def test_the_end_of_a_row_is_multiplied_in_the_lanes(rows, K, lanes):
    x, lost = one_large(1, rows, K, lanes=lanes)
    out = cpu.linear_add(x, torch.ones(5, K), torch.zeros(5), torch.zeros(1, rows, 5)).double()
    assert (out - (2**24 + K - 1)).abs().max() <= lost


@pytest.mark.parametrize("K", [15, 31, 47])
def test_the_end_of_a_row_is_normalised_in_the_lanes(K, lanes):
    x, lost = one_large(1, 1, K, lanes=lanes)
    one, zero = torch.ones(K), torch.zeros(K)
    exact = reference.layer_norm(x.double(), one.double(), zero.double(), EPS)
    out = cpu.norm_linear(x, one, zero, torch.eye(K), zero, EPS, False)
    error = (out - exact)[..., 1:].abs().max()
    rounding = 4 * torch.finfo(torch.float32).eps * exact[..., 1:].abs().max()  # of the difference, the scale, the product
    assert error <= lost / K / x.double().std(correction=0) + rounding


def test_more_rows_and_other_dtypes_take_the_reference(monkeypatch):
    monkeypatch.setattr(cpu, "_linear", None)
    monkeypatch.setattr(widened, "DTYPES", frozenset())
    for rows, dtype in ((33, torch.float32), (33, torch.bfloat16), (1, torch.float64)):
        x, w = torch.ones(1, rows, 8, dtype=dtype), torch.ones(8, 8, dtype=dtype)
        assert torch.equal(cpu.linear_add(x, w, w[0], x), reference.linear_add(x, w, w[0], x))


@pytest.mark.parametrize("piece", [1, 100, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_what_a_cpu_cannot_multiply_is_widened(monkeypatch, dtype, piece):
    monkeypatch.setattr(cpu, "_linear", None)
    monkeypatch.setattr(widened, "DTYPES", frozenset([dtype]))
    monkeypatch.setattr(widened, "_PIECE", piece)
    w, b, x, residual = random(57, 40, seed=1), random(57, seed=2), random(1, 33, 40, seed=3), random(1, 33, 57, seed=4)
    norm, square = (1 + 0.1 * random(40, seed=5), 0.1 * random(40, seed=6)), [random(40, 40, seed=n) for n in (7, 8, 9)]
    for gelu in (False, True):
        assert not over_budget("norm_linear", cpu.norm_linear, Sample("gelu", (x, *norm, w, b, EPS, gelu)).to(dtype))
    assert not over_budget("linear_add", cpu.linear_add, Sample("residual", (x, w, b, residual)).to(dtype))
    assert not over_budget("norm_qkv", cpu.norm_qkv, Sample("qkv", (x, *norm, *square, EPS)).to(dtype))
    assert not over_budget("lm_head", cpu.lm_head, Sample("head", (x, *norm, w, EPS)).to(dtype))
    exact = x.to(dtype).double() @ w.to(dtype).double().T
    assert (cpu.linear(x.to(dtype), w.to(dtype)) - exact).abs().max() <= 2 * torch.finfo(dtype).eps * exact.abs().max()


def test_what_torch_multiplies_fast_is_not_widened():
    assert torch.float32 not in widened.DTYPES
    for dtype, fast in ((torch.bfloat16, "_is_mkldnn_bf16_supported"), (torch.float16, "_is_mkldnn_fp16_supported")):
        assert (dtype in widened.DTYPES) != getattr(torch.ops.mkldnn, fast)()


def test_bfloat16_results_round_to_the_nearest_even_and_nan_stays():
    x = torch.ones(1, 1, dtype=torch.bfloat16)
    residual = torch.tensor([[1.0, 1.0, float("nan"), -3.0]], dtype=torch.bfloat16)
    w = torch.tensor([[0.00390625], [0.01171875], [0.0], [1e-30]], dtype=torch.bfloat16)  # 1 + half an ulp, 1 + 3/2 ulp
    out = cpu.linear_add(x, w, torch.zeros(4, dtype=torch.bfloat16), residual)[0]
    assert out[:2].tolist() == [1.0, 1.015625]
    assert out[2].isnan()
    assert out[3] == -3.0


def test_a_tensor_that_does_not_fit_is_refused():
    linear = torch.ops.gptneo_fast_csrc.linear.default
    x, w = torch.ones(1, 8), torch.ones(4, 8)
    for args, message in (
        ((torch.ones(1, 7), w), "x is Float .1, 7., but must be"),
        ((torch.ones(33, 8), w), "1 to 32 rows of 8 numbers"),
        ((x.double(), w.double()), "weights are Double"),
        ((x, w.bfloat16()), "weight is BFloat16 .4, 8., but must be contiguous Float .4, 8."),
        ((x, torch.ones(8, 4).T), "weight is Float .4, 8., but must be contiguous"),
    ):
        with pytest.raises(RuntimeError, match=f"gptneo_fast_csrc: .*{message}"):
            linear(*args, None, None, None, None, EPS, False)
    with pytest.raises(RuntimeError, match=r"bias is Float .3., but must be contiguous Float .4."):
        linear(x, w, torch.ones(3), None, None, None, EPS, False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_number_of_two_bytes_is_read_and_written_as_it_is(dtype, lanes):
    every = torch.arange(2**16).to(torch.uint16).view(dtype)[:, None]
    for rows in (1, 3):
        got = cpu.linear(torch.ones(rows, 1, dtype=dtype), every)
        assert torch.equal(got.isnan(), every.T.expand(rows, -1).isnan())
        assert torch.equal(got.nan_to_num(7.0), every.T.expand(rows, -1).nan_to_num(7.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_results_round_as_in_torch(dtype, lanes):
    a = torch.randn(4096, 1, generator=torch.Generator().manual_seed(0)) * torch.logspace(-9, 6, 4096)[:, None]
    a, b = a.to(dtype), torch.tensor([[1.0 + 3 / 128]]).to(dtype)  # products of more digits than fit; subnormals, infinities
    assert torch.equal(cpu.linear(b, a), (a.float() * b.float()).to(dtype).T)


@pytest.mark.parametrize("V", [1, 3, 8, 31, 50257])
def test_the_likeliest_is_the_first_of_the_largest(V, lanes):
    rows = torch.randint(-3, 4, (6, V), generator=torch.Generator().manual_seed(V)).float()
    rows[0] = float("-inf")
    rows[1, V // 2] = float("nan")
    rows[2, V - 1] = float("inf")
    rows[3] = torch.finfo(torch.float32).min
    want = torch.where(rows.isfinite().all(-1), rows.argmax(-1), -1)
    assert want[:3].tolist() == [-1, -1, -1]
    assert torch.equal(torch.ops.gptneo_fast_csrc.likeliest(rows, lanes), want)
    assert torch.equal(extension.likeliest(rows), want)
    assert torch.equal(extension.likeliest(rows.double()), want)


def test_threads_change_nothing():
    x, w = random(1, 300).float(), random(5000, 300, seed=1).float()
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(cpu.lm_head(x, w[0], w[1], w, EPS))
    torch.set_num_threads(before)
    assert torch.equal(*results)


def test_auto_takes_it_on_the_cpu_and_the_reference_for_gradients():
    here = torch.device("cpu")
    assert backends.choose("auto", here, torch.float32).functions is cpu
    assert backends.choose("auto", here, torch.float32, grad=True).functions is reference
