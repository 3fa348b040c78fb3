"""Methods FEW and ALL of the kernel: what slices hand on, and the walk where that is not enough, against the specification."""

import importlib

import pytest
import torch

from gptneo_fast.ops import sampling
from gptneo_fast.ops.constants import ALL, BROKEN, COUNT, FEW, FINISHED, STATUS, SUPPRESSED

kernels = pytest.importorskip("gptneo_fast.kernels")
kernel = importlib.import_module("gptneo_fast.kernels.sampling")
pytestmark = pytest.mark.skipif(
    not kernels.launch.INTERPRETED, reason="kernels are compiled here: benchmarks/gpu/run.py checks them"
)
ROWS, SLICE = 3, 128


@pytest.fixture(autouse=True)
def short_slices(monkeypatch):
    """Slices of 128 tokens, that a few hundred make several."""
    monkeypatch.setattr(kernel, "SLICE", SLICE)


@pytest.fixture
def walks(monkeypatch):
    """One entry for each row that was walked."""
    walk, seen = kernel.walk, []

    def counted(*args, **kwargs):
        seen.append(1)
        return walk(*args, **kwargs)

    monkeypatch.setattr(kernel, "walk", counted)
    return seen


def both(logits, method, top_k=0, top_p=1.0, min_p=0.0, penalty=1.0, temperature=1.0):
    """Everything that the specification and the kernel change, for ROWS rows of logits, one of them finished."""
    results = []
    for function in (sampling.sample, kernels.sample):
        V = logits.shape[1]
        generator = torch.Generator().manual_seed(V)
        state = torch.zeros(5, ROWS, dtype=torch.int64)
        state[COUNT], state[STATUS, ROWS - 1] = torch.arange(ROWS), FINISHED
        seen = None if penalty == 1 else (torch.rand(ROWS, V, generator=generator) > 0.9).to(torch.uint8)
        flags = (torch.rand(V, generator=generator) > 0.95).to(torch.uint8) * torch.randint(1, 7, (V,), generator=generator)
        out, lengths = torch.zeros(ROWS, 8, dtype=torch.int32), torch.arange(ROWS).int()
        rates = torch.tensor([temperature, top_p, min_p, penalty])
        counts = torch.tensor([top_k, 2, 7], dtype=torch.int32)
        seeds = torch.arange(ROWS) * 987654321987 + V
        function(logits.clone(), rates, counts, flags.to(torch.uint8), seeds, seen, state, out, lengths, method)
        results.append([state, out, lengths, *([] if seen is None else [seen])])
    return results


def same(results):
    return all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def scores(V, kind):
    x = torch.randn(ROWS, V, generator=torch.Generator().manual_seed(V)) * 3
    if kind == "ties":  # whole numbers, -0 among them
        return x.round()
    if kind == "flat":
        return x * 0.01
    if kind == "in one stretch":  # likelier than all else, and many of them neighbours
        x[:, :100] += 12
    return x


OPTIONS = {
    "top_p": dict(top_p=0.9),
    "top_p, penalty": dict(top_p=0.6, penalty=1.3, temperature=0.8),
    "min_p": dict(min_p=0.05),
    "top_k": dict(top_k=100),
    "every token": dict(top_k=10**6),
    "all": dict(top_k=70, top_p=0.9, min_p=0.01, temperature=1.5),
    "few": dict(top_k=7, top_p=0.75, min_p=0.02),
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", ["spread", "ties", "flat", "in one stretch"])
@pytest.mark.parametrize("V", [50, 128, 400])
def test_all_draws_what_the_specification_draws(V, kind, options):
    assert same(both(scores(V, kind), ALL, **OPTIONS[options]))


@pytest.mark.parametrize("top_k", [1, 5, 64])
@pytest.mark.parametrize("kind", ["ties", "spread"])
def test_few_keeps_the_lowest_ids_of_equal_scores_wherever_they_lie(kind, top_k):
    assert same(both(scores(400, kind), FEW, top_k=top_k, top_p=0.9))


@pytest.mark.parametrize(
    ("kind", "options", "walked"),
    [
        ("spread", dict(top_p=0.5), False),
        ("spread", dict(min_p=0.1), False),
        ("spread", dict(top_k=100), False),
        ("in one stretch", dict(top_p=0.5), False),  # of 100 neighbours each slice has its share
        ("flat", dict(top_p=0.9), True),
        ("flat", dict(min_p=0.1), True),
        ("spread", dict(top_k=350), True),
        ("ties", dict(top_k=200), True),
    ],
)
def test_a_row_is_walked_where_its_slices_do_not_suffice_and_only_there(walks, kind, options, walked):
    assert same(both(scores(400, kind), ALL, **options))
    assert bool(walks) == walked


def test_a_broken_row_ends_without_a_walk(walks):
    logits = scores(400, "flat")[:1].repeat(ROWS, 1)
    logits[:, 350] = float("inf")
    reference, kernel = both(logits, ALL, top_p=0.5)
    assert same((reference, kernel)) and not walks
    assert (kernel[0][STATUS, :-1] & BROKEN != 0).all()


def test_a_row_of_barred_tokens_alone_gives_one_of_the_vocabulary():
    for function in (sampling.sample, kernels.sample):
        state, out = torch.zeros(5, 1, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int32)
        flags = torch.full((300,), SUPPRESSED, dtype=torch.uint8)
        counts = torch.tensor([0, 0, 1], dtype=torch.int32)
        rates = torch.tensor([1.0, 0.9, 0.1, 1.0])
        logits, lengths = torch.randn(1, 300), torch.zeros(1, dtype=torch.int32)
        function(logits, rates, counts, flags, torch.zeros(1).long(), None, state, out, lengths, ALL)
        assert out.item() == 0
