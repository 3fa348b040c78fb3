"""Keys and values that somebody looks at, edits or sets: they count as in transformers, and a view keeps what it shows."""

import pytest
import torch

from gptneo_fast import GPTNeoConfig, GPTNeoForCausalLM
from gptneo_fast.errors import CacheError
from tests.support.peers import peers


def _held(model, ids, how):
    """A cache after all but the last token, edited."""
    cache = model(ids[:, :-1], use_cache=True).past_key_values
    for i, layer in enumerate(cache.layers):
        if how == "in place":
            layer.values[:, :, 3] = 0
            layer.keys.mul_(0.5)
        elif how == "walked":
            for j, (k, v, *_) in enumerate(cache):
                if j == i:
                    k.mul_(0.5)
                    v[:, :, 3] = 0
        elif how == "set":
            edited = layer.values.clone()
            edited[:, :, 3] = 0
            layer.values = edited
            layer.keys = layer.keys * 0.5
    return cache


@pytest.mark.parametrize("how", ["in place", "walked", "set"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_what_is_edited_in_a_cache_counts_as_in_transformers(how, backend):
    theirs, _ = peers()
    ours = GPTNeoForCausalLM(GPTNeoConfig(**theirs.config.to_dict()), backend=backend).eval()
    ours.load_state_dict(theirs.state_dict())
    ids = torch.randint(97, (2, 12))
    with torch.no_grad():
        found, plain = ([m(ids[:, -1:], past_key_values=_held(m, ids, h)).logits for m in (ours, theirs)] for h in (how, ""))
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-3)
    assert (found[0] - plain[0]).abs().max() > 0.03  # fifty times the tolerance: the edit shows


@pytest.mark.parametrize("how", ["set", "in place"])
@pytest.mark.parametrize("T", [9, 200], ids=["in the window", "past the ring"])
def test_keys_and_values_that_are_changed_where_no_view_shows_them(T, how):
    theirs, ours = peers()
    ids = torch.randint(97, (2, T))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    given = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    with torch.no_grad():
        logits = []
        for model in (theirs, ours):
            cache = model(ids[:, :-1], **{k: v[:, :-1] for k, v in given.items()}, use_cache=True).past_key_values
            for layer in cache.layers:
                assert layer.keys.shape[2] == T - 1  # all columns, whether a ring still has them
                edited = layer.values.clone() if how == "set" else layer.values
                edited[:, :, -3] *= 2
                if how == "set":
                    layer.values = edited
            last = given["position_ids"][:, -1:]
            logits.append(model(ids[:, -1:], past_key_values=cache, attention_mask=mask, position_ids=last).logits)
        torch.testing.assert_close(logits[1], logits[0], rtol=1e-3, atol=1e-3)
        for shape in ((2, 4, T - 2, 8), (1, 4, T - 1, 8)):
            with pytest.raises(CacheError, match=r"keys of layer 0 has shape .*crop\(\) forgets columns"):
                cache.layers[0].keys = torch.zeros(shape)


def test_a_view_of_a_cache_keeps_what_it_shows():
    _, ours = peers()
    ids = torch.randint(97, (1, 300))
    with torch.no_grad():
        cache = ours(ids[:, :100], use_cache=True).past_key_values
        shown = [t for pair in cache for t in pair]
        kept = [t.clone() for t in shown]
        for i in range(100, 300, 50):  # rings wrap
            ours(ids[:, i : i + 50], past_key_values=cache)
        assert all(map(torch.equal, shown, kept))
        cache = ours(ids[:, :100], use_cache=True).past_key_values
        shown = [t for pair in cache for t in pair]
        cache.crop(60)
        ours(ids[:, 200:220], past_key_values=cache)
        assert all(map(torch.equal, shown, kept))
        other = ours(torch.cat([ids[:, :60], ids[:, 200:220]], 1), use_cache=True).past_key_values
        for pair, expected in zip(cache, other, strict=True):
            torch.testing.assert_close(pair, expected, rtol=1e-4, atol=1e-4)


def test_what_a_ring_has_dropped_is_zeros_also_after_a_crop():
    _, ours = peers()
    ids = torch.randint(97, (1, 140 + 60))
    with torch.no_grad():
        cache = ours(ids, use_cache=True).past_key_values
        held = [t.clone() for t in cache[1]]
        cache.crop(190)
        for before, now in zip(held, cache[1], strict=True):
            kept = (now != 0).any(-1).any(1)[0]
            assert now.shape[2] == 190 and not kept[: 200 - 135].any() and kept[-100:].all()
            assert torch.equal(now[:, :, kept], before[:, :, :190][:, :, kept])


def test_a_cache_changed_in_inference_mode_goes_on_with_gradients():
    _, ours = peers()
    ids = torch.randint(97, (1, 9))
    with torch.inference_mode():
        cache = ours(ids[:, :8], use_cache=True).past_key_values
        cache.layers[0].keys = cache.layers[0].keys * 2
    ours(ids[:, 8:], past_key_values=cache).logits.sum().backward()


def test_keys_and_values_of_a_padded_row_that_are_asked_for_one_by_one():
    theirs, ours = peers()
    ids, mask = torch.randint(97, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    places, logits = (mask.cumsum(1) - 1).clamp(min=0), []
    with torch.no_grad():
        for model in (theirs, ours):
            given = {"attention_mask": mask[:, :-1], "position_ids": places[:, :-1]}
            cache = model(ids[:, :-1], **given, use_cache=True).past_key_values
            for layer in cache.layers:
                k, v = layer.keys, layer.values
                k[:, :, -2] *= 2
                v[:, :, -3] *= 2
                layer.values = layer.values * 1.5
            logits.append(model(ids[:, -1:], past_key_values=cache, attention_mask=mask, position_ids=places[:, -1:]).logits)
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-3, atol=1e-3)
