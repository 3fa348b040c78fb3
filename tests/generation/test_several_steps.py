"""Greedy steps that run by themselves in one call of the extension give what the same steps one by one give."""

import pytest
import torch

from gptneo_fast.errors import InputError, NonFiniteLogitsError
from gptneo_fast.generation import stepwise
from gptneo_fast.generation.request import Request
from gptneo_fast.ops import cpu, extension
from tests.support.peers import peers

pytestmark = pytest.mark.skipif(extension.why_not() is not None, reason=f"no extension: {extension.why_not()}")


@pytest.fixture(params=[3, 32], ids=lambda n: f"{n} at a time")
def many(request, monkeypatch):
    """The tokens of each call of several steps."""
    found, plain = [], cpu.Plan.greedy

    def greedy(self, *args):
        out = plain(self, *args)
        found.append(out)
        return out

    monkeypatch.setattr(cpu.Plan, "greedy", greedy)
    monkeypatch.setattr(stepwise, "_STEPS", request.param)
    monkeypatch.setattr(stepwise, "_SECONDS", 1e9)
    return found


def one_by_one(monkeypatch, call):
    with monkeypatch.context() as patch:
        patch.setattr(Request, "greedy", False)
        return call()


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


@pytest.mark.parametrize("case", CALLS)
def test_the_tokens_are_those_of_single_steps(case, many, monkeypatch):
    rows, options = CALLS[case]
    theirs, model = peers(eos_token_id=[7, 11, 13, 20, 31, 44])
    options = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0} | options
    ids = prompts(rows)

    def call():
        return model.generate(ids, **options)

    got = call()
    assert many and all(found is not None for found in many)
    calls = len(many)
    assert torch.equal(got, one_by_one(monkeypatch, call)) and len(many) == calls
    if case not in ("positions", "chunks"):
        assert torch.equal(got, theirs.generate(ids, **options))


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


@pytest.mark.parametrize("rows", [1, 3])
def test_a_row_that_breaks_is_named_and_the_others_go_on(rows, many, monkeypatch):
    _, model = peers()
    ids = prompts(rows)
    free = model.generate(ids, max_new_tokens=12, eos_token_id=None, pad_token_id=0)
    bad = free[0, 9].item()  # its embedding breaks the step that it is fed to
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
        model.transformer.wte.weight[bad] = float("nan")

    def call():
        with pytest.raises(NonFiniteLogitsError) as caught:
            model.generate(ids, max_new_tokens=12, eos_token_id=None, pad_token_id=0)
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
        {"do_sample": True},
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
    monkeypatch.setattr(cpu.Plan, "greedy", lambda *args: None)
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
    changes, message = REFUSED[case]
    with pytest.raises(RuntimeError, match=f"gptneo_fast_csrc: .*{message}"):
        torch.ops.gptneo_fast_csrc.greedy(torch.ops.gptneo_fast_csrc.plan(*plan), **given | changes)
    assert all(map(torch.equal, before, (*cache.keys, *cache.values)))
