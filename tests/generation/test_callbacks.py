"""What a user's functions give back: obeyed where it means something, else an error that names the function."""

import copy

import numpy as np
import pytest
import torch

from gptneo_fast.errors import InputError
from tests.support.peers import peers
from tests.support.prompts import prompt

STRATEGIES = [{}, {"do_sample": True}, {"num_beams": 2}, {"num_beams": 2, "do_sample": True}]


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    return peers(pad_token_id=0, scale=6.0)


def generated(model, **options):
    return model.generate(**prompt("one"), max_new_tokens=3, **options)


@pytest.mark.parametrize("how", STRATEGIES, ids=str)
@pytest.mark.parametrize(
    "returned",
    [
        lambda ids, s: None,
        lambda ids, s: s.tolist(),
        lambda ids, s: 5,
        lambda ids, s: s.numpy(),
        lambda ids, s: s[0],
        lambda ids, s: s[:, :3],
        lambda ids, s: s.repeat(2, 1),
        lambda ids, s: s[None],
        lambda ids, s: s.long(),
        lambda ids, s: s.to("meta"),
    ],
    ids="None list int numpy row narrow tall deep long meta".split(),
)
def test_a_processor_that_returns_no_scores_is_named(models, returned, how):
    returned.__name__ = "my_processor"
    with pytest.raises(InputError, match="logits processor my_processor returned"):
        generated(models[1], logits_processor=[returned], **how)


@pytest.mark.parametrize("how", STRATEGIES, ids=str)
@pytest.mark.parametrize("fill", [float("nan"), float("-inf")])
def test_scores_of_which_none_can_be_chosen_are_an_error(models, fill, how):
    def emptied(ids, scores):
        return torch.full_like(scores, fill)

    with pytest.raises(InputError, match=r"no token can be chosen for row 0.*emptied"):
        generated(models[1], logits_processor=[emptied], **how)


def test_a_text_that_has_ended_needs_no_token(models):
    batch = {"input_ids": torch.tensor([[5, 6, 7], [8, 9, 10]])}
    end = models[1].generate(**batch, max_new_tokens=1)[0, -1].item()

    def emptied(ids, scores):  # as grammars do behind the end of their text
        return torch.where((ids[:, 3:] == end).any(1)[:, None], float("-inf"), scores)

    both = [m.generate(**batch, max_new_tokens=5, eos_token_id=end, pad_token_id=0, logits_processor=[emptied]) for m in models]
    assert both[1].tolist() == both[0].tolist() and both[1][0, 3:].tolist() == [end, 0, 0, 0, 0]


@pytest.mark.parametrize("how", [{}, {"num_beams": 2}], ids=str)
@pytest.mark.parametrize(
    "found", [None, "x", 0.5, 2, [True, False, True], torch.ones(7) > 0, torch.ones(2, 1) > 0, torch.ones(1)], ids=str
)
def test_a_criterion_that_returns_no_truth_is_named(models, found, how):
    def my_criterion(ids, scores, **more):
        return found

    with pytest.raises(InputError, match="stopping criterion my_criterion returned"):
        generated(models[1], stopping_criteria=[my_criterion], **how)


@pytest.mark.parametrize(
    "truth", [True, 1, np.bool_(True), np.array([True]), [True], (True,), torch.tensor(True), torch.tensor([1])], ids=repr
)
def test_whatever_says_true_ends_a_text(models, truth):
    ended = generated(models[1], stopping_criteria=[lambda ids, scores, **more: truth])
    assert ended.shape[1] == prompt("one")["input_ids"].shape[1] + 1


@pytest.mark.parametrize("how", [{}, {"num_beams": 2}], ids=str)
@pytest.mark.parametrize("found", [[-1], [1.5], [97], None, 3, "ab", [True], []], ids=str)
def test_a_prefix_function_that_returns_no_tokens_is_an_error(models, found, how):
    with pytest.raises(InputError, match=r"prefix_allowed_tokens_fn (returned|allows no token)"):
        generated(models[1], prefix_allowed_tokens_fn=lambda row, ids: found, **how)


@pytest.mark.parametrize("found", [(3, 4), {3, 4}, range(3, 5), torch.tensor([3, 4]), np.array([3, 4])], ids=str)
def test_a_prefix_function_may_return_tokens_in_any_container(models, found):
    new = generated(models[1], prefix_allowed_tokens_fn=lambda row, ids: found)[:, -3:]
    assert new.tolist() == generated(models[0], prefix_allowed_tokens_fn=lambda row, ids: [3, 4])[:, -3:].tolist()


@pytest.mark.parametrize("argument", ["logits_processor", "stopping_criteria"])
@pytest.mark.parametrize(("given", "words"), [([5], "holds 5, which cannot be called"), (print, "give a list of functions")])
def test_functions_come_in_a_list(models, argument, given, words):
    with pytest.raises(InputError, match=f"{argument} .*{words}"):
        generated(models[1], **{argument: given})


@pytest.mark.parametrize("argument", ["logits_processor", "stopping_criteria"])
def test_an_error_of_a_users_own_passes_untouched(models, argument):
    def broken(*_, **__):
        raise LookupError("mine")

    with pytest.raises(LookupError, match=r"^'?mine'?$"):
        generated(models[1], **{argument: [broken]})


def test_of_two_biases_for_the_same_tokens_the_last_counts(models):
    twice = [[[3], 50.0], [[3], -50.0]]
    ours, theirs = (generated(m, sequence_bias=twice, output_scores=True, return_dict_in_generate=True) for m in models[::-1])
    torch.testing.assert_close(ours.scores[0], theirs.scores[0])


WAYS = ["greedy", "sampled", "chunks", "lookup", "stranger", "itself"]


@pytest.mark.parametrize("step", [1, 2, 5])
@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_a_generation_that_fails_midway_leaves_a_cache_of_its_text(models, way, step):
    model, ids = models[1], torch.tensor([[5, 6, 7] * 4])
    stranger = peers(pad_token_id=0, num_layers=2)[1]
    stranger.generation_config.assistant_confidence_threshold = 0.0
    options = {
        "sampled": {"do_sample": True, "top_k": 1},
        "chunks": {"prefill_chunk_size": 3},
        "lookup": {"prompt_lookup_num_tokens": 3},
        "stranger": {"assistant_model": stranger},
        "itself": {"assistant_model": copy.deepcopy(model)},
    }.get(way, {}) | {"max_new_tokens": 9, "eos_token_id": None}
    whole = model.generate(ids, **options)
    texts = []

    def failing(ids, scores):
        texts.append(ids)
        if len(texts) == step:
            raise RuntimeError("midway")
        return scores

    cache = model(ids[:, :4], use_cache=True).past_key_values
    with pytest.raises(RuntimeError, match="midway"):
        model.generate(ids, past_key_values=cache, logits_processor=[failing], **options)
    held = cache.get_seq_length()
    assert cache.lengths.tolist() == [held] and held <= texts[-1].shape[1]
    if way in WAYS[:3]:
        assert held == texts[-1].shape[1]  # as in transformers
    torch.testing.assert_close(
        model(whole[:, held:], past_key_values=cache).logits, model(whole).logits[:, held:], atol=2e-4, rtol=2e-4
    )


@torch.no_grad()
def test_beams_that_fail_midway_leave_a_cache_of_theirs(models):
    model, texts = models[1], []

    def failing(ids, scores):
        texts.append(ids)
        if len(texts) == 4:
            raise RuntimeError("midway")
        return scores

    cache = model(**prompt("one"), use_cache=True).past_key_values
    cache.crop(-3)
    with pytest.raises(RuntimeError, match="midway"):
        model.generate(**prompt("one"), past_key_values=cache, logits_processor=[failing], num_beams=3, max_new_tokens=9)
    found = texts[-1]
    assert cache.get_seq_length() == found.shape[1] and cache.batch_size == 3
    cache.crop(-1)
    found, want = model(found[:, -1:], past_key_values=cache).logits, model(found).logits[:, -1:]
    torch.testing.assert_close(found, want, atol=2e-4, rtol=2e-4)
