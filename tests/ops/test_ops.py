"""Every op: declared once, equal to its reference, right for tracers; the reference against formulas written another way."""

import math

import pytest
import torch

from gptneo_fast.ops import ops, reference, vocabulary
from gptneo_fast.ops.testing import SAMPLES, over_budget

CASES = [(name, sample) for name in ops.NAMES for sample in SAMPLES[name]()]
IDS = [f"{name}: {sample.name}" for name, sample in CASES]


def test_every_op_has_a_reference_and_samples():
    assert set(SAMPLES) == set(ops.NAMES)
    assert all(callable(getattr(reference, name)) for name in ops.NAMES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("name", "sample"), CASES, ids=IDS)
def test_an_op_stays_within_its_error_budget(name, sample, dtype):
    assert over_budget(name, getattr(ops, name), sample.to(dtype)) is None


@pytest.mark.parametrize(
    "utility", ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
)
@pytest.mark.parametrize(("name", "sample"), CASES, ids=IDS)
def test_opcheck(name, sample, utility):
    args = sample.to(torch.float32).args
    torch.library.opcheck(getattr(torch.ops.gptneo_fast, name).default, args, test_utils=(utility,))


def loops(q, k, v, window, starts, ends, past_k, past_v, lengths):
    """Attention by the definition in spec.md, a key at a time. Past keys are given in order, not as slots."""
    B, H, T, D = q.shape
    out = torch.zeros(B, T, H, D, dtype=q.dtype)
    for b in range(B):
        keys = torch.cat([past_k[b][:, : lengths[b]], k[b][:, starts[b] : ends[b]]], 1)
        values = torch.cat([past_v[b][:, : lengths[b]], v[b][:, starts[b] : ends[b]]], 1)
        for i in range(int(starts[b]), T):
            token = int(lengths[b]) + i - int(starts[b])
            seen = range(max(0, token - window + 1) if window else 0, min(token + 1, keys.shape[1]))
            for h in range(H):
                if len(seen):
                    scores = [float(q[b, h, i] @ keys[h, j]) for j in seen]
                    top = max(scores)
                    weights = [math.exp(s - top) for s in scores]
                    total = math.fsum(weights)
                    out[b, i, h] = sum(w / total * values[h, j] for w, j in zip(weights, seen, strict=True))
    return out.flatten(2)


@pytest.mark.parametrize("window", [0, 1, 3, 8])
@pytest.mark.parametrize("lengths", [(0, 0), (5, 2), (11, 30)])
def test_attention_is_the_sum_that_the_specification_writes(window, lengths):
    B, H, T, D, R = 2, 2, 6, 4, 24
    R = R if window else 40
    rng = torch.Generator().manual_seed(sum(lengths))
    q, k, v = (torch.randn(B, H, T, D, generator=rng, dtype=torch.float64) for _ in range(3))
    past_k, past_v = (torch.randn(B, H, max(lengths), D, generator=rng, dtype=torch.float64) for _ in range(2))
    cache = [torch.full((B, H, R, D), math.nan, dtype=torch.float64) for _ in range(2)]
    for b in range(B):
        for t in range(max(0, lengths[b] - R), lengths[b]):
            cache[0][b, :, t % R], cache[1][b, :, t % R] = past_k[b, :, t], past_v[b, :, t]
    cache = [c.nan_to_num(7.0) for c in cache]  # what stands in unused slots must not matter
    starts, ends, held = (torch.tensor(x, dtype=torch.int32) for x in ((0, 2), (6, 5), lengths))
    expected = loops(q, k, v, window, starts, ends, past_k, past_v, held)
    got = reference.attention(q, k, v, window, starts, ends, *cache, held)
    real = torch.arange(T) >= starts[:, None]
    torch.testing.assert_close(got[real], expected[real])

    ends = torch.tensor([T, T])  # the step that appends first has no padding on the right
    expected = loops(q, k, v, window, starts, ends, past_k, past_v, held)
    reference.kv_append(*cache, k, v, held, starts)
    got = reference.decode_attention(q, *cache, held, window, starts)
    torch.testing.assert_close(got[real], expected[real])


def test_gelu_is_the_tanh_form():
    x = torch.linspace(-6, 6, 101, dtype=torch.float64)[None]
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    eye, zero, one = (
        torch.eye(101, dtype=torch.float64),
        torch.zeros(101, dtype=torch.float64),
        torch.ones(101, dtype=torch.float64),
    )
    mean, std = x.mean(), x.std(correction=0)
    got = reference.norm_linear(x, one * std, mean * one, eye, zero, 0.0, True)
    torch.testing.assert_close(got, x / 2 * (1 + inner.tanh()))


def test_kv_append_writes_nothing_but_its_slots():
    for sample in SAMPLES["kv_append"]():
        k_cache, v_cache, k, v, lengths, starts = sample.args
        after = sample.run(ops.kv_append)
        R, T = k_cache.shape[2], k.shape[2]
        for new, cache, out in ((k, k_cache, after[0]), (v, v_cache, after[1])):
            expected = cache.clone()
            for b in range(len(lengths)):
                for i in range(0 if starts is None else int(starts[b]), T):
                    token = int(lengths[b]) + i - (0 if starts is None else int(starts[b]))
                    expected[b, :, token % R] = new[b, :, i]
            assert torch.equal(out, expected), sample.name


@pytest.mark.parametrize("window", [0, 256])
def test_attention_holds_no_tensor_of_all_scores(window):
    T, seen = 1024, []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            seen.extend(t.numel() for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, torch.Tensor))
            return out

    with Watch():
        reference.attention(*torch.randn(3, 1, 2, T, 4).unbind(0), window)
    assert 0 < max(seen) <= 2 * 256 * (T if window == 0 else 512)


@pytest.mark.parametrize("V", [5, 8, 127, 128, 129, 256, 301, 1240])
def test_logits_in_pieces_are_the_product_and_nothing_is_written_beside_them(V):
    x, weight, wide = torch.randn(3, 16), torch.randn(V, 16), torch.full((3, V + 7), 9.0)
    vocabulary.logits(x, weight, wide[:, :V])
    torch.testing.assert_close(wide[:, :V], x @ weight.t())
    assert (wide[:, V:] == 9).all()
