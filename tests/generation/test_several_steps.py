"""Steps that run by themselves in one call of the extension give, drawn or the likeliest, the tokens of single steps."""

import pytest
import torch

from gptneo_fast.errors import InputError, NonFiniteLogitsError
from gptneo_fast.generation import stepwise
from gptneo_fast.generation.processors import MinLengthLogitsProcessor
from gptneo_fast.generation.request import Request
from gptneo_fast.generation.warpers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from gptneo_fast.ops import cpu, extension
from tests.support.peers import peers

pytestmark = pytest.mark.skipif(extension.why_not() is not None, reason=f"no extension: {extension.why_not()}")


@pytest.fixture(params=[3, 32], ids=lambda n: f"{n} at a time")
def many(request, monkeypatch):
    """The tokens of each call of several steps."""
    found, plain = [], cpu.Plan.several

    def several(self, *args):
        out = plain(self, *args)
        found.append(out)
        return out

    monkeypatch.setattr(cpu.Plan, "several", several)
    monkeypatch.setattr(stepwise, "_STEPS", request.param)
    monkeypatch.setattr(stepwise, "_SECONDS", 1e9)
    return found


def one_by_one(monkeypatch, call):
    with monkeypatch.context() as patch:
        patch.setattr(Request, "alone", False)
        patch.setattr(Request, "choose", lambda *_: None)
        return call()


class Streamer:
    def put(self, tokens):
        pass

    def end(self):
        pass


def prompts(B, T=5, seed=0):
    return torch.randint(3, 97, (B, T), generator=torch.Generator().manual_seed(seed))


CALLS = {
    "one text": (1, {}),
    "a batch": (4, {}),
    "minimum": (3, {"min_new_tokens": 9}),
    "minimum of all columns": (3, {"min_length": 12}),
    "no end": (2, {"eos_token_id": None}),
    "several ends": (4, {"eos_token_id": list(range(2, 40)), "pad_token_id": 50}),
    "left padding": (3, {"attention_mask": torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 1, 1, 1, 1]])}),
    "positions": (2, {"position_ids": torch.tensor([[4, 5, 6, 7, 9], [0, 1, 2, 3, 4]])}),
    "up to the positions": (1, {"max_new_tokens": None, "max_length": 640}),
    "chunks": (2, {"prefill_chunk_size": 2}),
}


HOW = {
    "likeliest": {"do_sample": False},
    "drawn": {"do_sample": True, "top_k": 0},
    "top_k": {"do_sample": True, "top_k": 5, "temperature": 0.6},
    "top_p": {"do_sample": True, "top_k": 0, "top_p": 0.7},
    "all three": {"do_sample": True, "top_k": 20, "top_p": 0.9, "temperature": 1.4},
}


def seeded(call):
    """What a call gives after a seed, and a number drawn after it."""
    torch.manual_seed(7)
    return call(), torch.rand(1)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("case", CALLS)
def test_the_tokens_are_those_of_single_steps(case, how, many, monkeypatch):
    rows, options = CALLS[case]
    theirs, model = peers(eos_token_id=[7, 11, 13, 20, 31, 44])
    options = {"max_new_tokens": 40, "pad_token_id": 0} | HOW[how] | options
    ids = prompts(rows)

    def call():
        return model.generate(ids, **options)

    got = seeded(call)
    assert many and all(found is not None for found in many)
    calls = len(many)
    assert all(map(torch.equal, got, seeded(lambda: one_by_one(monkeypatch, call)))) and len(many) == calls
    if case not in ("positions", "chunks"):
        assert all(map(torch.equal, got, seeded(lambda: theirs.generate(ids, **options))))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (TemperatureLogitsWarper, {"do_sample": True, "temperature": 0.5}),
        (TopKLogitsWarper, {"do_sample": True}),
        (TopPLogitsWarper, {"do_sample": True, "top_p": 0.5}),
        (MinLengthLogitsProcessor, {"min_new_tokens": 5}),
    ],
)
def test_another_call_in_the_place_of_a_processor_s_counts(kind, options, many, monkeypatch):
    _, model = peers()
    monkeypatch.setattr(kind, "__call__", lambda self, ids, scores: torch.nn.functional.one_hot(ids[:, -1], 97).log())
    out = model.generate(prompts(2), max_new_tokens=6, pad_token_id=0, **options)
    assert not many and torch.equal(out[:, 5:], out[:, 4:5].expand(-1, 6))


def test_what_rounding_decides_is_left_to_torch(many, monkeypatch):
    theirs, model = peers()
    for own in (theirs, model):
        own.lm_head.weight.data.zero_()  # which of equals top_p leaves, torch's sorting says
    options = {"do_sample": True, "top_k": 0, "top_p": 0.5, "max_new_tokens": 20, "eos_token_id": None, "pad_token_id": 0}
    got, after = seeded(lambda: model.generate(prompts(2), **options))
    assert many and not any(found.shape[1] for found in many)
    want, then = seeded(lambda: theirs.generate(prompts(2), **options))
    assert torch.equal(got, want) and torch.equal(after, then)


def test_numbers_that_another_thread_has_drawn_meanwhile_are_not_drawn_again(many, monkeypatch):
    _, model = peers()
    options = {"do_sample": True, "max_new_tokens": 20, "eos_token_id": None, "pad_token_id": 0}
    want, then = seeded(lambda: model.generate(prompts(2), **options))
    many.clear()
    monkeypatch.setattr(cpu, "advanced", lambda generator, draw: None)
    got, after = seeded(lambda: model.generate(prompts(2), **options))
    assert many and not any(found.shape[1] for found in many)
    assert torch.equal(got, want) and torch.equal(after, then)


def test_a_seed_gives_the_same_tokens_again(many):
    _, model = peers()
    options = {"do_sample": True, "max_new_tokens": 20, "eos_token_id": None, "pad_token_id": 0}
    got = [model.generate(prompts(1), seed=5, **options) for _ in range(2)]
    assert many and torch.equal(*got) and not torch.equal(got[0], model.generate(prompts(1), seed=6, **options))


def test_the_cache_can_be_gone_on_with(many):
    _, model = peers()
    ids = prompts(2)
    out = model.generate(ids, max_new_tokens=20, eos_token_id=None, pad_token_id=0, return_dict_in_generate=True)
    cache = out.past_key_values
    assert many and cache.get_seq_length() == 24 and cache.lengths.tolist() == [24, 24] and cache._written == 24
    more = model.generate(out.sequences, past_key_values=cache, max_new_tokens=10, eos_token_id=None, pad_token_id=0)
    assert torch.equal(more, model.generate(ids, max_new_tokens=30, eos_token_id=None, pad_token_id=0))


def test_what_ends_early_leaves_no_columns_behind(many):
    _, model = peers()
    ids = prompts(1)
    free = model.generate(ids, max_new_tokens=20, eos_token_id=None)[0, 5:].tolist()
    end = next(token for token in free if free.index(token) >= 4)
    n = free.index(end)
    out = model.generate(ids, max_new_tokens=200, eos_token_id=end, pad_token_id=0, return_dict_in_generate=True)
    assert out.sequences[0, 5:].tolist() == free[: n + 1]
    assert out.past_key_values.get_seq_length() == out.past_key_values._written == 5 + n


@pytest.mark.parametrize("how", ["likeliest", "top_k"])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_row_that_breaks_is_named_and_the_others_go_on(rows, how, many, monkeypatch):
    _, model = peers()
    ids, options = prompts(rows), {"max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0, "seed": 3} | HOW[how]
    free = model.generate(ids, **options)
    bad = free[0, 9].item()  # its embedding breaks the step that it is fed to
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
        model.transformer.wte.weight[bad] = float("nan")

    def call():
        with pytest.raises(NonFiniteLogitsError) as caught:
            model.generate(ids, **options)
        return caught.value

    got, want = call(), one_by_one(monkeypatch, call)
    assert many and 0 in got.rows
    assert (got.rows, got.columns, str(got)) == (want.rows, want.columns, str(want))
    assert torch.equal(got.sequences, want.sequences)


@pytest.mark.parametrize(
    "watcher",
    [
        {"output_scores": True, "return_dict_in_generate": True},
        {"output_hidden_states": True, "return_dict_in_generate": True},
        {"repetition_penalty": 1.2},
        {"do_sample": True, "min_p": 0.1},
        {"do_sample": True, "typical_p": 0.9},
        {"do_sample": True, "streamer": Streamer()},
        {"max_time": 100.0},
        {"stopping_criteria": [lambda ids, scores, **_: ids.shape[1] >= 9]},
        {"logits_processor": [lambda ids, scores: scores]},
        {"token_type_ids": torch.ones(2, 5, dtype=torch.long)},
        {"use_cache": False},
    ],
    ids=lambda w: next(iter(w)),
)
def test_where_something_watches_or_has_a_say_steps_are_single(watcher, many):
    _, model = peers()
    model.generate(prompts(2), max_new_tokens=8, pad_token_id=0, **watcher)
    assert not many


def test_a_hook_is_asked_at_every_step(many):
    _, model = peers()
    seen = []
    handle = model.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    model.generate(prompts(1), max_new_tokens=6, eos_token_id=None)
    handle.remove()
    assert len(seen) == 6 and not many
    model.generate(prompts(1), max_new_tokens=6, eos_token_id=None)
    assert many


def test_where_all_tokens_are_ends_that_may_not_come_yet_the_error_is_that_of_single_steps(many):
    _, model = peers(vocab_size=3, eos_token_id=[0, 1, 2])
    with pytest.raises(InputError, match="no token can be chosen for row 0"):
        model.generate(torch.ones(1, 2, dtype=torch.long), max_new_tokens=5, min_new_tokens=4, pad_token_id=0)


def test_embeddings_go_before(many, monkeypatch):
    _, model = peers()
    embeds = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(3))

    def call():
        return model.generate(inputs_embeds=embeds, max_new_tokens=20, pad_token_id=0, eos_token_id=None)

    got = call()
    assert many and torch.equal(got, one_by_one(monkeypatch, call))


def test_a_call_that_is_not_taken_leaves_the_cache_as_it_was(many, monkeypatch):
    _, model = peers()
    ids = prompts(1)
    monkeypatch.setattr(cpu.Plan, "several", lambda *args: None)
    out = model.generate(ids, max_new_tokens=20, eos_token_id=None, return_dict_in_generate=True)
    assert out.past_key_values._written == out.past_key_values.get_seq_length() == 24


REFUSED = {
    "steps": ({"steps": 0}, "steps is 0"),
    "pad": ({"pad": 97}, "pad is 97, but must be from 0 to 96"),
    "positions": ({"positions": torch.tensor([[639]])}, "positions go on from 639 for 2, past 640"),
    "running": ({"running": torch.ones(2, dtype=torch.bool)}, "running is Bool .2., but must be contiguous Bool .1."),
    "ids": (
        {"ids": torch.ones(1, 2, dtype=torch.long), "positions": torch.ones(1, 2, dtype=torch.long)},
        "from ids .B, 1. to logits",
    ),
    "temperature": ({"temperature": 0.0}, "temperature 0, top_k 0 and top_p 1 must be above 0"),
    "top_k": ({"top_k": -1}, "top_k -1"),
    "top_p": ({"top_p": 1.5}, "top_p 1.5"),
    "state": ({"state": torch.zeros(9, dtype=torch.uint8)}, "state is Byte .9., but must be what a torch.Generator"),
    "room": ({"steps": 600}, "a layer has 64 slots, but row 0 needs 602"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_and_nothing_is_written(case):
    from tests.network.test_decoding import arguments, build, steps

    model = build()
    _, cache = steps(model, torch.ones(1, 2, dtype=torch.long), [2])
    before = [t.clone() for t in (*cache.keys, *cache.values)]
    plan, (ids, positions, _, keys, values, lengths, *_) = arguments(model, cache)
    given = {"ids": ids, "positions": positions, "keys": keys, "values": values, "lengths": lengths, "steps": 2, "pad": 0}
    given |= {"running": torch.ones(1, dtype=torch.bool), "ends": [2], "least": 0}
    given |= {"state": None, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    changes, message = REFUSED[case]
    with pytest.raises(RuntimeError, match=f"gptneo_fast_csrc: .*{message}"):
        torch.ops.gptneo_fast_csrc.several(torch.ops.gptneo_fast_csrc.plan(*plan), **given | changes)
    assert all(map(torch.equal, before, (*cache.keys, *cache.values)))
