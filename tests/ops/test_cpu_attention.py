"""Attention and gelu_new of many rows in C++ compute what the reference does, whatever is padded, held or out of the window."""

import random

import pytest
import torch

from gptneo_fast.ops import cpu, reference

from .test_cpu import DTYPES, lanes, pytestmark  # noqa: F401 (a fixture)


@pytest.fixture(autouse=True)
def none_is_left_to_the_reference(monkeypatch):
    for name in ("attention", "decode_attention"):
        monkeypatch.setattr(reference, name, None)


def heads(B, H, T, D, seed):
    return torch.randn(B, T, H, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).transpose(1, 2)


def counts(rng, B, low, high):
    return torch.tensor([rng.randint(low, high) for _ in range(B)], dtype=torch.int32)


def attention_case(seed):
    """Arguments of `attention` at random; what no column may see is NaN."""
    rng = random.Random(seed)
    B, H, T, D = rng.randint(1, 3), rng.randint(1, 3), rng.choice([1, 2, 15, 16, 17, 40, 70]), rng.choice([1, 3, 8, 20, 64, 80])
    window = rng.choice([0, 0, 1, 4, 16, 33])
    q, k, v = (heads(B, H, T, D, seed + n) for n in range(3))
    starts = counts(rng, B, 0, T) if rng.random() < 0.5 else None
    ends = counts(rng, B, 0, T) if rng.random() < 0.4 else None
    columns = torch.arange(T)
    if starts is not None:
        k, v = (t.masked_fill((columns < starts[:, None])[:, None, :, None], torch.nan) for t in (k, v))
    if ends is not None:
        k, v = (t.masked_fill((columns >= ends[:, None])[:, None, :, None], torch.nan) for t in (k, v))
    past = ()
    if rng.random() < 0.5:
        R = rng.choice([1, 7, 32, 49])
        lengths = counts(rng, B, 0, 2 * R if window and window <= R else R)
        free = (torch.arange(R) >= lengths[:, None])[:, None, :, None]
        past = (*(heads(B, H, R, D, seed + n).masked_fill(free, torch.nan) for n in (3, 4)), lengths)
    return q, k, v, window, starts, ends, *past


def decode_case(seed):
    """Arguments of `decode_attention` at random; slots that hold nothing are NaN."""
    rng = random.Random(seed)
    B, H, T = rng.randint(1, 3), rng.randint(1, 3), rng.choice([1, 2, 7, 8, 9, 20])
    D = rng.choice([1, 3, 4, 8, 12, 16, 20, 24, 28, 32, 48, 64, 80, 96, 112, 128, 144])  # 1 to 8 vectors, and others
    window = rng.choice([0, 1, 4, 16])
    R = max(window, 1) - 1 + T + rng.choice([0, 5, 30])
    starts = counts(rng, B, 0, T) if rng.random() < 0.5 else None
    lengths = counts(rng, B, 0, 3 * R if window else R - T)
    held = lengths + T - (0 if starts is None else starts)
    free = (torch.arange(R) >= held[:, None])[:, None, :, None]
    cache = (heads(B, H, R, D, seed + n).masked_fill(free, torch.nan) for n in (3, 4))
    return heads(B, H, T, D, seed), *cache, lengths, window, starts


CASES = {"attention": attention_case, "decode_attention": decode_case}
PLAIN = {"attention": reference.attention, "decode_attention": reference.decode_attention}


def exact_of(name, args):
    """The reference on float64; what nobody may see is 0 there, for it multiplies even that."""
    return PLAIN[name](*(t.nan_to_num() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in args))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_it_is_the_references_and_sees_nothing_else(name, dtype, lanes):  # noqa: F811
    for seed in range(0, 900, 10):
        args = CASES[name](seed)
        rounded = [t.to(dtype) if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in args]
        got = getattr(cpu, name)(*rounded).double()
        exact = exact_of(name, [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in rounded])
        scores = exact.shape[-1] ** 0.5 * 8  # an unscaled score's size: its error goes into the exponent
        bound = (scores * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps) * exact.abs().amax().clamp(min=1) * 8
        assert got.isfinite().all(), seed
        assert (got - exact).abs().max() <= bound, (seed, (got - exact).abs().max(), bound)


def test_threads_and_company_change_nothing(lanes):  # noqa: F811
    q, k, v = (heads(3, 4, 90, 64, n).float() for n in range(3))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = torch.cat([cpu.attention(q[b : b + 1], k[b : b + 1], v[b : b + 1], 33) for b in range(3)])
        torch.set_num_threads(2)
        assert torch.equal(cpu.attention(q, k, v, 33), alone)
    finally:
        torch.set_num_threads(before)


def test_nothing_gives_nothing():
    for B, T in ((0, 3), (2, 0)):
        q, k, v = (torch.ones(B, 2, T, 8) for _ in range(3))
        assert cpu.attention(q, k, v, 0).shape == (B, T, 16)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((torch.ones(2, 3, 8), *[torch.ones(1, 2, 3, 8)] * 2, 0), "q is Float .2, 3, 8., but must have four axes"),
        ((torch.ones(1, 2, 3, 8), torch.ones(1, 2, 4, 8), torch.ones(1, 2, 3, 8), 0), "k is Float .1, 2, 4, 8., but must be"),
        ((*[torch.ones(1, 2, 3, 8)] * 2, torch.ones(1, 2, 3, 8).half(), 0), "v is Half"),
        ((*[torch.ones(1, 2, 3, 8)] * 3, -1), "window is -1"),
        ((*[torch.ones(1, 2, 3, 8)] * 3, 0, torch.tensor([4], dtype=torch.int32)), "row 0 begins at column 4"),
        ((*[torch.ones(1, 2, 3, 8)] * 3, 0, torch.tensor([0])), "starts is Long"),
    ],
)
def test_what_does_not_fit_is_refused(args, message):
    args = (*args, *[None] * (9 - len(args)))
    with pytest.raises(RuntimeError, match=f"gptneo_fast_csrc: {message}"):
        torch.ops.gptneo_fast_csrc.attention.default(*args)


def test_other_strides_take_the_reference(monkeypatch):
    monkeypatch.setattr(reference, "attention", PLAIN["attention"])
    q, k, v = (heads(1, 2, 20, 8, n).float() for n in range(3))
    strided = q.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(cpu.attention(strided, k, v, 0), reference.attention(strided, k, v, 0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 15, 16, 33, 100_001])
def test_gelu_in_place(count, dtype, lanes):  # noqa: F811
    x = (torch.randn(count, generator=torch.Generator().manual_seed(count)) * 4).to(dtype)
    x[0] = torch.tensor([-1e30, 0.0, 1e4, float("nan")])[count % 4].to(dtype)
    exact = torch.nn.functional.gelu(x.double(), approximate="tanh")
    torch.ops.gptneo_fast_csrc.gelu(x, lanes)
    error = (x.double() - exact).abs()
    assert torch.equal(x.isnan(), exact.isnan())
    assert error.nan_to_num().max() <= torch.finfo(dtype).eps * exact.nan_to_num().abs().max().clamp(min=4)
