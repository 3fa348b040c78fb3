"""Drafts on the host: looked up or of an assistant, they give the tokens of transformers and of plain calls."""

# ruff: noqa: F811 (a fixture)
import copy

import pytest
import torch
from torch.utils import _pytree as pytree

from gptneo_fast.errors import CacheError
from tests.generation.test_generate import models  # noqa: F401
from tests.support.peers import peers
from tests.support.prompts import prompt


@pytest.mark.parametrize(
    ("name", "do_sample"),
    [
        *((n, s) for n in ("prompt lookup", "wide lookup") for s in (False, True)),
        ("assistant", False),
        ("assistant, heuristic", False),
    ],
)
def test_drafts_give_the_tokens_of_transformers(models, name, do_sample):
    # Sampled tokens of an assistant are compared as a distribution below: from its second round on, the assistant of
    # transformers 5.23 is fed the whole text again on top of its cache, so that it draws other drafts.
    options = {
        "prompt lookup": {"prompt_lookup_num_tokens": 4},
        "wide lookup": {"prompt_lookup_num_tokens": 10, "max_matching_ngram_size": 3, "suppress_tokens": [5, 6]},
    }.get(name, {})
    small = peers(num_layers=1, pad_token_id=0, scale=6.0)
    for seed in range(4):
        out = []
        for model, helper in zip(models, small, strict=True):
            if name.startswith("assistant"):
                schedule = "heuristic" if "heuristic" in name else "constant"
                helper.generation_config.update(num_assistant_tokens=5, num_assistant_tokens_schedule=schedule)
                helper.generation_config.update(assistant_confidence_threshold=0.2)
                options = {"assistant_model": helper, "min_new_tokens": 6}
            torch.manual_seed(seed)
            batch = prompt("one", T=30)
            batch["input_ids"] = batch["input_ids"] % 7 + 3  # repeats itself, so that there is something to look up
            out.append(model.generate(**batch, max_new_tokens=60, do_sample=do_sample, pad_token_id=0, **options))
        assert torch.equal(*out)


@pytest.mark.parametrize("window", [7, 256])
def test_greedy_drafts_change_nothing_past_the_window(window):
    _, model = peers(window_size=window, scale=6.0, pad_token_id=0)
    _, helper = peers(window_size=window, num_layers=1, pad_token_id=0)
    ids = torch.randint(3, 12, (1, 300))
    plain = model.generate(ids, max_new_tokens=200)
    assert torch.equal(plain, model.generate(ids, max_new_tokens=200, prompt_lookup_num_tokens=9))
    assert torch.equal(plain, model.generate(ids, max_new_tokens=200, assistant_model=helper))
    assert torch.equal(plain, model.generate(ids, max_new_tokens=200, assistant_model=model))


@pytest.mark.parametrize("drafter", ["lookup", "stranger", "itself"])
def test_drafts_show_of_each_token_what_a_call_of_its_own_would(models, drafter):
    batch, want = prompt("one") | {"input_ids": torch.tensor([[5, 6, 7] * 4])[:, :11]}, []
    shown = dict(return_dict_in_generate=True, output_scores=True, output_logits=True, max_new_tokens=9, eos_token_id=None)
    shown |= dict(output_attentions=True, output_hidden_states=True)
    for model in models:
        helper = model if drafter == "itself" else peers(pad_token_id=0, num_layers=2)[model is models[1]]
        options = {"prompt_lookup_num_tokens": 3} if drafter == "lookup" else {"assistant_model": copy.deepcopy(helper)}
        want.append(model.generate(**batch, **shown, **options))
    plain = models[1].generate(**batch, **shown)
    for name in ("sequences", "scores", "logits", "attentions", "hidden_states"):
        theirs, ours, alone = (pytree.tree_leaves(getattr(out, name)) for out in (*want, plain))
        assert [t.shape for t in theirs] == [t.shape for t in ours], name
        torch.testing.assert_close(ours, alone, atol=2e-4, rtol=2e-4)


def test_sampled_drafts_keep_the_distribution():
    _, model = peers(vocab_size=12, num_layers=1, scale=8.0, eos_token_id=None, bos_token_id=None)
    _, helper = peers(vocab_size=12, num_layers=1, scale=8.0, eos_token_id=None, bos_token_id=None)
    helper.generation_config.update(num_assistant_tokens=2, assistant_confidence_threshold=0.0)
    ids, counts = torch.tensor([[3, 4, 5]]), []
    for more in ({}, {"assistant_model": helper}):
        count = torch.zeros(12)
        for _ in range(500):
            count[model.generate(ids, do_sample=True, max_new_tokens=3, **more)[0, 4]] += 1
        counts.append(count)
    # Two samples of one distribution: the statistic has a chi-squared distribution with at most 11 degrees of freedom,
    # and exceeds 31.3 once in a thousand.
    a, b = counts
    assert ((a - b) ** 2 / (a + b).clamp(min=1)).sum() < 31.3


@pytest.mark.parametrize("config", [False, True])
def test_drafts_over_a_cache_of_transformers(config):
    transformers = pytest.importorskip("transformers")
    theirs, ours = peers()
    ids = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])
    for how in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": ours}, {}):
        cache = transformers.DynamicCache(**({"config": ours.config} if config else {}))
        found = ours.generate(ids, max_new_tokens=20, do_sample=False, past_key_values=cache, **how)
        assert torch.equal(found, theirs.generate(ids, max_new_tokens=20, do_sample=False))
    static = transformers.StaticCache(config=theirs.config, max_cache_len=64)
    with pytest.raises(CacheError, match="StaticCache, whose keys are as long as it may ever get"):
        ours(ids, past_key_values=static)
