"""The error budget itself: what it lets pass on any CPU, and what it catches."""

import pytest
import torch
from torch.nn import functional as F
from torch.nn.functional import linear

from gptneo_fast.ops import ops, reference, testing
from gptneo_fast.ops.testing import SAMPLES, SUMMED, Sample, over_budget

LINEAR = ("norm_linear", "linear_add", "lm_head")  # one product of matrices, one result
CASES = [(name, sample) for name in LINEAR for sample in SAMPLES[name]()]


def test_the_budget_notices_a_wrong_op():
    sample = next(SAMPLES["layer_norm"]()).to(torch.float32)
    assert "exceeds" in over_budget("layer_norm", lambda x, w, b, eps: ops.layer_norm(x, w, b, eps) * 1.00001, sample)
    assert "finite" in over_budget("layer_norm", lambda *a: ops.layer_norm(*a) / 0, sample)
    assert "expected" in over_budget("layer_norm", lambda *a: ops.layer_norm(*a).double(), sample)


def test_an_op_with_a_sum_of_products_says_which_axis_that_is(monkeypatch):
    summed = set()
    for name in ops.NAMES:
        for place, part in ((F, "linear"), (reference, "_weights")):
            known = getattr(place, part)
            monkeypatch.setattr(place, part, lambda *a, name=name, known=known, **k: summed.add(name) or known(*a, **k))
        next(SAMPLES[name]()).run(getattr(reference, name))
        monkeypatch.undo()
    assert summed == set(SUMMED)


@pytest.mark.parametrize("name", SUMMED)
def test_another_order_is_the_same_sum(name):
    for sample in SAMPLES[name]():
        other = sample.reordered(SUMMED[name], 1)
        assert not torch.equal(other.args[0], sample.args[0])
        assert torch.equal(other.args[0].sort(-1).values, sample.args[0].sort(-1).values)
        for a, b in zip(*(s.run(getattr(reference, name)) for s in (sample, other)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def one_by_one(x, w, b=None):
    """linear in one chain of additions, in the dtype of x."""
    total = torch.zeros((), dtype=x.dtype)
    for k in range(x.shape[-1]):
        total = total + x[..., k, None] * w[:, k]
    return total if b is None else total + b


def test_the_luck_of_one_order_is_no_budget(monkeypatch):
    """Plain torch that errs by nothing in the given order and by what is usual in all others, on some CPU."""
    x, weight = torch.linspace(1, 2, 100).view(1, 100), torch.linspace(0.1, 1, 400).view(4, 100)
    sample = Sample("lucky", (x, weight, torch.zeros(4), torch.zeros(1, 4)))
    usual = reference.linear_add

    def lucky(x, *rest):
        if torch.equal(x.float(), sample.args[0]):
            return usual(x.double(), *(t.double() for t in rest)).to(x.dtype)
        return rest[2] + one_by_one(x, *rest[:2])

    def ours(x, w, b, residual):
        return residual + one_by_one(x, w, b)

    monkeypatch.setattr(reference, "linear_add", lucky)
    assert over_budget("linear_add", ours, sample) is None
    monkeypatch.setattr(testing, "ORDERS", 1)
    assert "exceeds" in over_budget("linear_add", ours, sample)


@pytest.mark.parametrize(("name", "sample"), CASES, ids=[f"{name}: {sample.name}" for name, sample in CASES])
def test_three_times_the_error_of_the_worst_order_is_caught(name, sample):
    plain, sample = getattr(reference, name), sample.to(torch.float32)
    exact = plain(*sample.to(torch.float64).args)
    orders = [sample, *(sample.reordered(SUMMED[name], seed) for seed in range(1, testing.ORDERS))]
    errors = [plain(*order.args).double() - exact for order in orders]
    wrong = exact + 3 * max(errors, key=lambda error: error.abs().mean())
    assert "exceeds" in over_budget(name, lambda *_: wrong.float(), sample)


def _weight_in(dtype):
    return lambda x, w, b=None: linear(x, w.to(dtype).to(w.dtype), b)


def _one_product_in_bfloat16(x, w, b=None):
    return linear(x, torch.cat([w[:, :1].bfloat16().to(w.dtype), w[:, 1:]], 1), b)


def _product_in_float16(x, w, b=None):
    y = linear(x, w).half().to(x.dtype)
    return y if b is None else y + b


@pytest.mark.parametrize(
    ("lossy", "dtype", "shortest"),
    [
        (_weight_in(torch.float16), torch.float32, 0),
        (_weight_in(torch.bfloat16), torch.float16, 0),
        (_one_product_in_bfloat16, torch.float32, 0),
        (_product_in_float16, torch.float32, 0),
        (one_by_one, torch.float16, 100),  # shorter ones may err as little as the rounding of the result
        (one_by_one, torch.bfloat16, 100),
    ],
    ids=["weight in float16", "weight in bfloat16", "one product", "intermediate", "float16 sums", "bfloat16 sums"],
)
def test_a_lost_digit_is_caught(lossy, dtype, shortest, monkeypatch):
    for name, sample in CASES:
        if sample.args[0].shape[-1] < shortest:
            continue

        def ours(*args, name=name):
            with monkeypatch.context() as patch:
                patch.setattr(F, "linear", lossy)
                return getattr(reference, name)(*args)

        assert "exceeds" in (over_budget(name, ours, sample.to(dtype)) or ""), f"{name}, {sample.name}"
