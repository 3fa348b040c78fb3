"""Draws by the extension: torch's tokens, and torch's generator afterwards."""

import os
import threading

import pytest
import torch
from hypothesis import given, settings, strategies as st

from gptneo_fast.ops import extension

pytestmark = pytest.mark.skipif(extension.why_not() is not None, reason=str(extension.why_not()))


def rows(B, V, kept, scale, seed):
    rng = torch.Generator().manual_seed(seed)
    scores = torch.randn(B, V, generator=rng) * scale
    if kept < V:
        scores = scores.masked_fill(scores < scores.topk(kept).values[:, -1:], float("-inf"))
    return scores.softmax(-1)


def test_this_torch_is_known():
    assert extension._draws_alike()


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
        assert torch.equal(extension.draw(p, ours), torch.multinomial(p, 1, generator=theirs).squeeze(1))
    assert torch.equal(ours.get_state(), theirs.get_state())
    assert torch.equal(torch.randn(5, generator=ours), torch.randn(5, generator=theirs))


def test_a_vocabulary_of_full_size_and_the_generator_of_torch():
    p = rows(2, 50257, 10**6, 3.0, 1)
    torch.manual_seed(8)
    expected, then = torch.multinomial(p, 1).squeeze(1), torch.rand(1)
    torch.manual_seed(8)
    assert torch.equal(extension.draw(p, None), expected) and torch.equal(torch.rand(1), then)


def test_equals_take_the_first_and_frequencies_are_the_probabilities():
    p = torch.tensor([[0.5, 0.25, 0.0, 0.25]]).expand(20000, 4).contiguous()
    drawn = extension.draw(p, torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn.bincount(minlength=4) / len(p), p[0], rtol=0, atol=0.015)


@pytest.mark.parametrize("change", [torch.Tensor.double, torch.Tensor.t, lambda p: p.requires_grad_()])
def test_other_rows_are_drawn_by_torch_or_the_same(change):
    p = change(rows(5, 5, 5, 1.0, 3).clone())
    expected = torch.multinomial(p.detach(), 1, generator=torch.Generator().manual_seed(4)).squeeze(1)
    assert torch.equal(extension.draw(p, torch.Generator().manual_seed(4)), expected)


def test_threads_that_share_a_generator_draw_no_number_twice():
    rng, p, found = torch.Generator().manual_seed(0), torch.full((1, 50257), 1 / 50257), []

    def work():
        found.extend(int(extension.draw(p, rng)) for _ in range(40))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = torch.Generator().manual_seed(0)
    assert sorted(found) == sorted(int(extension.draw(p, alone)) for _ in range(160))


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
        torch.ops.gptneo_fast_csrc.draw(p, state)


def test_a_child_that_is_forked_while_another_thread_draws_can_draw():
    p, end = torch.full((1, 50257), 1 / 50257), threading.Event()

    def work():
        while not end.is_set():
            extension.draw(p, torch.Generator().manual_seed(1))

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(10):
            if (child := os.fork()) == 0:
                extension.draw(p, torch.Generator().manual_seed(1))
                os._exit(7)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    finally:
        end.set()
        thread.join()
