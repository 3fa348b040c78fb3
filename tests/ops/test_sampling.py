"""The sample op: exact distributions, the tokens that the options keep, independence of rows."""

import pytest
import torch

from gptneo_fast.generation.warpers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from gptneo_fast.ops import sampling
from gptneo_fast.ops.constants import ALL, COUNT, FEW, FINISHED, FREE, STATUS


def test_philox_gives_the_published_words():
    """Random123's known answers of philox4x32-10."""
    zero, ones = torch.zeros(1, 1, dtype=torch.int64), torch.full((1, 1), 0xFFFFFFFF)
    assert sampling._philox(zero, zero, zero).item() == 0x6627E8D5
    c2, c3 = 0x13198A2E, 0x03707344
    assert sampling._philox(zero + 0x243F6A88, zero + 0x85A308D3, zero + (0x299F31D0 << 32) + 0xA4093822, c2, c3) == 0xD16CFE09
    assert sampling._philox(ones, ones, zero - 1, 0xFFFFFFFF, 0xFFFFFFFF).item() == 0x408F276D


def test_the_noise_is_exponential():
    noise = sampling.exponential(torch.arange(40), torch.zeros(40, dtype=torch.int64), 5000).flatten().double()
    assert noise.min() > 0
    ordered = noise.sort().values
    exact = 1 - (-ordered).exp()
    empirical = (torch.arange(len(noise)) + 0.5) / len(noise)
    assert (exact - empirical).abs().max() < 1.95 / len(noise) ** 0.5  # Kolmogorov-Smirnov at 0.1 %; seeds are fixed


def draw(logits, method, rates=(1.0, 1.0, 0.0, 1.0), top_k=0, rows=20000, seed=0, function=sampling.sample):
    """First tokens [rows] for the same logits under as many seeds."""
    V = len(logits)
    state = torch.zeros(5, rows, dtype=torch.int64)
    out = torch.zeros(rows, 1, dtype=torch.int32)
    function(
        logits.expand(rows, V).contiguous(),
        torch.tensor(rates),
        torch.tensor([top_k, 0, 1], dtype=torch.int32),
        torch.zeros(V, dtype=torch.uint8),
        torch.arange(rows) * 0x9E3779B97F4A7C15 % 2**61 + seed,
        None,
        state,
        out,
        torch.zeros(rows, dtype=torch.int32),
        method,
    )
    assert (state[STATUS] == FINISHED).all() and (state[COUNT] == 1).all()
    return out[:, 0].long()


def chi_square(tokens, p):
    """Sum of (observed - expected)^2 / expected over the tokens that may occur."""
    may = p > 0
    assert (torch.bincount(tokens, minlength=len(p))[~may] == 0).all()
    expected = p[may] * len(tokens)
    return ((torch.bincount(tokens, minlength=len(p))[may] - expected) ** 2 / expected).sum().item(), int(may.sum()) - 1


CASES = {
    "temperature": (FREE, 0, (0.7, 1.0, 0.0, 1.0)),
    "top_k": (FEW, 5, (1.3, 1.0, 0.0, 1.0)),
    "top_k, top_p": (FEW, 8, (1.0, 0.7, 0.0, 1.0)),
    "top_p": (ALL, 0, (1.0, 0.8, 0.0, 1.0)),
    "min_p": (ALL, 0, (1.0, 1.0, 0.1, 1.0)),
    "all": (ALL, 9, (0.8, 0.9, 0.05, 1.0)),
}


def exact(logits, top_k, rates):
    """The distribution that the warpers of `generate` leave."""
    scores = TemperatureLogitsWarper(rates[0])(None, logits[None].float())
    scores = TopKLogitsWarper(top_k)(None, scores) if top_k else scores
    scores = TopPLogitsWarper(rates[1])(None, scores) if rates[1] < 1 else scores
    scores = MinPLogitsWarper(rates[2])(None, scores) if rates[2] > 0 else scores
    return scores.softmax(-1)[0].double()


@pytest.mark.parametrize("case", CASES)
def test_tokens_have_the_distribution_that_the_options_leave(case):
    method, top_k, rates = CASES[case]
    logits = torch.randn(16, generator=torch.Generator().manual_seed(3)) * 1.5
    statistic, freedom = chi_square(draw(logits, method, rates, top_k), exact(logits, top_k, rates))
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5  # four standard deviations; the seeds are fixed


@pytest.mark.parametrize("case", CASES)
def test_the_kernel_draws_the_same_tokens(case):
    kernels = pytest.importorskip("gptneo_fast.kernels")
    if not kernels.launch.INTERPRETED:
        pytest.skip("kernels are compiled here: benchmarks/gpu/run.py checks them")
    method, top_k, rates = CASES[case]
    logits = torch.randn(3000, generator=torch.Generator().manual_seed(4)) * 2
    both = [draw(logits, method, rates, top_k, rows=8, function=f) for f in (sampling.sample, kernels.sample)]
    assert torch.equal(*both)


@pytest.mark.parametrize("top_k", [0, 3, 50, 64])
@pytest.mark.parametrize("rates", [(1.0, 1.0, 0.0), (0.6, 0.9, 0.0), (1.4, 0.5, 0.02), (1.0, 1.0, 0.2)])
def test_the_tokens_kept_are_those_of_the_warpers(top_k, rates):
    logits = torch.randn(20, 500, generator=torch.Generator().manual_seed(top_k)) * 3
    warped = torch.stack([exact(row, top_k, rates) for row in logits]) > 0
    kept = sampling._kept(logits / rates[0], torch.tensor([*rates, 1.0]), torch.tensor([top_k, 0, 1]))
    assert torch.equal(kept, warped)


def test_what_a_row_draws_depends_neither_on_its_mates_nor_on_what_is_cut_away():
    logits = torch.randn(300, generator=torch.Generator().manual_seed(5))
    many, few = draw(logits, FREE, rows=64), draw(logits, FREE, rows=3)
    assert torch.equal(many[:3], few)
    kept = draw(logits, FEW, top_k=64, rows=64)
    inside = torch.isin(many, logits.topk(64).indices)
    assert inside.any() and torch.equal(many[inside], kept[inside])
