"""What counts as a touch, and that nothing does where there is none."""

import copy

import pytest
from torch import nn

from gptneo_fast.network import fused, touch
from gptneo_fast.network.modules import GPTNeoBlock
from tests.support.peers import peers
from tests.support.touching import LAYERS

pytest.importorskip("transformers")


def test_each_kind_of_touch_is_seen_and_none_where_there_is_none():
    _, ours = peers(**LAYERS)
    block = ours.transformer.h[0]
    assert fused.is_untouched(block) and ours.looked(anew=True)
    for name, module in block.named_modules():
        module.forward = module.forward
        assert not fused.is_untouched(block), name
        del module.forward
        for register in ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"):
            handle = getattr(module, register)(lambda *args: None)
            assert not fused.is_untouched(block), (name, register)
            handle.remove()
        assert fused.is_untouched(block), name
    for name, parameter in block.named_parameters():
        parent, _, last = name.rpartition(".")
        owner = block.get_submodule(parent)

        class Weight(nn.Parameter):
            pass

        setattr(owner, last, Weight(parameter.detach()))
        assert not fused.is_untouched(block), name
        setattr(owner, last, nn.Parameter(parameter.detach().double()))
        assert not fused.is_untouched(block), name
        setattr(owner, last, parameter)
    assert fused.is_untouched(block)
    block.attn.attention._attn = block.attn.attention._attn
    assert not fused.is_untouched(block)


def test_what_is_set_between_two_looks_changes_the_stamp():
    _, ours = peers(**LAYERS)
    block = ours.transformer.h[0]
    for change in (
        lambda: block.mlp.c_fc.register_forward_hook(print),
        lambda: setattr(block.mlp, "c_fc", nn.Identity()),
        lambda: setattr(block, "forward", print),
        lambda: ours.train(),
        lambda: setattr(ours, "lm_head", nn.Identity()),
        lambda: delattr(block, "forward"),
    ):
        before = touch.stamp()
        change()
        assert touch.stamp() != before


def test_a_deep_copy_and_a_pickle_are_untouched_and_their_own():
    import pickle

    _, ours = peers(**LAYERS)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert other.looked(anew=True)
        other.transformer.h[0].register_forward_hook(lambda module, args, out: None)
        assert not other.looked() and ours.looked()
    assert type(ours.transformer.h[0]) is GPTNeoBlock
