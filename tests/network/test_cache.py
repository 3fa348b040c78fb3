"""KVCache: a ring gives what a full cache gives, whatever the pieces; crop, reorder, fork; its bytes."""

import functools

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from gptneo_fast import GPTNeoConfig, KVCache, cache_bytes
from gptneo_fast.errors import CacheError, InputError
from tests.support.peers import peers

WINDOWS = [1, 7, 256]
N = 600


@functools.cache
def case(window):
    """A float64 model, 600 ids of 2 rows, and the logits of one pass without a cache."""
    torch.manual_seed(window)
    _, model = peers(window_size=window, dtype=torch.float64)
    x = torch.randint(3, 97, (2, N))
    with torch.no_grad():
        return model, x, model(x, use_cache=False).logits


def fresh(model, rows=2, full=False):
    cache = KVCache(model.config, rows, dtype=model.dtype, device="cpu")
    if full:
        cache._slots = [model.config.max_position_embeddings] * model.config.num_layers
    return cache


@torch.no_grad()
def feed(model, x, cuts, cache, at=0, mask=None):
    pieces = []
    for n in cuts:
        seen = None if mask is None else mask[:, : at + n]
        pieces.append(model(x[:, at : at + n], past_key_values=cache, attention_mask=seen).logits)
        at += n
    return torch.cat(pieces, 1)


@pytest.mark.parametrize("window", WINDOWS)
def test_a_ring_equals_a_full_cache_at_every_length(window):
    model, x, whole = case(window)
    ring, full = fresh(model), fresh(model, full=True)
    for i in range(N):
        a, b = (feed(model, x, [1], cache, at=i) for cache in (ring, full))
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(a, whole[:, i : i + 1], rtol=1e-10, atol=1e-10)
    assert ring.keys[1].shape[2] == min(window + 128, 640) < full.keys[1].shape[2]


@st.composite
def cuts(draw):
    """Pieces that add up to at most 600 columns: single tokens, steps around 129, long chunks."""
    sizes = st.one_of(st.just(1), st.integers(1, 12), st.integers(120, 140), st.integers(1, 400))
    out, left = [], draw(st.integers(1, N))
    while left:
        out.append(min(left, draw(sizes)))
        left -= out[-1]
        if len(out) == 40:
            break
    return out


@pytest.mark.parametrize("window", WINDOWS)
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(cuts=cuts())
def test_every_way_of_cutting_gives_the_logits_of_one_pass(window, cuts):
    model, x, whole = case(window)
    got = feed(model, x, cuts, fresh(model))
    torch.testing.assert_close(got, whole[:, : sum(cuts)], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("window", WINDOWS)
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(cuts=cuts(), padding=st.integers(1, 450))
def test_every_way_of_cutting_a_left_padded_batch(window, cuts, padding):
    model, x, whole = case(window)
    mask = torch.ones_like(x)
    mask[1, :padding] = 0
    with torch.no_grad():
        n = sum(cuts)
        expected = model(x[:, :n], attention_mask=mask[:, :n], use_cache=False).logits
    cache = fresh(model)
    got = feed(model, x, cuts, cache, mask=mask)
    real = mask[:, :n].bool()
    torch.testing.assert_close(got[real], expected[real], rtol=1e-10, atol=1e-10)
    assert cache.lengths.tolist() == [n, max(0, n - padding)]
    assert torch.allclose(got[0], whole[0, :n], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("size", ["125m", "1.3B", "2.7B"])
def test_at_2048_tokens_it_holds_at_most_60_percent_of_a_full_cache(size):
    hidden, layers, heads = {"125m": (768, 12, 12), "1.3B": (2048, 24, 16), "2.7B": (2560, 32, 20)}[size]
    config = GPTNeoConfig(hidden_size=hidden, num_layers=layers, num_heads=heads)
    full = 2 * layers * 8 * 2048 * hidden * 2
    assert cache_bytes(config, 8, 2048, torch.bfloat16) <= 0.6 * full


@pytest.mark.parametrize("length", [1, 7, 135, 136, 600])
def test_cache_bytes_are_what_is_allocated(length):
    model, x, _ = case(7)
    cache = KVCache(model.config, 2, dtype=model.dtype, device="cpu", max_length=length)
    feed(model, x, [length], cache)
    assert cache.nbytes == model.cache_bytes(2, length) == cache_bytes(model.config, 2, length, torch.float64)


def test_a_cache_that_grows_holds_little_more_than_it_needs():
    model, x, _ = case(7)
    cache = fresh(model)
    feed(model, x, [1] * 300, cache)
    assert cache.nbytes <= 1.6 * model.cache_bytes(2, 300)


@pytest.mark.parametrize("window", [7, 256])
@pytest.mark.parametrize("keep", [560, 530, -1, -70, 600, 700])
def test_crop_goes_back_as_if_the_rest_had_never_been(window, keep):
    model, x, _ = case(window)
    cache = fresh(model)
    feed(model, x, [400, 129, 71], cache)
    cache.crop(keep)
    length = min(N, keep) if keep > 0 else N + keep
    assert cache.get_seq_length() == length
    other = torch.randint(3, 97, (2, 20))
    if length < N:
        got = feed(model, torch.cat([x[:, :length], other], 1), [1, 19], cache, at=length)
        with torch.no_grad():
            expected = model(torch.cat([x[:, :length], other], 1), use_cache=False).logits[:, length:]
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_crop_past_what_the_ring_has_evicted_raises_and_loses_nothing():
    model, x, whole = case(256)
    cache = fresh(model)
    feed(model, x, [550], cache)
    oldest = 550 - 384 + 255
    with pytest.raises(CacheError, match=f"{oldest} is the shortest"):
        cache.crop(oldest - 1)
    torch.testing.assert_close(feed(model, x, [50], cache, at=550), whole[:, 550:], rtol=1e-10, atol=1e-10)
    cache.crop(oldest + 50)
    with pytest.raises(CacheError, match="cannot crop"):
        cache.crop(oldest + 49)


def test_crop_after_crop_never_reads_slots_that_newer_tokens_took():
    model, x, _ = case(7)
    cache = fresh(model)
    feed(model, x, [200], cache)
    cache.crop(-60)
    other = torch.randint(3, 97, (2, 30))
    tokens = torch.cat([x[:, :140], other], 1)
    got = feed(model, tokens, [30], cache, at=140)
    with torch.no_grad():
        torch.testing.assert_close(got, model(tokens, use_cache=False).logits[:, 140:], rtol=1e-10, atol=1e-10)


def test_reorder_picks_rows_with_their_padding():
    model, x, _ = case(7)
    mask = torch.ones_like(x)
    mask[1, :90] = 0
    cache, rows = fresh(model), torch.tensor([1, 0, 1])
    feed(model, x, [150], cache, mask=mask)
    cache.reorder_cache(rows)
    x, mask = x[rows], mask[rows]
    got = feed(model, x, [10], cache, at=150, mask=mask)
    with torch.no_grad():
        expected = model(x[:, :160], attention_mask=mask[:, :160], use_cache=False).logits[:, 150:]
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_a_fork_goes_its_own_way():
    model, x, whole = case(7)
    cache = fresh(model)
    feed(model, x, [200], cache)
    other = cache.fork()
    feed(model, x.flip(1), [150], other, at=0)
    assert (cache.get_seq_length(), other.get_seq_length()) == (200, 350)
    torch.testing.assert_close(feed(model, x, [100], cache, at=200), whole[:, 200:300], rtol=1e-10, atol=1e-10)


def test_reset_starts_over_in_the_same_memory():
    model, x, whole = case(7)
    cache = fresh(model)
    feed(model, x, [300], cache)
    address = cache.keys[0].data_ptr()
    cache.reset()
    torch.testing.assert_close(feed(model, x, [250], cache), whole[:, :250], rtol=1e-10, atol=1e-10)
    assert cache.keys[0].data_ptr() == address


def test_a_call_that_fails_midway_leaves_the_cache_usable_or_says_so(monkeypatch):
    model, x, whole = case(7)
    cache = fresh(model)
    feed(model, x, [100], cache)
    forward = type(model.transformer.h[2]).forward

    def broken(self, *args, **keywords):
        if self is model.transformer.h[2]:
            raise KeyboardInterrupt
        return forward(self, *args, **keywords)

    monkeypatch.setattr(type(model.transformer.h[2]), "forward", broken)
    with pytest.raises(KeyboardInterrupt):
        feed(model, x, [20], cache, at=100)
    with pytest.raises(KeyboardInterrupt):
        feed(model, x, [145], cache, at=100)
    monkeypatch.undo()
    with pytest.raises(CacheError, match="failed midway"):
        feed(model, x, [1], cache, at=100)
    cache = fresh(model)
    feed(model, x, [100], cache)
    monkeypatch.setattr(type(model.transformer.h[2]), "forward", broken)
    with pytest.raises(KeyboardInterrupt):
        feed(model, x, [20], cache, at=100)
    monkeypatch.undo()
    torch.testing.assert_close(feed(model, x, [30], cache, at=100), whole[:, 100:130], rtol=1e-10, atol=1e-10)


def test_what_does_not_fit_is_refused_before_any_work():
    model, x, _ = case(7)
    cache = fresh(model)
    feed(model, x, [600], cache)
    with pytest.raises(InputError, match="600 cached \\+ 41 new tokens exceed the model's 640 positions"):
        model(x[:, :41], past_key_values=cache)
    with pytest.raises(CacheError, match="holds 2 rows, the input has 1"):
        model(x[:1, :4], past_key_values=cache)
    with pytest.raises(CacheError, match="tuple"):
        model(x[:, :4], past_key_values=((),))
    mask = torch.ones_like(x)
    mask[0, :5] = 0
    cache = fresh(model)
    feed(model, x, [20], cache, mask=mask)
    with pytest.raises(CacheError, match="never stored"):
        model(x[:, 20:21], past_key_values=cache, attention_mask=torch.ones(2, 21))
    assert cache.get_seq_length() == 20


@pytest.mark.parametrize("change", ["none", "fork", "reorder", "crop", "reset"])
def test_a_cache_made_in_inference_mode_goes_on_outside_of_it(change):
    """As transformers' DynamicCache does."""
    model, x, whole = case(7)
    at = {"crop": 5, "reset": 0}.get(change, 10)
    with torch.inference_mode():
        cache = model(x[:, :10], use_cache=True).past_key_values
        if change == "fork":
            cache = cache.fork()
        elif change == "reorder":
            cache.reorder_cache(torch.tensor([0, 1]))
        elif change == "crop":
            cache.crop(5)
        elif change == "reset":
            cache.reset()
    for mode in (torch.no_grad, torch.enable_grad, torch.inference_mode, torch.no_grad):
        with mode():
            got = model(x[:, at : at + 2], past_key_values=cache).logits
        torch.testing.assert_close(got, whole[:, at : at + 2], rtol=1e-10, atol=1e-10)
        at += 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.crop(1.5), "max_length 1.5 is no integer"),
        (lambda c: c.crop("3"), "max_length '3' is no integer"),
        (lambda c: c.reorder_cache([0, 1]), "rows is a list; give an integer tensor"),
        (lambda c: c.reorder_cache(torch.tensor([0.0])), "rows is torch.float32"),
        (lambda c: c.reorder_cache(torch.tensor([0, 2])), r"rows \[0, 2\] are not all from 0 to 1"),
        (lambda c: c.reorder_cache(torch.tensor([-1])), r"rows \[-1\] are not all from 0 to 1"),
        (lambda c: KVCache(c.config, 1.5, dtype=torch.float32, device="cpu"), "batch_size 1.5"),
        (lambda c: KVCache(c.config, 1, dtype=torch.int64, device="cpu"), "torch.int64 holds no keys"),
        (lambda c: KVCache(c.config, 1, dtype=torch.float32, device="cpu", max_length=641), "max_length 641 .* to 640"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_a_change_that_means_nothing_is_refused_and_changes_nothing(change, words):
    model, x, logits = case(7)
    cache = fresh(model)
    feed(model, x, [20], cache)
    with pytest.raises(InputError, match=words):
        change(cache)
    assert cache.get_seq_length() == 20
    torch.testing.assert_close(feed(model, x, [5], cache, at=20), logits[:, 20:25])


@pytest.mark.parametrize("length", [np.int64(8), torch.tensor(8)], ids=repr)
def test_a_length_may_be_of_numpy_or_torch(length):
    model, x, logits = case(7)
    cache = fresh(model)
    feed(model, x, [12], cache)
    cache.crop(length)
    assert cache.get_seq_length() == 8 and type(cache.get_seq_length()) is int
    torch.testing.assert_close(feed(model, x, [5], cache, at=8), logits[:, 8:13])


@pytest.mark.parametrize("backend", ["reference", "auto", "triton"])
@torch.no_grad()
def test_rows_of_different_age_are_replaced_and_moved_without_touching_the_others(backend):
    """Rings of 135 slots have wrapped in one row and not in the others."""
    _, model = peers(dtype=torch.float32)
    texts = [torch.randint(3, 97, (1, n), generator=torch.Generator().manual_seed(n)) for n in (150, 3, 40, 1)]
    singles = []
    for ids in texts:
        cache = fresh(model, 1)
        model(ids, past_key_values=cache)
        singles.append(cache)
    batch = fresh(model, 4)
    held = [150, 3, 40]
    for row, n in enumerate(held):
        batch.copy_row(row, singles[row])
        assert batch.lengths[row] == n

    def step(rows):
        view = batch.rows(len(rows), [texts[i].shape[1] for i in rows])
        assert view.get_seq_length() == max(texts[i].shape[1] for i in rows)
        ids = torch.tensor([[7 + i] for i in rows])
        places = torch.tensor([[texts[i].shape[1]] for i in rows])
        model.transformer.requested_backend = backend
        got = model.step(ids, places, None, view)[:, 0]
        model.transformer.requested_backend = "reference"
        for i, logits in zip(rows, got, strict=True):
            want = model(torch.cat([texts[i], torch.tensor([[7 + i]])], 1)).logits[0, -1]
            assert (logits - want).abs().max() < 1e-3, i

    step([0, 1, 2])
    before = [t[[0, 2]].clone() for t in (*batch.keys, *batch.values)]
    batch.copy_row(1, singles[3])
    assert all(torch.equal(t[[0, 2]], old) for t, old in zip((*batch.keys, *batch.values), before, strict=True))
    step([0, 3, 2])
    batch.copy_row(0, batch, 2, tokens=40)
    step([2, 3])
    assert {t.shape[2] for t in batch.keys[1:]} == {135}  # what local layers hold of the longest row
