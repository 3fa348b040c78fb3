"""Modules called alone and by hand are those of transformers; a cache knows what attention it was made for."""

import pytest
import torch
from torch import nn

from gptneo_fast.errors import InputError
from tests.support.peers import peers
from tests.support.touching import IDS, LAYERS, close

pytest.importorskip("transformers")


@torch.no_grad()
def test_modules_called_alone_are_those_of_transformers():
    theirs, ours = peers(**LAYERS)
    x = torch.randn(2, 11, 32)
    mask = torch.zeros(2, 1, 11, 11).masked_fill(torch.rand(2, 1, 11, 11) < 0.3, torch.finfo(torch.float32).min)
    mask[..., range(11), range(11)] = 0
    for a, b in zip(ours.transformer.h, theirs.transformer.h, strict=True):
        close(a.mlp(x), b.mlp(x))
        for options in ({}, {"attention_mask": mask}):
            for one, other in ((a, b), (a.attn, b.attn), (a.attn.attention, b.attn.attention)):
                for got, want in zip(one(x, **options), other(x, **options), strict=True):
                    close(got, want)


@torch.no_grad()
def test_blocks_called_by_hand_fill_a_cache_as_the_model_does():
    theirs, ours = peers(**LAYERS)
    x = torch.randn(2, 23, 32)

    def run(model, past):
        out = []
        for begin, end in ((0, 9), (9, 10), (10, 17), *((i, i + 1) for i in range(17, 23))):
            hidden = x[:, begin:end]
            for block in model.transformer.h:
                hidden = block(hidden, layer_past=past, use_cache=True)[0]
            out.append(hidden)
        return torch.cat(out, 1), past.get_seq_length()

    import transformers

    got, seen = run(ours, ours.transformer.new_cache(2))
    want, length = run(theirs, transformers.DynamicCache())
    assert seen == length == 23
    close(got, want)


@torch.no_grad()
def test_a_cache_knows_what_attention_it_was_made_for():
    _, ours = peers(**LAYERS)
    past = ours(IDS).past_key_values
    ours.transformer.h[1].attn.attention.forward = ours.transformer.h[1].attn.attention.forward
    from gptneo_fast.errors import CacheError

    with pytest.raises(CacheError, match="windows"):
        ours(IDS[:, :1], past_key_values=past)


@torch.no_grad()
def test_an_embedding_with_other_rows_than_the_configuration_says():
    """More rows are used; ids beyond fewer are refused, and no kernel reads past them."""
    for rows, ids in ((120, torch.tensor([[5, 110]])), (40, torch.tensor([[5, 39]]))):
        theirs, ours = peers(**LAYERS)
        for model in (theirs, ours):
            torch.manual_seed(0)
            model.set_input_embeddings(nn.Embedding(rows, 32))
        assert not ours.looked(anew=True).embeddings
        close(ours(ids).logits, theirs(ids).logits)
        with pytest.raises(InputError, match=f"it must be from 0 to {rows - 1}"):
            ours(ids + rows)
