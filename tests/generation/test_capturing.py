"""Captures and streams with stand-ins for CUDA's: what is asked of them, in which order, and what a failure leaves behind."""

import gc
import types
from contextlib import contextmanager, nullcontext

import pytest
import torch

import gptneo_fast
from gptneo_fast.errors import OutOfMemoryError
from gptneo_fast.generation.captured import capturing, params, runner, speculation
from gptneo_fast.kernels import tickets
from gptneo_fast.ops.constants import GREEDY
from tests.support.engines import captured, model, ragged  # noqa: F401 (fixtures)

DEVICE = torch.device("cuda", 0)


class Stream:
    def __init__(self, card, name):
        self.card, self.name = card, name

    def wait_stream(self, other):
        assert not self.card.capturing
        self.card.log.append(("wait", self.name, other.name))

    def wait_event(self, event):
        self.card.log.append(("wait", self.name, event))


class Card:
    """A CUDA device that writes down what is asked of its streams, events and graphs; kernels run at once."""

    def __init__(self):
        self.log, self.capturing, self.underway = [], False, []  # pools that the allocator takes captures to be under way in
        self.breaks = False  # whether CUDA breaks captures off
        self.default = self.current = Stream(self, "default")

    @contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        """As torch 2.11's: what `capture_end` raises leaves the allocator and the current stream as they are."""
        assert stream is self.current and capture_error_mode == "thread_local"
        self.capturing, graph.replay = True, lambda: self.log.append(("replay", self.current.name))
        self.underway.append(pool)
        try:
            yield
        finally:
            self.capturing = False
            if self.breaks:
                raise RuntimeError("operation failed due to a previous error during capture")
            self.underway.remove(pool)

    def end(self, device, pool):
        if pool not in self.underway:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.underway.remove(pool)

    def event(self):
        event = types.SimpleNamespace(synchronize=lambda: None)
        event.record = lambda stream: self.log.append(("record", stream.name, event))
        return event


@pytest.fixture
def card(monkeypatch):
    card = Card()
    for name, what in {
        "current_stream": lambda _: card.current,
        "Stream": lambda _: Stream(card, "aside"),
        "stream": card.stream,
        "device": lambda _: nullcontext(),
        "Event": card.event,
        "CUDAGraph": types.SimpleNamespace,
        "graph_pool_handle": object,
        "graph": card.graph,
        "is_current_stream_capturing": lambda: card.capturing,
    }.items():
        monkeypatch.setattr(torch.cuda, name, what)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", card.end, raising=False)
    # what is recorded is not done: memory that a capture zeroes holds whatever it held
    monkeypatch.setattr(tickets, "zeros", lambda n, _: torch.full((n,), 7 * card.capturing, dtype=torch.int32))
    for module in (runner, speculation):
        monkeypatch.setattr(module, "current_stream", lambda _: card.current)
    capturing._aside.cache_clear()
    yield card
    capturing._aside.cache_clear()
    capturing._broken.clear()
    assert card.current is card.default and not card.underway and not card.capturing


@pytest.fixture
def new_warnings(monkeypatch):
    monkeypatch.setattr(gptneo_fast.errors, "_warned", set())


def test_a_step_runs_twice_before_it_is_captured_and_the_callers_stream_waits(card):
    calls = []
    step = capturing.capture(lambda: calls.append((card.current.name, card.capturing, gc.isenabled())), DEVICE)
    # a garbage collection in a capture might free another graph
    assert calls == [("aside", False, True), ("aside", False, True), ("aside", True, False)] and gc.isenabled()
    assert card.log == [("wait", "aside", "default"), ("wait", "default", "aside")]
    assert isinstance(step, capturing.CapturedStep) and step.why_launched is None
    step.replay()
    assert card.log[-1] == ("replay", "default") and len(calls) == 3


def test_counters_belong_to_a_capture_and_are_zero_before_it(card):
    cpu, taken = torch.device("cpu"), []

    def step():
        counters = tickets.tickets(3, cpu)
        assert not counters.any()
        taken.append(counters)

    card.breaks = True
    with pytest.warns(gptneo_fast.GPTNeoFastWarning):
        capturing.capture(step, DEVICE)
    taken[-1].fill_(1)  # it ended half way: some programs of every group have come
    card.breaks = False
    first, second = (capturing.capture(step, DEVICE) for _ in range(2))
    assert all(t is first.counters for t in taken[3:6]) and all(t is second.counters for t in taken[6:])
    step()
    assert len({id(t) for t in taken}) == 4  # and what is launched directly has its own


@pytest.mark.parametrize("what", ["the step", "CUDA", "both"])
def test_a_capture_that_fails_leaves_everything_usable_and_says_why(card, what, new_warnings):
    calls = []

    def step():
        calls.append(1)
        if card.capturing and what != "CUDA":
            raise ValueError("a look at a value")

    card.breaks = what != "the step"
    why = "RuntimeError: operation failed" if what == "CUDA" else "ValueError: a look at a value"
    with pytest.warns(gptneo_fast.GPTNeoFastWarning, match=f"launched kernel by kernel: {why}"):
        found = capturing.capture(step, DEVICE)
    assert isinstance(found, capturing.EagerStep) and found.why_launched.startswith(why)
    assert card.log[-1] == ("wait", "default", "aside") and gc.isenabled()
    assert len(capturing._broken) == card.breaks  # torch 2.11 goes on asking such a graph
    calls.clear()
    found.replay()
    assert calls == [1]


@pytest.mark.parametrize("breaks", [False, True])
@pytest.mark.parametrize("during", [False, True], ids=["launched", "captured"])
@pytest.mark.parametrize(
    ("error", "expected"),
    [(torch.OutOfMemoryError("no"), OutOfMemoryError), (KeyboardInterrupt(), KeyboardInterrupt)],
    ids=["memory", "interrupt"],
)
def test_neither_a_lack_of_memory_nor_an_interrupt_is_taken_for_a_step_without_a_graph(card, error, expected, during, breaks):
    card.breaks = breaks

    def step():
        if card.capturing == during:
            raise error

    with pytest.raises(expected):
        capturing.capture(step, DEVICE)
    assert card.log[-1] == ("wait", "default", "aside")


def test_a_step_that_cannot_even_be_launched_raises_its_own_error(card):
    with pytest.raises(ZeroDivisionError):
        capturing.capture(lambda: 1 / 0, DEVICE)


def generation(card, model, drafting):
    """(what generates on the stream that is current, the runners whose memory it uses)."""
    if drafting is None:
        one = runner.Runner(model, 1, 256)
        return one, [one]
    helper = runner.Runner(model, 1, 256) if drafting == "assistant" else None
    one = runner.Runner(model, 1, 256)
    return speculation.Speculation(one, 3, helper), [one] + [helper] * (helper is not None)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("drafting", [None, "lookup", "assistant"])
def test_whoever_uses_memory_waits_for_the_last_user_and_tells_the_next(card, model, captured, monkeypatch, drafting, whole):
    step = model.step
    monkeypatch.setattr(model, "step", lambda *a, **k: (card.log.append(("work", card.current.name)), step(*a, **k))[1])
    one, runners = generation(card, model, drafting)
    drawing = params.SamplingParams(
        GREEDY, [1.0, 1.0, 0.0, 1.0], [0, 0, 20], torch.zeros(211, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64), False
    )
    last = []
    for name in ("A", "B"):
        card.log.clear()
        with card.stream(Stream(card, name)):
            steps = one.run(ragged(1)["input_ids"], None, drawing, 4)
            next(steps)
        for _ in steps if whole else ():  # on the stream that it began on, whichever is current now
            pass
        steps.close()
        work = [i for i, entry in enumerate(card.log) if entry[0] == "work"]
        assert work and {card.log[i][1] for i in work} == {name}
        for event in last:
            assert ("wait", name, event) in card.log[: work[0]]
        last = [r.idle for r in runners]
        for event in last:
            assert ("record", name, event) in card.log[work[-1] :]
            assert ("wait", "default", event) in card.log[work[-1] :]  # where freed memory may be given to others


def test_memory_used_where_it_was_made_needs_no_wait(card, model, captured):
    one, _ = generation(card, model, None)
    with one.used_on(card.current):
        pass
    assert [entry[0] for entry in card.log] == ["record"]
