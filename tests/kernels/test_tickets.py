"""Counters of kernels that meet: nobody shares them who might run at the same time, and nobody finds them used."""

import threading
import types

import pytest
import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode

from gptneo_fast import kernels
from gptneo_fast.kernels import launch, tickets
from gptneo_fast.ops import reference

DEVICE = torch.device("cuda", 0)


@pytest.fixture
def card(monkeypatch):
    """Fake CUDA tensors; `stream` is the current one, `capturing` whether it captures."""
    card = types.SimpleNamespace(stream=1, capturing=False)
    driver = types.SimpleNamespace(active=types.SimpleNamespace(get_current_stream=lambda _: card.stream))
    monkeypatch.setattr(triton.runtime, "driver", driver)
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: card.capturing)
    monkeypatch.setattr(tickets, "of_stream", {})
    with FakeTensorMode():
        yield card


def test_each_stream_has_counters_of_its_own(card):
    first = tickets.tickets(3, DEVICE)
    assert tickets.tickets(900, DEVICE) is first and first.device == DEVICE
    card.stream = 2
    assert tickets.tickets(3, DEVICE) is not first
    card.stream = 1
    assert tickets.tickets(3, DEVICE) is first
    assert len(tickets.tickets(1 << 20, DEVICE)) == 1 << 20  # more groups than are kept counters for


def test_threads_that_come_at_one_time_share_a_streams_counters(card, monkeypatch):
    found, made, start = [], [], threading.Barrier(8)
    monkeypatch.setattr(tickets, "zeros", lambda n, _: made.append(1) or threading.Event().wait(0.01) or torch.Tensor())

    def ask():
        start.wait()
        found.append(tickets.tickets(3, DEVICE))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(made) == 1 and len({id(t) for t in found}) == 1


def test_a_capture_has_counters_of_its_own_made_before_it(card):
    launched = tickets.tickets(3, DEVICE)
    with tickets.of_capture(DEVICE) as first:
        card.capturing = True
        assert tickets.tickets(3, DEVICE) is first and tickets.tickets(5, DEVICE) is first
        assert tickets.tickets(3, torch.device("cuda", 1)) is not first
    with tickets.of_capture(DEVICE) as second:
        assert tickets.tickets(3, DEVICE) is second
    card.capturing = False
    assert tickets.tickets(3, DEVICE) is launched
    assert len({id(t) for t in (launched, first, second)}) == 3


def test_in_a_capture_of_somebody_elses_every_launch_records_zeros(card):
    launched = tickets.tickets(3, DEVICE)
    card.capturing = True
    found = [tickets.tickets(n, DEVICE) for n in (3, 3, 5)]
    assert [len(t) for t in found] == [3, 3, 5] and len({id(t) for t in (launched, *found)}) == 4
    assert list(tickets.of_stream.values()) == [launched]  # what a graph has made is nobody else's


def test_nothing_is_kept_of_a_capture_by_anyone_but_who_holds_it(card):
    before = dict(tickets.of_stream)
    for _ in range(3):
        with tickets.of_capture(DEVICE):
            tickets.tickets(3, DEVICE)
    assert tickets.of_stream == before and tickets.of_this_capture.get() is None


@pytest.mark.skipif(not launch.INTERPRETED, reason="kernels are compiled here")
def test_a_capture_that_broke_off_spoils_no_later_one():
    q, k, v = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 640, 8), torch.randn(1, 2, 640, 8)
    lengths = torch.tensor([600], dtype=torch.int32)
    cpu, expected = torch.device("cpu"), reference.decode_attention(q, k, v, lengths, 0)
    assert torch.allclose(kernels.decode_attention(q, k, v, lengths, 0), expected, atol=1e-5)
    with tickets.of_capture(cpu) as first:
        first.fill_(1)  # the programs of a launch that never ended
        assert not torch.allclose(kernels.decode_attention(q, k, v, lengths, 0), expected, atol=1e-5)  # it would be wrong
    with tickets.of_capture(cpu) as second:
        for _ in range(2):
            assert torch.allclose(kernels.decode_attention(q, k, v, lengths, 0), expected, atol=1e-5)
        assert not second.any()
    assert torch.allclose(kernels.decode_attention(q, k, v, lengths, 0), expected, atol=1e-5)


@pytest.mark.skipif(not launch.INTERPRETED, reason="kernels are compiled here")
def test_counters_made_in_inference_mode_serve_outside(monkeypatch):
    monkeypatch.setattr(tickets, "of_stream", {})
    with torch.inference_mode():
        counters = tickets.tickets(3, torch.device("cpu"))
    assert not counters.is_inference()
    counters.zero_()
