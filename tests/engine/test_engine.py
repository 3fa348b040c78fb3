"""An engine's results are those of serial generation, whatever runs beside them."""

import asyncio
import concurrent.futures
import contextlib
import copy
import functools
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import gptneo_fast
from gptneo_fast import Engine
from gptneo_fast.engine import engine as engine_module, graphs, rows as rows_module, work
from gptneo_fast.errors import (
    BusyError,
    ConfigError,
    InputError,
    NonFiniteLogitsError,
    OutOfMemoryError,
    SetupError,
    UnknownOptionError,
)
from gptneo_fast.generation import captured
from gptneo_fast.generation.captured import memory
from tests.support.peers import SMALL
from tests.support.serial import Gate, lively, require_same, serial

V = SMALL["vocab_size"]


@pytest.fixture(scope="module")
def model():
    return lively()


@pytest.fixture(scope="module")
def stories():
    from gptneo_fast.demo import FOLDER

    return gptneo_fast.load(FOLDER, dtype=torch.float32)


def ids_of(n, seed=0):
    return torch.randint(3, V, (n,), generator=torch.Generator().manual_seed(seed + n)).tolist()


def own_forward(model):
    plain = model.forward

    def forward(*args, **keywords):
        out = plain(*args, **keywords)
        out.logits = out.logits.roll(1, -1)
        return out

    model.forward = forward


LENGTHS = [(5, 30), (1, 12), (150, 40), (3, 160), (40, 1), (2, 7), (300, 25), (17, 90)]  # tokens in and out


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


@pytest.fixture
def reads(monkeypatch):
    """Tokens of each read of a prompt, None for each step."""
    found, read, step = [], work.read, work.Rows.step

    def counted(model, texts, cache):
        found.append(len(texts) * max(map(len, texts)))
        read(model, texts, cache)

    def stepped(rows):
        found.append(None)
        step(rows)

    monkeypatch.setattr(work, "read", counted)
    monkeypatch.setattr(work.Rows, "step", stepped)
    return found


def test_a_long_prompt_never_holds_up_the_others_for_more_than_a_chunk(model, reads):
    with Engine(model, 3, prefill_chunk_size=50) as engine:
        first = engine.submit([4, 5], max_new_tokens=600, eos_token_id=None, do_sample=True)  # a step at a time
        next(iter(first))
        rest = [engine.submit(ids_of(n), max_new_tokens=3) for n in (400, 30, 30)]
        for job in rest:
            job.result(60)
        first.cancel()
    between = 0
    for tokens in reads:
        between = 0 if tokens is None else between + tokens
        assert between <= 50
    assert sum(n or 0 for n in reads) == 1 + 399 + 29 + 29


@pytest.mark.parametrize("touch", [None, own_forward])
def test_short_prompts_are_read_together(model, reads, touch):
    """Padded by a quarter at most, up to a chunk."""
    model, gate = copy.deepcopy(model), Gate(1)
    if touch is not None:
        touch(model)
    lengths = (20, 17, 19, 9, 8, 300, 1, 1)
    with Engine(model, 9, prefill_chunk_size=64) as engine:
        first = engine.submit([5], max_new_tokens=2, logits_processor=[gate])
        gate.wait()
        jobs = [engine.submit(ids_of(n), max_new_tokens=20) for n in lengths]
        gate.open()
        for job in jobs:
            prompt = job.ids[: job.prompt]
            require_same(model, prompt, job.result(60), serial(model, prompt, max_new_tokens=20))
        first.result(60)
    assert [n for n in reads if n][:3] == [57, 7, 1] and sum(n or 0 for n in reads) == 57 + 8 + 7 + 299


def test_a_shared_prefix_is_computed_once(model, reads):
    prefix = ids_of(200)
    with Engine(model, 4) as engine:
        jobs = [engine.submit(ids_of(n), prefix=prefix, max_new_tokens=9) for n in (1, 5, 150, 1)]
        for job in jobs:
            assert job.prompt == len(job.ids) - len(job.tokens) and job.ids[:200] == prefix
            require_same(model, job.ids[: job.prompt], job.result(60), serial(model, job.ids[: job.prompt], max_new_tokens=9))
    assert sum(n or 0 for n in reads) == 200 + 0 + 4 + 149 + 0


def test_continuations_of_one_prompt_read_it_once(model, reads):
    prompt, how = ids_of(150), {"do_sample": True, "max_new_tokens": 9}
    (found,) = model.generate_many([prompt], num_return_sequences=5, seed=2**64 - 2, **how)
    assert found == [serial(model, prompt, seed=(2**64 - 2 + j) % 2**64, **how) for j in range(5)]
    assert sum(n or 0 for n in reads) == 149


class TestGenerateMany:
    def test_order_is_kept_and_prompts_are_asked_for_as_there_is_room(self, model):
        asked = 0

        def prompts():
            nonlocal asked
            for i in range(200):
                asked += 1
                yield [4 + i % 90] * (1 + i % 7)

        engine = Engine(model, 3, max_waiting=2)
        most = 0
        for i, got in enumerate(engine.generate_many(prompts(), max_new_tokens=4)):
            most = max(most, asked - i)
            require_same(model, [4 + i % 90] * (1 + i % 7), got, serial(model, [4 + i % 90] * (1 + i % 7), max_new_tokens=4))
        assert asked == 200 and most <= 3 + 2 + 2
        engine.close()

    def test_options_of_single_prompts_and_seeds(self, model):
        prompts = [[5], {"prompt": [6, 7], "max_new_tokens": 2}, {"prompt": [8], "do_sample": False}]
        got = list(model.generate_many(prompts, max_rows=2, max_new_tokens=5, do_sample=True, seed=11))
        assert got[0] == serial(model, [5], max_new_tokens=5, do_sample=True, seed=11)
        assert got[1] == serial(model, [6, 7], max_new_tokens=2, do_sample=True, seed=12)
        assert got[2] == serial(model, [8], max_new_tokens=5)

    def test_errors_are_raised_or_stand_where_the_result_would(self, model):
        def bad(ids, scores):
            raise ZeroDivisionError("mine")

        prompts = [[5], {"prompt": [6], "logits_processor": [bad]}, [7]]
        got = list(model.generate_many(prompts, max_new_tokens=3, errors="return"))
        assert got[0] == serial(model, [5], max_new_tokens=3) and got[2] == serial(model, [7], max_new_tokens=3)
        assert isinstance(got[1], ZeroDivisionError)
        with pytest.raises(ZeroDivisionError, match="mine"):
            list(model.generate_many(prompts, max_new_tokens=3))

    def test_a_prompt_that_cannot_be_served_stands_in_its_place(self, model):
        prompts = [[5], [V], [], [7]]
        got = list(model.generate_many(prompts, max_new_tokens=3, errors="return"))
        assert got[0] == serial(model, [5], max_new_tokens=3) and got[3] == serial(model, [7], max_new_tokens=3)
        assert all(isinstance(error, InputError) for error in got[1:3])
        found = model.generate_many(prompts, max_new_tokens=3)
        assert next(found) == got[0]
        with pytest.raises(InputError, match=f"is {V}"):
            next(found)

    def test_a_closed_engine_is_said_once_and_not_of_every_prompt(self, model):
        engine = Engine(model, 1)
        engine.close()
        with pytest.raises(SetupError, match="this engine is closed"):
            next(engine.generate_many(([5] for _ in range(10**9)), errors="return"))

    def test_prefix_processors_and_the_seed_of_one_prompt(self, model):
        def ban(ids, scores):
            return scores.index_fill(1, torch.arange(30), -float("inf"))

        how = {"prefix": [8, 9, 10], "logits_processor": [ban], "max_new_tokens": 9}
        plain, drawn = model.generate_many([[5], {"prompt": [6], "seed": 4, "do_sample": True}], num_return_sequences=3, **how)
        assert plain[0] == plain[1] == serial(model, [8, 9, 10, 5], max_new_tokens=9, logits_processor=[ban])
        for j, got in enumerate(drawn):
            more = {"do_sample": True, "seed": 4 + j, "logits_processor": [ban]}
            assert got == serial(model, [8, 9, 10, 6], max_new_tokens=9, **more)

    def test_what_the_prompts_raise_reaches_the_caller(self, model):
        def prompts():
            yield [5]
            raise OSError("the file ended")

        found = model.generate_many(prompts(), max_new_tokens=3)
        with pytest.raises(OSError, match="the file ended"):
            list(found)

    def test_leaving_early_ends_what_is_under_way(self, model):
        engine = Engine(model, 2)
        for _ in engine.generate_many(([5] for _ in range(10**9)), max_new_tokens=3):
            break
        assert engine.submit([5], max_new_tokens=3).result(60) == serial(model, [5], max_new_tokens=3)
        engine.close()

    def test_a_bar_and_texts(self, stories, capsys):
        prompts = ["Once upon", "The"]
        assert list(stories.generate_many(prompts, max_new_tokens=9, progress=True)) == stories.generate_text(
            prompts, max_new_tokens=9
        )
        assert "2/2" in capsys.readouterr().err


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


TOUCHES = {
    "hook on a block": lambda m: m.transformer.h[1].mlp.register_forward_hook(lambda module, args, out: out * 0.3),
    "hook on the head": lambda m: m.lm_head.register_forward_hook(lambda module, args, out: out.roll(1, -1)),
    "replaced norm": lambda m: setattr(m.transformer, "ln_f", nn.Identity()),
    "own forward": own_forward,
}


@pytest.mark.parametrize("touch", TOUCHES)
def test_what_a_user_did_to_the_model_counts(touch):
    model = lively()
    before = serial(model, ids_of(5), max_new_tokens=20)
    with Engine(model, 3) as engine:
        assert engine.submit(ids_of(5), max_new_tokens=20).result(60) == before
        TOUCHES[touch](model)
        jobs = [engine.submit(ids_of(n), max_new_tokens=20, eos_token_id=None) for n in (5, 160, 1)]
        for job in jobs:
            prompt = job.ids[: job.prompt]
            require_same(model, prompt, job.result(60), serial(model, prompt, max_new_tokens=20, eos_token_id=None))
    assert jobs[0].result() != before


def test_an_override_of_prepare_inputs_is_refused_and_not_ignored():
    class Own(gptneo_fast.GPTNeoForCausalLM):
        def prepare_inputs_for_generation(self, *args, **keywords):
            return super().prepare_inputs_for_generation(*args, **keywords)

    with Engine(Own(gptneo_fast.GPTNeoConfig(**SMALL))) as engine, pytest.raises(InputError, match=r"use model\.generate"):
        engine.submit([5])


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


@pytest.mark.parametrize("rows", [3, 5])
def test_steps_that_are_captured_give_the_same(model, rows, monkeypatch):
    """On this device a plain call stands for each graph; buckets of rows, slots laid out once, and a touch in between."""
    new_cache, steps = type(model.transformer).new_cache, []
    monkeypatch.setattr(type(model.transformer), "new_cache", lambda self, n, most=None: new_cache(self, n, most or 640))
    monkeypatch.setattr(graphs.Graphs, "serve", lambda self: bool(self.model.looked()))
    monkeypatch.setattr(rows_module.Rows, "_several", lambda self, ids: None)
    captured = graphs.Graphs._captured
    monkeypatch.setattr(graphs.Graphs, "_captured", lambda self, n: steps.append(n) or captured(self, n))
    model = copy.deepcopy(model)
    hooked = model.transformer.h[1].mlp
    with Engine(model, rows) as engine:
        jobs = [(ids_of(n), out, engine.submit(ids_of(n), max_new_tokens=out, eos_token_id=None)) for n, out in LENGTHS]
        for prompt, out, job in jobs:
            require_same(model, prompt, job.result(60), serial(model, prompt, max_new_tokens=out, eos_token_id=None))
        assert set(steps) == ({1, 2, 3} if rows == 3 else {1, 2, 4, 5}) and len(steps) == len(set(steps))
        handle = hooked.register_forward_hook(lambda module, args, out: out * 0.3)
        want = serial(model, [5, 6], max_new_tokens=9)
        assert engine.submit([5, 6], max_new_tokens=9).result(60) == want
        handle.remove()
        plain = serial(model, [5, 6], max_new_tokens=9)
        assert engine.submit([5, 6], max_new_tokens=9).result(60) == plain != want
        with torch.no_grad():
            model.lm_head.weight = nn.Parameter(model.lm_head.weight.roll(1, 0))  # another address
        assert engine.submit([5, 6], max_new_tokens=9).result(60) == serial(model, [5, 6], max_new_tokens=9) != plain
        assert len(steps) > len(set(steps))


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


def test_the_first_layer_may_be_the_local_one():
    """Its ring stops growing while the other layers go on."""
    model = lively(attention_types=[[["local", "global", "local"], 1]])
    with Engine(model, 2, prefill_chunk_size=64) as engine:
        jobs = [engine.submit(ids_of(n), max_new_tokens=out, eos_token_id=None) for n, out in ((9, 190), (5, 400), (150, 99))]
        for job, out in zip(jobs, (190, 400, 99), strict=True):
            prompt = job.ids[: job.prompt]
            require_same(model, prompt, job.result(60), serial(model, prompt, max_new_tokens=out, eos_token_id=None))


def changed_weights(model):
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight.data.mul_(1.5)


def hooked_attention(model):
    model.transformer.h[1].attn.register_forward_hook(lambda module, args, out: (out[0] * 0.3, *out[1:]))


@pytest.mark.parametrize("change", [changed_weights, hooked_attention])
def test_a_prefix_is_that_of_the_model_as_it_is(change, reads):
    model, prefix = lively(), ids_of(50)
    with Engine(model, 2) as engine:
        before = engine.submit([5], prefix=prefix, max_new_tokens=20).result(60)
        change(model)
        after = engine.submit([5], prefix=prefix, max_new_tokens=20).result(60)
    assert after == serial(model, [*prefix, 5], max_new_tokens=20) != before
    assert sum(n or 0 for n in reads) == 100


def test_attention_that_is_patched_between_two_requests():
    """Its layers then hold all columns, for it may look at any; and again a window once the patch is gone."""
    model = lively()
    attention = model.transformer.h[1].attn.attention
    with Engine(model, 2) as engine:
        for patched in (False, True, False):
            if patched:
                attention._attn = functools.partial(attention._attn)
            elif "_attn" in vars(attention):
                del attention._attn
            for prompt in (ids_of(200), ids_of(9)):
                got = engine.submit(prompt, max_new_tokens=20).result(60)
                require_same(model, prompt, got, serial(model, prompt, max_new_tokens=20))


def test_a_layer_that_is_patched_without_a_sign_counts_from_the_next_step():
    model, gate = lively(), Gate(3)
    c_fc = model.transformer.h[0].mlp.c_fc
    with Engine(model, 1) as engine:
        first = engine.submit([5], max_new_tokens=4, logits_processor=[gate])
        second = engine.submit([6, 7], max_new_tokens=20)
        gate.wait()
        plain = c_fc.forward
        c_fc.forward = lambda x: plain(x) * 0.2
        gate.open()
        first.result(60)
        got = second.result(60)
    want = serial(model, [6, 7], max_new_tokens=20)
    del c_fc.forward
    assert got == want != serial(model, [6, 7], max_new_tokens=20)


def test_weights_that_change_under_autocast_count():
    model = lively()
    for p in model.parameters():
        p.requires_grad_(True)  # of which autocast keeps copies
    with torch.autocast("cpu", torch.bfloat16), Engine(model, 1) as engine:
        before = engine.submit([5, 6], max_new_tokens=20).result(60)
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(p.roll(1, 0))
        torch.clear_autocast_cache()
        want = serial(model, [5, 6], max_new_tokens=20)
        got = engine.submit([5, 6], max_new_tokens=20).result(60)
    require_same(model, [5, 6], got, want, 0.1)
    assert got != before


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


def without_cache(model):
    plain = model.forward
    model.forward = lambda input_ids=None, **_: plain(input_ids, return_dict=True)


def test_a_forward_that_keeps_no_cache_is_an_error_and_no_hang():
    model = lively()
    without_cache(model)
    with Engine(model, 1) as engine:
        for prompt in ([5], [5, 6, 7]):
            with pytest.raises(InputError, match="left 0 columns in past_key_values"):
                engine.submit(prompt, max_new_tokens=5).result(60)


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


def test_a_configuration_that_was_changed_is_an_error_for_each():
    model, gate = lively(), Gate(1)
    with Engine(model, 1) as engine:
        jobs = [engine.submit([5], max_new_tokens=3, logits_processor=[gate]), engine.submit([6], max_new_tokens=3)]
        gate.wait()
        layers, model.config.attention_layers = model.config.attention_layers, ("local", "local", "local")
        gate.open()
        for job in jobs:
            with pytest.raises(ConfigError, match="layer 0 is local"):
                job.result(60)
        with pytest.raises(ConfigError, match="layer 0 is local"):
            engine.submit([5])
        model.config.attention_layers = layers
        assert engine.submit([6], max_new_tokens=3).result(60) == serial(model, [6], max_new_tokens=3)
