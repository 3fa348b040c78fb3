"""Text piece by piece: stream, its async twin, streamers; what is left early or breaks frees everything and is heard of."""

import asyncio
import contextlib
import gc
import threading
import weakref

import pytest
import torch

import gptneo_fast
from gptneo_fast.demo import FOLDER
from gptneo_fast.errors import InputError
from gptneo_fast.generation.session import Session

TALES = ["Once upon a time", "Long ago there was a brave", "One morning the little fox went", "The"]


@pytest.fixture(scope="module")
def model():
    return gptneo_fast.load(FOLDER, dtype="float32", device="cpu")


def test_the_pieces_of_a_stream_are_the_text(model):
    for options in ({"do_sample": True, "seed": 3}, {}, {"repetition_penalty": 1.2}, {"prompt_lookup_num_tokens": 5}):
        pieces = list(model.stream(TALES[0], max_new_tokens=40, **options))
        assert "".join(pieces) == model.generate_text(TALES[0], max_new_tokens=40, **options)
        assert len(pieces) > 5


def test_a_stream_checks_its_arguments_at_once(model):
    with pytest.raises(InputError, match="top_p"):
        model.stream("x", top_p=2.0)
    with pytest.raises(InputError, match="num_beams"):
        model.stream("x", num_beams=2)


def test_leaving_a_stream_frees_everything(model):
    pieces = model.stream(TALES[0], max_new_tokens=400)
    for piece in pieces:
        assert piece
        break
    cache = weakref.ref(next(o for o in gc.get_objects() if isinstance(o, gptneo_fast.KVCache)))
    del pieces
    gc.collect()
    assert cache() is None


def test_the_async_twin_gives_the_same_and_leaves_the_loop_free(model):
    async def main():
        ticks, pieces = [], []

        async def ticker():
            while True:
                ticks.append(1)
                await asyncio.sleep(0)

        task = asyncio.create_task(ticker())
        async for piece in model.astream(TALES[0], max_new_tokens=20):
            pieces.append(piece)
        task.cancel()
        broken = model.astream("x", top_p=3.0)
        with pytest.raises(InputError, match="top_p"):
            await anext(broken)
        async for piece in model.astream(TALES[0], max_new_tokens=400):
            assert piece
            break
        return ticks, "".join(pieces)

    ticks, text = asyncio.run(main())
    assert len(ticks) > 20
    assert text == model.generate_text(TALES[0], max_new_tokens=20)


def test_an_async_stream_that_is_cancelled_in_a_step_frees_everything(model):
    async def main(seconds):
        async def read():
            async for _ in model.astream(TALES[0], max_new_tokens=400):
                pass

        with pytest.raises(TimeoutError):
            await asyncio.wait_for(read(), seconds)

    before = threading.active_count()
    for i in range(12):
        asyncio.run(main(0.01 + 0.003 * i))
    gc.collect()
    assert threading.active_count() <= before
    assert not [o for o in gc.get_objects() if type(o) is Session]
    assert "".join(model.stream(TALES[0], max_new_tokens=5)) == model.generate_text(TALES[0], max_new_tokens=5)


def test_streamers_print_and_iterate_as_those_of_transformers(model, capsys):
    transformers = pytest.importorskip("transformers", minversion="5.24", reason="older ones held words back")
    ids = model.tokenizer(TALES[0], return_tensors="pt").input_ids
    outs = []
    for module, kind in ((transformers, "TextStreamer"), (gptneo_fast, "TextStreamer")):
        for skip in (False, True):
            model.generate(ids, streamer=getattr(module, kind)(model.tokenizer, skip_prompt=skip), max_new_tokens=30)
            outs.append(capsys.readouterr().out)
    assert outs[:2] == outs[2:]
    assert outs[0].strip() == TALES[0] + model.generate_text(TALES[0], max_new_tokens=30)

    pieces = {}
    for module in (transformers, gptneo_fast):
        streamer = module.TextIteratorStreamer(model.tokenizer, skip_prompt=True, timeout=30)
        thread = threading.Thread(target=model.generate, args=(ids,), kwargs={"streamer": streamer, "max_new_tokens": 30})
        thread.start()
        pieces[module.__name__] = list(streamer)
        thread.join()
    assert pieces["transformers"] == pieces["gptneo_fast"]


def test_an_error_reaches_the_one_who_iterates_over_a_streamer(model, monkeypatch):
    ids = model.tokenizer(TALES[0], return_tensors="pt").input_ids
    streamer = gptneo_fast.TextIteratorStreamer(model.tokenizer, timeout=30)
    errors = []

    def work():
        try:
            model.generate(ids, streamer=streamer, logits_processor=[lambda ids, scores: 1 / 0], max_new_tokens=5)
        except ZeroDivisionError as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    with pytest.raises(ZeroDivisionError):
        list(streamer)
    thread.join()
    assert errors


def test_a_streamer_of_any_kind_gets_the_prompt_and_every_token(model):
    class Keep:
        def __init__(self):
            self.values, self.ended = [], 0

        def put(self, value):
            self.values.append(value)

        def end(self):
            self.ended += 1

    ids = model.tokenizer(TALES[0], return_tensors="pt").input_ids
    for options in ({}, {"prompt_lookup_num_tokens": 4}):
        keep = Keep()
        out = model.generate(ids, streamer=keep, max_new_tokens=12, **options)
        assert torch.equal(torch.cat([v.flatten() for v in keep.values]), out[0]) and keep.ended == 1
        assert torch.equal(keep.values[0], ids)


def test_a_stream_is_guided_as_the_whole_text_is(model):
    options = dict(max_new_tokens=12, guidance_scale=4.0)
    guided = model.generate_text("Once upon a time", **options)
    assert "".join(model.stream("Once upon a time", **options)) == guided
    assert guided != model.generate_text("Once upon a time", max_new_tokens=12)


def test_an_async_streamer_gives_the_text_and_the_error_to_the_event_loop(model):
    ids = model.tokenizer(TALES[0], return_tensors="pt").input_ids

    async def read(**options):
        streamer = gptneo_fast.AsyncTextIteratorStreamer(model.tokenizer, skip_prompt=True, timeout=60)
        thread = threading.Thread(target=lambda: _quietly(model, ids, streamer=streamer, **options))
        thread.start()
        pieces = [piece async for piece in streamer]
        thread.join()
        return pieces

    def broken(ids, scores):
        raise ValueError("a criterion broke")

    pieces = asyncio.run(read(max_new_tokens=20))
    assert "".join(pieces) == model.generate_text(TALES[0], max_new_tokens=20) and len(pieces) > 5
    with pytest.raises(ValueError, match="a criterion broke"):
        asyncio.run(read(max_new_tokens=20, stopping_criteria=[lambda ids, scores, **_: broken(ids, scores)]))


def test_an_async_streamer_waits_no_longer_than_its_timeout(model):
    async def read():
        async for _ in gptneo_fast.AsyncTextIteratorStreamer(model.tokenizer, timeout=0.01):
            pass

    with pytest.raises(TimeoutError):
        asyncio.run(read())


def test_a_generation_whose_reader_has_gone_ends_with_its_own_error(model):
    async def made():
        return gptneo_fast.AsyncTextIteratorStreamer(model.tokenizer)

    streamer = asyncio.run(made())  # whose loop is closed now
    with pytest.raises(InputError, match="max_new_tokens=-1"):
        model.generate(model.tokenizer(TALES[0], return_tensors="pt").input_ids, max_new_tokens=-1, streamer=streamer)


def _quietly(model, ids, **options):
    """`generate`, whose error the streamer has."""
    with contextlib.suppress(ValueError):
        model.generate(ids, **options)
