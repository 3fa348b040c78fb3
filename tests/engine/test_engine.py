"""An engine's results are those of serial generation, whatever runs beside them."""

import asyncio
import contextlib
import threading
import time

import pytest
import torch

from gptneo_fast import Engine
from gptneo_fast.engine import work
from tests.support.peers import SMALL
from tests.support.serial import LENGTHS, Gate, ids_of, lively, require_same, serial

V = SMALL["vocab_size"]


@pytest.mark.parametrize("least", [0, 9])
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_greedy_tokens_are_those_of_serial_generation(model, rows, least):
    """Rings of 135 slots wrap in some rows and not in others."""
    how = {"min_new_tokens": least, "eos_token_id": [2, 21, 25]}
    with Engine(model, rows, prefill_chunk_size=64) as engine:
        jobs = [(ids_of(n), out, engine.submit(ids_of(n), max_new_tokens=out, **how)) for n, out in LENGTHS]
        for prompt, out, job in jobs:
            require_same(model, prompt, job.result(60), serial(model, prompt, max_new_tokens=out, **how))
            assert job.finish_reason == ("stop" if job.tokens[-1] in (2, 21, 25) else "length")
            assert len(job.tokens) >= min(least, out)


WAYS = [
    {"do_sample": True, "seed": 1},
    {"do_sample": True, "seed": 2**64 - 1, "top_k": 0, "temperature": 1.7},
    {"do_sample": True, "seed": 3, "top_p": 0.6, "min_p": 0.01},
    {"do_sample": True, "seed": 4, "repetition_penalty": 1.4, "typical_p": 0.9},
    {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    {"min_new_tokens": 12, "eos_token_id": [5, 6, 7, 8, 9, 10, 11, 12]},
    {"eos_token_id": None},
    {"suppress_tokens": list(range(3, 60)), "prefill_chunk_size": 16},
    {"guidance_scale": 1.5, "bad_words_ids": [[7], [8, 9]]},
]


def test_each_request_has_its_own_options_and_random_numbers(model):
    """Tokens do not depend on the slot or the batch mates."""
    with Engine(model, 4) as engine:
        jobs = []
        for turn in range(2):
            jobs += [(way, engine.submit(ids_of(9 + turn), max_new_tokens=30, **way)) for way in WAYS[:: 1 - 2 * turn]]
        for way, job in jobs:
            require_same(
                model, job.ids[: job.prompt], job.result(60), serial(model, job.ids[: job.prompt], max_new_tokens=30, **way)
            )


def test_a_seed_is_drawn_where_none_is_given(model):
    with Engine(model) as engine:
        torch.manual_seed(5)
        jobs = [engine.submit([4, 5], do_sample=True, max_new_tokens=9) for _ in range(2)]
        assert jobs[0].result(60) != jobs[1].result(60)
        for job in jobs:
            assert job.result() == serial(model, [4, 5], do_sample=True, max_new_tokens=9, seed=job.seed)
        torch.manual_seed(5)
        assert engine.submit([4, 5], do_sample=True, max_new_tokens=9).result(60) == jobs[0].result()


def test_text_whole_and_in_pieces(stories):
    prompts = ["Once upon a time", "The dog", "", "Lily said: \u00e9\u00e8"]
    ways = [{}, {"stop_strings": ["."]}, {"do_sample": True, "seed": 7, "top_k": 9}, {"stop_strings": [" the", "was a"]}]
    with Engine(stories, 2) as engine:
        jobs = [engine.submit(p, max_new_tokens=40, **way) for p, way in zip(prompts, ways, strict=True)]
        for prompt, way, job in zip(prompts, ways, jobs, strict=True):
            want = stories.generate_text(prompt, max_new_tokens=40, **way)
            assert "".join(job) == want and job.result(60) == want and "".join(job) == want
        assert jobs[1].finish_reason == "stop" and jobs[0].finish_reason == "length"


def test_tokens_come_one_by_one_while_others_are_read(model):
    seen = []
    with Engine(model, 2, prefill_chunk_size=8) as engine:
        for token in engine.submit([4, 5, 6], max_new_tokens=12, do_sample=True, seed=0):
            seen.append(token)
        assert seen == serial(model, [4, 5, 6], max_new_tokens=12, do_sample=True, seed=0)


def test_awaiting_and_async_iteration(stories):
    async def main(engine):
        job = engine.submit("Once upon a time", max_new_tokens=20)
        other = engine.submit("The dog", max_new_tokens=20)
        pieces = [piece async for piece in job]
        again = [piece async for piece in job]
        assert "".join(pieces) == "".join(again) == await job
        third = engine.submit("The cat", max_new_tokens=400)
        third.cancel()
        with pytest.raises(asyncio.CancelledError):
            await third
        return await asyncio.gather(asyncio.wrap_future(job), asyncio.wrap_future(other))

    with Engine(stories, 2) as engine:
        got = asyncio.run(main(engine))
    assert got == stories.generate_text(["Once upon a time", "The dog"], max_new_tokens=20)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    model = lively(dtype)
    with Engine(model, 3) as engine:
        jobs = [engine.submit(ids_of(n), max_new_tokens=20) for n in (5, 160, 1)]
        for job in jobs:
            prompt, error = job.ids[: job.prompt], 1e-4 if dtype == torch.float64 else 0.05
            require_same(model, prompt, job.result(60), serial(model, prompt, max_new_tokens=20), error)


@pytest.mark.parametrize("around", ["inference_mode", "no_grad", "autocast", "grad"])
def test_surroundings_of_the_caller(model, around):
    def surroundings():
        if around == "autocast":
            return torch.autocast("cpu", torch.bfloat16)
        return {"inference_mode": torch.inference_mode, "no_grad": torch.no_grad}.get(around, contextlib.nullcontext)()

    with surroundings(), Engine(model, 2) as engine:
        for n in (5, 40):
            want = serial(model, ids_of(n), max_new_tokens=20)
            got = engine.submit(ids_of(n), max_new_tokens=20).result(60)
            require_same(model, ids_of(n), got, want, 0.05 if around == "autocast" else 1e-4)
    require_same(model, [5], next(model.generate_many([[5]], max_new_tokens=9)), serial(model, [5], max_new_tokens=9))


def test_the_stream_of_the_caller_is_that_of_the_work(model, monkeypatch):
    entered = []

    @contextlib.contextmanager
    def on_stream(stream):
        entered.append((stream, threading.current_thread().name))
        yield

    monkeypatch.setattr(work, "current_stream", lambda device: f"of {threading.current_thread().name}")
    monkeypatch.setattr(work, "on_stream", on_stream)
    with Engine(model, 1) as engine:
        engine.submit([5, 6], max_new_tokens=3).result(60)
    assert set(entered) == {(f"of {threading.current_thread().name}", "gptneo_fast.Engine")}


def test_the_first_layer_may_be_the_local_one():
    """Its ring stops growing while the other layers go on."""
    model = lively(attention_types=[[["local", "global", "local"], 1]])
    with Engine(model, 2, prefill_chunk_size=64) as engine:
        jobs = [engine.submit(ids_of(n), max_new_tokens=out, eos_token_id=None) for n, out in ((9, 190), (5, 400), (150, 99))]
        for job, out in zip(jobs, (190, 400, 99), strict=True):
            prompt = job.ids[: job.prompt]
            require_same(model, prompt, job.result(60), serial(model, prompt, max_new_tokens=out, eos_token_id=None))


def test_no_new_tokens_are_none(model):
    with Engine(model, 1) as engine:
        job = engine.submit([5, 6], max_new_tokens=0)
        assert job.result(60) == [] and list(job) == [] and job.finish_reason == "length"


def test_time_counts_from_the_turn_of_a_request(model):
    gate = Gate(1)
    with Engine(model, 1) as engine:
        first = engine.submit([5], max_new_tokens=3, logits_processor=[gate])
        second = engine.submit([6], max_new_tokens=9, max_time=1.5, eos_token_id=None)
        gate.wait()
        time.sleep(1.6)
        gate.open()
        assert len(second.result(60)) == 9 and first.done()
        slow = engine.submit([6], max_new_tokens=9, max_time=0.1, logits_processor=[lambda i, s: (time.sleep(0.04), s)[1]])
        assert 1 <= len(slow.result(60)) < 9 and slow.finish_reason == "stop"


def test_a_stop_at_the_last_token_is_a_stop(stories):
    text = stories.generate_text("Once upon a time", max_new_tokens=40)
    with Engine(stories, 1) as engine:
        whole = engine.submit("Once upon a time", max_new_tokens=40).tokens
        job = engine.submit("Once upon a time", max_new_tokens=40, stop_strings=[text[5:9]])
        job.result(60)
        again = engine.submit("Once upon a time", max_new_tokens=len(job.tokens), stop_strings=[text[5:9]])
        assert again.result(60) == job.result() and again.finish_reason == job.finish_reason == "stop"
    assert whole is not None


def test_padding_of_ids_is_left_out_as_by_generate(model):
    with Engine(model, 1) as engine:
        job = engine.submit([9, 9, 5, 6, 9], pad_token_id=9, max_new_tokens=8)
        assert job.result(60) == serial(model, [5, 6], max_new_tokens=8) and job.prompt == 2


def test_an_empty_text_behind_a_prefix_adds_nothing(stories):
    with Engine(stories, 1) as engine:
        got = engine.submit("", prefix="Once upon a time", max_new_tokens=9).result(60)
    assert got == stories.generate_text("Once upon a time", max_new_tokens=9)
