"""Caches of transformers, tuples and our DynamicCache: continued, filled and taken apart as there."""

# ruff: noqa: F811 (a fixture)
import copy

import pytest
import torch

import gptneo_fast
from gptneo_fast.errors import CacheError, InputError
from tests.models.test_drop_in import IDS, close, pair, tokens  # noqa: F401

transformers = pytest.importorskip("transformers")


@torch.no_grad()
def test_caches_of_transformers_and_tuples_are_continued(pair):
    theirs, ours = pair
    want = theirs(IDS).logits[:, 7:]
    foreign = theirs(IDS[:, :7], past_key_values=transformers.DynamicCache()).past_key_values
    close(ours(IDS[:, 7:], past_key_values=copy.deepcopy(foreign)).logits, want)
    close(ours(IDS[:, 7:], past_key_values=tuple((layer.keys, layer.values) for layer in foreign.layers)).logits, want)
    own = ours(IDS[:, :7]).past_key_values
    close(ours(IDS[:, 7:], past_key_values=tuple(own)).logits, want)  # iterated, and built anew
    assert len(own) == 2 and own[1][0].shape == (2, 4, 7, 8)
    fresh = transformers.DynamicCache()
    assert torch.equal(tokens(ours, max_new_tokens=5, past_key_values=fresh), tokens(theirs, max_new_tokens=5))
    assert fresh.get_seq_length() == 16


@pytest.mark.parametrize("given", [False, True])
@torch.no_grad()
def test_a_dynamic_cache_is_made_and_filled_as_in_transformers(pair, given):
    found = []
    for library, model in zip((transformers, gptneo_fast), pair, strict=True):
        made = [library.DynamicCache(**({"config": model.config} if given else {})) for _ in range(5)]
        assert made[0].get_seq_length() == made[0].get_seq_length(0) == 0
        model(IDS[:, :7], past_key_values=made[0])
        logits = model(IDS[:, 7:], past_key_values=made[0]).logits
        made[0].crop(-3)
        again = model(IDS[:, 9:], past_key_values=made[0]).logits
        text = tokens(model, past_key_values=made[1], max_new_tokens=5)
        made[2].batch_repeat_interleave(2)  # of nothing, nothing
        if library is gptneo_fast:  # theirs wants rows for each beam
            tokens(model, past_key_values=made[2], max_new_tokens=3, num_beams=2)
        made[3].reset()
        alone = model(IDS[:1, :4], past_key_values=made[3]).logits
        made[3].reset()
        found.append([logits, again, text, alone, torch.tensor([c.get_seq_length() for c in (made[0], made[1], made[4])])])
        if given:
            keys = torch.ones(2, 4, 3, 8)
            found[-1] += made[4].update(keys, 2 * keys, 0)
            pairs = [entry[:2] for entry in model(IDS[:, :7], past_key_values=library.DynamicCache()).past_key_values]
            held = library.DynamicCache(pairs, config=model.config)
            found[-1].append(model(IDS[:, 7:], past_key_values=held).logits)
    for theirs, ours in zip(*found, strict=True):
        close(ours, theirs)


def test_a_dynamic_cache_that_cannot_be_is_refused(pair):
    _, model = pair
    keys = torch.ones(2, 4, 3, 8)
    for options, words in [
        ({"config": {}}, "config is a dict; give a GPTNeoConfig"),
        ({"offloading": True}, "offloading is not offered"),
        ({"ddp_cache_data": [(keys, keys)]}, "give config=model.config"),
    ]:
        with pytest.raises(InputError, match=words):
            gptneo_fast.DynamicCache(**options)
    with pytest.raises(CacheError, match="no shape yet"):
        gptneo_fast.DynamicCache().update(keys, keys, 0)
    cache = gptneo_fast.DynamicCache().fork()
    model(IDS, past_key_values=cache)
    with pytest.raises(CacheError, match="holds 2 rows, the input has 1"):
        model(IDS[:1], past_key_values=cache)


@torch.no_grad()
def test_a_cache_shows_its_layers_and_keeps_the_rows_that_are_asked_for(pair):
    ids = torch.cat([IDS[:, :7], IDS[:, 1:8], IDS[:, 2:9]])
    held = [model(ids, use_cache=True).past_key_values for model in pair]
    for rows in ((2, 0), [1], torch.tensor([0, 0])):
        for cache in held:
            cache.batch_select_indices(rows)
        for theirs, ours in zip(held[0].layers, held[1].layers, strict=True):
            assert ours.get_seq_length() == theirs.get_seq_length() == 7
            torch.testing.assert_close(ours.keys, theirs.keys, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(ours.values, theirs.values, rtol=1e-4, atol=1e-5)
    assert [layer.is_sliding for layer in held[1].layers] == [bool(w) for w in held[1].windows]
    new = held[1].layers[0].keys[:, :, :1]
    for layer in held[1].layers:
        assert layer.update(new, new)[0].shape[2] == 8
    assert held[1].get_seq_length() == 8 and torch.equal(held[1].layers[0].keys[:, :, -1:], new)
    for rows in ((0, 9), "x", [0.5]):
        with pytest.raises(InputError):
            held[1].batch_select_indices(rows)
