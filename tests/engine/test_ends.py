"""How an engine ends: closed, collected, interrupted, forked, or with its interpreter; and a storm of requests."""

import gc
import os
import random
import signal
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import CancelledError

import pytest
import torch

from gptneo_fast import Engine
from gptneo_fast.errors import NonFiniteLogitsError, SetupError
from tests.support.peers import SMALL
from tests.support.serial import Gate, require_same, serial

V = SMALL["vocab_size"]


def threads():
    return [t for t in threading.enumerate() if t.name == "gptneo_fast.Engine"]


def wait_for_no_thread():
    end = time.monotonic() + 60
    while threads() and time.monotonic() < end:
        time.sleep(0.01)
    assert not threads()


def test_closing_finishes_what_there_is_and_cancelling_does_not(model):
    engine = Engine(model, 1)
    jobs = [engine.submit([5], max_new_tokens=20) for _ in range(3)]
    engine.close()
    assert all(job.result(0) == jobs[0].result(0) for job in jobs)
    with pytest.raises(SetupError, match="this engine is closed"):
        engine.submit([5])
    engine.close()
    engine, gate = Engine(model, 1), Gate(2)
    jobs = [engine.submit([5], max_new_tokens=600, logits_processor=[gate]) for _ in range(3)]
    next(iter(jobs[0]))
    assert all(job.cancel() for job in jobs)  # as closing does, but for the wait
    gate.open()
    engine.close(cancel=True)
    for job in jobs:
        with pytest.raises(CancelledError):
            job.result(0)
    wait_for_no_thread()


def test_an_error_in_the_with_block_cancels(model):
    engine = Engine(model, 1)

    def block():
        with engine:
            jobs.extend(engine.submit([5], max_new_tokens=600, eos_token_id=None, do_sample=True) for _ in range(4))
            raise KeyboardInterrupt

    jobs = []
    with pytest.raises(KeyboardInterrupt):
        block()
    assert jobs[3].cancelled()


def test_what_nobody_holds_ends(model):
    assert Engine(model).submit([5], max_new_tokens=4).result(60) == serial(model, [5], max_new_tokens=4)
    held = Engine(model)
    gone = weakref.ref(held)
    held.submit([5], max_new_tokens=4).result(60)
    del held
    gc.collect()
    assert gone() is None
    wait_for_no_thread()


def test_a_callback_may_submit_and_close_but_not_wait(model):
    engine, caught, more = Engine(model, 1, max_waiting=1), [], []

    def callback(job):
        more.append(engine.submit([6], max_new_tokens=2, timeout=0))
        try:
            more[0].result()
        except SetupError as error:
            caught.append(str(error))
        engine.close()

    engine.submit([5], max_new_tokens=2).add_done_callback(callback)
    end = time.monotonic() + 60
    while not caught and time.monotonic() < end:
        time.sleep(0.01)
    assert "waits for another job of the same engine" in caught[0]
    assert more[0].result(60) == serial(model, [6], max_new_tokens=2)
    engine.close()


def test_a_forked_child_is_told(model):
    gate = Gate(2)
    with Engine(model, 1) as engine:
        job = engine.submit([5], max_new_tokens=600, logits_processor=[gate])
        next(iter(job))
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            told = []
            for call in (lambda: engine.submit([5]), job.result, lambda: list(job)):
                try:
                    call()
                except SetupError as error:
                    told.append("was forked" in str(error))
            engine.close()
            os.write(writing, bytes(told))
            os._exit(0)
        os.waitpid(child, 0)
        assert os.read(reading, 9) == bytes([True] * 3)
        job.cancel()
        gate.open()


PROGRAM = """
import signal
import gptneo_fast
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background ignores
from gptneo_fast.demo import FOLDER
model = gptneo_fast.load(FOLDER)
engine = gptneo_fast.Engine(model, 2, max_waiting=99)
jobs = [engine.submit("Once upon a time", max_new_tokens=500, eos_token_id=None) for _ in range(40)]
next(iter(jobs[0]))
print("going", flush=True)
"""


@pytest.mark.parametrize("rest", ["", "jobs[39].result()", "list(engine.generate_many('The' for _ in range(10**9)))"])
def test_an_interpreter_ends_at_once(rest):
    program = subprocess.Popen([sys.executable, "-c", PROGRAM + rest], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert program.stdout.readline() == b"going\n"
        if rest:
            time.sleep(0.3)
            program.send_signal(signal.SIGINT)
        _, errors = program.communicate(timeout=60)
    finally:
        program.kill()
    assert program.returncode == (0 if not rest else -signal.SIGINT), errors
    assert (b"KeyboardInterrupt" in errors) == bool(rest)


def test_threads_that_torch_was_told_to_use(model):
    before, seen = torch.get_num_threads(), []
    try:
        torch.set_num_threads(1)
        with Engine(model) as engine:
            engine.submit(
                [5], max_new_tokens=2, logits_processor=[lambda i, s: (seen.append(torch.get_num_threads()), s)[1]]
            ).result(60)
    finally:
        torch.set_num_threads(before)
    assert seen == [1, 1]


def test_eight_threads_of_fifty_requests(model):
    want = {n: serial(model, [4 + n] * (1 + n), max_new_tokens=6, do_sample=True, seed=n) for n in range(20)}
    wrong = []
    with Engine(model, 5, max_waiting=3) as engine:

        def work(who):
            for i in range(50):
                n = (who * 7 + i) % 20
                got = engine.submit([4 + n] * (1 + n), max_new_tokens=6, do_sample=True, seed=n).result(120)
                wrong.extend([(who, i)] if got != want[n] else [])

        workers = [threading.Thread(target=work, args=(who,)) for who in range(8)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert not wrong


class Storm:
    """Random requests, by seed; each says how it must end."""

    def __init__(self, model, seed):
        self.model, self.random, self.wants = model, random.Random(seed), {}

    def want(self, prompt, out, seed):
        key = (tuple(prompt), out, seed)
        if key not in self.wants:
            how = {} if seed is None else {"do_sample": True, "seed": seed}
            self.wants[key] = serial(self.model, prompt, max_new_tokens=out, **how)
        return self.wants[key]

    def request(self):
        r = self.random
        prompt = [r.randrange(4, 8)] * r.choice([1, 2, 5, 30, 140])
        out, seed, kind = (
            r.choice([1, 2, 9, 30]),
            r.choice([None, 1, 2]),
            r.choice(["plain"] * 6 + ["cancel", "nan", "fails", "callback"]),
        )
        return prompt, out, seed, kind


def test_a_storm_of_a_thousand_requests(model):
    """Nothing lost, nothing twice, every result that of serial generation, no row leaked, memory flat."""
    storm, open_jobs, cancelled, finished = Storm(model, 0), [], 0, []

    def fails(*args):
        raise ZeroDivisionError("mine")

    with Engine(model, 6, max_waiting=10, prefill_chunk_size=40) as engine:
        for i in range(1000):
            prompt, out, seed, kind = storm.request()
            how = {} if seed is None else {"do_sample": True, "seed": seed}
            if kind in ("nan", "fails"):
                how["logits_processor"] = [fails if kind == "fails" else lambda ids, scores: scores * float("nan")]
            shared = {"prefix": prompt[:-1], "prompt": prompt[-1:]} if len(prompt) > 1 and i % 3 == 0 else {"prompt": prompt}
            job = engine.submit(max_new_tokens=out, **shared, **how)
            job.add_done_callback(fails if kind == "callback" else finished.append)
            if kind == "callback":
                finished.append(job)
            open_jobs.append((job, prompt, out, seed, kind))
            if kind == "cancel":
                storm.random.random() < 0.5 and next(iter(job), None)
                cancelled += job.cancel()
            if i == 500:
                held = engine._work._rows.cache.nbytes
        for job, prompt, out, seed, kind in open_jobs:
            if job.cancelled():
                assert kind == "cancel"
            elif kind == "fails":
                assert isinstance(job.exception(60), ZeroDivisionError)
            elif kind == "nan":
                assert isinstance(job.exception(60), NonFiniteLogitsError | ValueError)
            else:
                got = job.result(60)
                if seed is None:
                    require_same(model, prompt, got, storm.want(prompt, out, seed))
                else:
                    assert got == storm.want(prompt, out, seed), (prompt, out, seed)
        work = engine._work
        assert not work._rows.jobs and work._reading is None and not work._waiting
        assert work._rows.cache.nbytes == held and len(work._prefixes) <= 4
    assert sorted(map(id, finished)) == sorted(id(job) for job, *_ in open_jobs) and cancelled > 20
