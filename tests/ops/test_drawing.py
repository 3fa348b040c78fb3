"""Draws by the extension: torch's tokens, the warpers' too, and torch's generator afterwards."""

import os
import threading

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.overrides import TorchFunctionMode

from gptneo_fast.generation.warpers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from gptneo_fast.ops import drawing, extension

pytestmark = pytest.mark.skipif(extension.why_not() is not None, reason=str(extension.why_not()))


def rows(B, V, kept, scale, seed):
    rng = torch.Generator().manual_seed(seed)
    scores = torch.randn(B, V, generator=rng) * scale
    if kept < V:
        scores = scores.masked_fill(scores < scores.topk(kept).values[:, -1:], float("-inf"))
    return scores.softmax(-1)


def test_this_torch_is_known():
    assert drawing.draws_alike()


@settings(deadline=None, max_examples=150)
@given(
    B=st.integers(1, 4),
    V=st.integers(1, 2000),
    kept=st.sampled_from([1, 2, 50, 10**6]),
    scale=st.sampled_from([0.0, 0.1, 4.0, 50.0]),
    seed=st.integers(0, 2**32),
    before=st.integers(0, 700),
)
def test_tokens_and_the_generator_are_those_of_torch(B, V, kept, scale, seed, before):
    p = rows(B, V, kept, scale, seed)
    theirs = torch.Generator().manual_seed(seed)
    torch.rand(before, generator=theirs)  # words are left at any place
    torch.randn(before % 3, generator=theirs)  # and a normal number may be kept
    ours = theirs.clone_state()
    for _ in range(3):
        assert torch.equal(drawing.multinomial(p, ours), torch.multinomial(p, 1, generator=theirs).squeeze(1))
    assert torch.equal(ours.get_state(), theirs.get_state())
    assert torch.equal(torch.randn(5, generator=ours), torch.randn(5, generator=theirs))


def test_a_vocabulary_of_full_size_and_the_generator_of_torch():
    p = rows(2, 50257, 10**6, 3.0, 1)
    torch.manual_seed(8)
    expected, then = torch.multinomial(p, 1).squeeze(1), torch.rand(1)
    torch.manual_seed(8)
    assert torch.equal(drawing.multinomial(p, None), expected) and torch.equal(torch.rand(1), then)


def test_equals_take_the_first_and_frequencies_are_the_probabilities():
    p = torch.tensor([[0.5, 0.25, 0.0, 0.25]]).expand(20000, 4).contiguous()
    drawn = drawing.multinomial(p, torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn.bincount(minlength=4) / len(p), p[0], rtol=0, atol=0.015)


@pytest.mark.parametrize("change", [torch.Tensor.double, torch.Tensor.t, lambda p: p.requires_grad_()])
def test_other_rows_are_drawn_by_torch_or_the_same(change):
    p = change(rows(5, 5, 5, 1.0, 3).clone())
    expected = torch.multinomial(p.detach(), 1, generator=torch.Generator().manual_seed(4)).squeeze(1)
    assert torch.equal(drawing.multinomial(p, torch.Generator().manual_seed(4)), expected)


def test_threads_that_share_a_generator_draw_no_number_twice():
    rng, p, found = torch.Generator().manual_seed(0), torch.full((1, 50257), 1 / 50257), []

    def work():
        found.extend(int(drawing.multinomial(p, rng)) for _ in range(40))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = torch.Generator().manual_seed(0)
    assert sorted(found) == sorted(int(drawing.multinomial(p, alone)) for _ in range(160))


def warped(logits, how):
    """The probabilities that warpers and softmax give."""
    scores = logits
    for kind, value, off in ((TemperatureLogitsWarper, how.temperature, 1), (TopKLogitsWarper, how.top_k, 0)):
        scores = scores if value == off else kind(value)(None, scores)
    return (scores if how.top_p == 1 else TopPLogitsWarper(how.top_p)(None, scores)).softmax(-1)


@settings(deadline=None, max_examples=300)
@given(
    B=st.integers(1, 3),
    V=st.integers(1, 1500),
    scale=st.sampled_from([0.0, 0.1, 1.0, 4.0, 60.0, 1e5]),
    removed=st.sampled_from([0.0, 0.3, 0.99]),
    rounded=st.booleans(),
    temperature=st.sampled_from([1.0, 0.01, 0.7, 1.3, 1e6, 1e-38, 1e-60, 1e60]),
    top_k=st.sampled_from([0, 1, 2, 5, 50, 1000]),
    top_p=st.sampled_from([1.0, 0.0, 0.3, 0.95, 0.9999]),
    seed=st.integers(0, 2**32),
    lanes=st.sampled_from([4, 8, 16]),
)
def test_tokens_chosen_at_once_are_those_of_the_warpers(B, V, scale, removed, rounded, temperature, top_k, top_p, seed, lanes):
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(B, V, generator=rng) * scale
    logits = logits.round() if rounded else logits  # ties
    logits[:, 1:].masked_fill_(torch.rand(B, V - 1, generator=rng) < removed, float("-inf"))
    how = drawing.Draws(temperature, top_k, top_p)
    theirs, state = rng.clone_state(), rng.get_state()
    tokens = torch.ops.gptneo_fast_csrc.choose(logits, state, *how.settings, lanes)
    if not (logits / temperature).amax(-1).isfinite().all():
        assert not len(tokens)
    if len(tokens):
        assert torch.equal(tokens, torch.multinomial(warped(logits, how), 1, generator=theirs).squeeze(1))
    assert torch.equal(state, theirs.get_state())


@pytest.mark.parametrize(
    "how", [(1.0, 50, 1.0), (0.7, 50, 0.95), (1.0, 0, 1.0), (0.8, 0, 0.9), (0.9, 1000, 0.95)], ids=lambda how: str(how)
)
def test_few_tokens_of_a_full_vocabulary_are_left_to_torch(how):
    how = drawing.Draws(*how, generator=torch.Generator().manual_seed(1))
    chosen = 0
    for seed in range(40):
        logits = torch.randn(1, 50257, generator=torch.Generator().manual_seed(seed)) * 3
        theirs = how.generator.clone_state()
        if (found := drawing.choose(logits, how)) is not None:
            chosen += 1
            assert torch.equal(found, torch.multinomial(warped(logits, how), 1, generator=theirs).squeeze(1))
            assert torch.equal(how.generator.get_state(), theirs.get_state())
    assert chosen >= 36


def test_a_generator_that_somebody_else_draws_from_meanwhile_keeps_their_state():
    rng = torch.Generator().manual_seed(2)

    def draw(state):
        torch.rand(3, generator=rng)
        return state.zero_()

    after = rng.clone_state()
    torch.rand(3, generator=after)
    assert drawing.advanced(rng, draw) is None and torch.equal(rng.get_state(), after.get_state())


def test_somebody_s_own_multinomial_draws(monkeypatch):
    monkeypatch.setattr(torch, "multinomial", lambda p, n, generator=None: torch.full((len(p), n), 2))
    assert drawing.multinomial(torch.ones(2, 4), None).tolist() == [2, 2]
    assert drawing.choose(torch.ones(2, 4), drawing.Draws()) is None


def test_a_mode_that_has_a_say_in_torch_s_draws_has_it():
    class Second(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is torch.multinomial:
                return torch.full((len(args[0]), 1), 2)
            return func(*args, **(kwargs or {}))

    with Second():
        assert drawing.choose(torch.ones(2, 4), drawing.Draws()) is None
        assert drawing.multinomial(torch.ones(2, 4), None).tolist() == [2, 2]
    with torch.device("cpu"):
        assert drawing.choose(torch.ones(2, 4), drawing.Draws()) is not None


@pytest.mark.parametrize(
    ("logits", "settings", "words"),
    [
        (torch.ones(3), (1.0, 0, 1.0), "logits are"),
        (torch.ones(1, 3).half(), (1.0, 0, 1.0), "logits are"),
        (torch.ones(1, 3), (0.0, 0, 1.0), "temperature 0, top_k 0 and top_p 1 must be"),
        (torch.ones(1, 3), (1.0, -1, 1.0), "top_k -1"),
        (torch.ones(1, 3), (1.0, 0, float("nan")), "top_p nan"),
    ],
)
def test_what_nothing_can_be_drawn_from_is_refused(logits, settings, words):
    with pytest.raises(RuntimeError, match=words):
        torch.ops.gptneo_fast_csrc.choose(logits, torch.Generator().get_state(), *settings)


@pytest.mark.parametrize(
    ("p", "state", "words"),
    [
        (torch.ones(3), torch.Generator().get_state(), "probabilities are"),
        (torch.ones(1, 3).half(), torch.Generator().get_state(), "probabilities are"),
        (torch.ones(1, 3), torch.zeros(100, dtype=torch.uint8), "state is"),
        (torch.ones(1, 3), torch.zeros(5056, dtype=torch.uint8), "state has 0 words left"),
    ],
)
def test_what_is_no_state_is_refused(p, state, words):
    with pytest.raises(RuntimeError, match=words):
        torch.ops.gptneo_fast_csrc.multinomial(p, state)


def test_a_child_that_is_forked_while_another_thread_draws_can_draw():
    p, end = torch.full((1, 50257), 1 / 50257), threading.Event()

    def work():
        while not end.is_set():
            drawing.multinomial(p, torch.Generator().manual_seed(1))

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(10):
            if (child := os.fork()) == 0:
                drawing.multinomial(p, torch.Generator().manual_seed(1))
                os._exit(7)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    finally:
        end.set()
        thread.join()
