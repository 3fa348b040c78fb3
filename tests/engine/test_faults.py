"""What fails, fails alone and says why; nobody waits for ever."""

import asyncio
import concurrent.futures
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from gptneo_fast import Engine
from gptneo_fast.engine import engine as engine_module
from gptneo_fast.errors import BusyError, InputError, NonFiniteLogitsError, OutOfMemoryError, SetupError, UnknownOptionError
from gptneo_fast.generation import captured
from gptneo_fast.generation.captured import memory
from tests.support.peers import SMALL
from tests.support.serial import Gate, lively, require_same, serial

V = SMALL["vocab_size"]


def nans(row_of):
    def processor(ids, scores):
        return torch.full_like(scores, float("nan")) if ids.shape[1] > row_of else scores

    return processor


def test_a_row_that_is_not_finite_fails_alone(model):
    broken = lively()
    with torch.no_grad():
        broken.transformer.wte.weight[50] = float("nan")
        broken.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
    with Engine(broken, 3) as engine:
        jobs = [engine.submit(p, max_new_tokens=4, eos_token_id=None) for p in ([5], [6, 50], [7])]
        with pytest.raises(NonFiniteLogitsError, match="row 0 were NaN or infinite after 2 tokens") as caught:
            jobs[1].result(60)
        assert caught.value.sequences.tolist() == [[6, 50]] and jobs[1].finish_reason == "error"
        assert len(jobs[0].result(60)) == len(jobs[2].result(60)) == 4


def test_a_failing_callback_criterion_or_processor_ends_only_its_own(model, caplog):
    def fails(*args, **keywords):
        raise ZeroDivisionError("mine")

    with Engine(model, 4) as engine:
        jobs = [
            engine.submit([5], max_new_tokens=6),
            engine.submit([6], max_new_tokens=6, stopping_criteria=[fails]),
            engine.submit([7], max_new_tokens=6, logits_processor=[fails]),
            engine.submit([8], max_new_tokens=6, logits_processor=[nans(3)], do_sample=True, seed=0),
        ]
        jobs[0].add_done_callback(fails)
        assert jobs[0].result(60) == serial(model, [5], max_new_tokens=6)
        for job in jobs[1:3]:
            with pytest.raises(ZeroDivisionError, match="mine"):
                job.result(60)
        with pytest.raises(InputError, match="no token can be chosen"):
            list(jobs[3])
        assert engine.submit([5], max_new_tokens=6).result(60) == jobs[0].result()


def test_what_a_module_raises_is_the_answer_of_those_under_way(model):
    broken = lively()
    handle = broken.transformer.h[1].register_forward_hook(lambda *args: 1 / 0)
    with Engine(broken, 2) as engine:
        with pytest.raises(ZeroDivisionError):
            engine.submit([5, 6], max_new_tokens=3).result(60)
        handle.remove()
        assert engine.submit([5, 6], max_new_tokens=3).result(60) == serial(broken, [5, 6], max_new_tokens=3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda e: e.submit([1, V]), InputError, rf"prompt\[0, 1\] is {V}"),
        (lambda e: e.submit([]), InputError, r"prompt is \[\]; give a string, or token ids"),
        (lambda e: e.submit([5], prefix=3), InputError, "prefix is 3"),
        (lambda e: e.submit("abc"), SetupError, "no tokenizer"),
        (lambda e: e.submit([5], max_new_token=3), UnknownOptionError, "did you mean 'max_new_tokens'"),
        (lambda e: e.submit([5], num_beams=2), InputError, "num_beams above 1 is nothing for an engine"),
        (lambda e: e.submit([5], num_return_sequences=2), InputError, "num_return_sequences"),
        (lambda e: e.submit([5], use_cache=False), InputError, "use_cache=False"),
        (lambda e: e.submit([5] * 90, max_new_tokens=20), InputError, "past this engine's max_tokens of 100"),
        (lambda e: e.submit([5], timeout=-1), InputError, "timeout=-1"),
        (lambda e: e.submit([5], logits_processor=[3]), InputError, "logits_processor"),
        (lambda e: e.generate_many("abc"), InputError, "prompts is a str"),
        (lambda e: e.generate_many([[5]], errors="no"), InputError, "errors='no'"),
        (lambda e: list(e.generate_many([{"text": [5]}])), InputError, "prompt 0 is a mapping without 'prompt'"),
        (lambda e: e.submit([5, 9, 6], pad_token_id=9), InputError, "prompt holds the pad token 9"),
        (lambda e: Engine(e.model, 0), InputError, "max_rows=0 is not an integer from 1"),
        (lambda e: Engine(e.model, max_tokens=641), InputError, "max_tokens=641 is not an integer from 1 to 640"),
        (lambda e: Engine(3), InputError, "model is 3; give a GPTNeoForCausalLM"),
    ],
)
def test_what_cannot_be_served_is_named(model, call, error, message):
    with Engine(model, 2, 100) as engine, pytest.raises(error, match=message):
        call(engine)


def test_a_full_queue_makes_callers_wait(model):
    gate = Gate(2)
    with Engine(model, 1, max_waiting=2) as engine:
        first = engine.submit([5], max_new_tokens=600, eos_token_id=None, logits_processor=[gate])
        next(iter(first))
        waiting = [engine.submit([5], max_new_tokens=2) for _ in range(2)]
        with pytest.raises(BusyError, match="2 requests wait for a row"):
            engine.submit([5], max_new_tokens=2, timeout=0.01)
        waiting[0].cancel()
        first.cancel()
        gate.open()
        assert engine.submit([5], max_new_tokens=2).result(60) == waiting[1].result(60)
        assert waiting[0].cancelled() and waiting[0].finish_reason == "cancelled"


def test_rows_are_as_many_as_a_card_holds(model, monkeypatch):
    config, need = model.config, memory.needed
    monkeypatch.setattr(engine_module, "free_bytes", lambda device: need(config, torch.float32, 20, 640))
    monkeypatch.setattr(memory, "free_bytes", lambda device: need(config, torch.float32, 20, 640))
    engine = object.__new__(Engine)
    engine.model = SimpleNamespace(
        config=config, dtype=torch.float32, device=torch.device("cuda"), idle_runners=captured.Pool()
    )
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    engine.max_rows, engine.max_tokens = 64, 640
    engine._fit(fewer=True)
    assert engine.max_rows == 16
    engine.max_rows = 64
    with pytest.raises(OutOfMemoryError, match=r"64 rows of 640 tokens need .*20 rows of 640 tokens"):
        engine._fit(fewer=False)


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, asyncio.CancelledError])
def test_an_exit_of_one_answers_all_the_same(model, error):
    def leaves(*args):
        raise error

    gate = Gate(1)
    with Engine(model, 3) as engine:
        first = engine.submit([4], max_new_tokens=4, logits_processor=[gate])
        jobs = [engine.submit([5 + i], max_new_tokens=4, logits_processor=[leaves] if i == 1 else None) for i in range(4)]
        jobs[0].add_done_callback(leaves)
        gate.open()
        for i in (0, 2, 3):
            require_same(model, [5 + i], jobs[i].result(60), serial(model, [5 + i], max_new_tokens=4))
        assert isinstance(jobs[1].exception(60), error)
        assert len(first.result(60)) == 4


def test_a_cancelled_request_leaves_the_queue_at_once(model):
    gate = Gate(1)
    with Engine(model, 1, max_waiting=1) as engine:
        first = engine.submit([5], max_new_tokens=3, logits_processor=[gate])
        gate.wait()
        second = engine.submit([6], max_new_tokens=3)
        assert second.cancel()
        done, rest = concurrent.futures.wait([second], timeout=10)
        assert second in done and not rest
        third = engine.submit([7], max_new_tokens=3, timeout=0)
        gate.open()
        assert len(third.result(60)) == len(first.result(60)) == 3
