"""Layers that other libraries quantise: logits, cached steps and tokens as of transformers' model with the same layers."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.ao.quantization import quantize_dynamic

from tests.support.peers import peers

pytest.importorskip("transformers")

IDS = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[1, :4] = 0


def replaced(model, make, skip=()):
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and not any(part in name for part in skip):
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, make(module))
    return model


def dynamic_int8(model):
    return quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def dynamic_half(model):
    return quantize_dynamic(model, {nn.Linear}, dtype=torch.float16)


def torchao_by(name, **options):
    def quantise(model):
        torchao = pytest.importorskip("torchao.quantization")
        torchao.quantize_(
            model, getattr(torchao, name)(**options), filter_fn=lambda m, fqn: type(m) is nn.Linear and "lm_head" not in fqn
        )
        return model

    return quantise


def bitsandbytes_8bit(model):
    bnb = pytest.importorskip("bitsandbytes")

    def make(linear):
        made = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, linear.bias is not None, has_fp16_weights=False)
        made.load_state_dict(linear.state_dict())
        return made.to("cpu")

    return replaced(model, make, skip=("lm_head",))


def bitsandbytes_4bit(kind):
    def quantise(model):
        bnb = pytest.importorskip("bitsandbytes")

        def make(linear):
            made = bnb.nn.Linear4bit(
                linear.in_features, linear.out_features, linear.bias is not None, compute_dtype=torch.float32, quant_type=kind
            )
            made.load_state_dict(linear.state_dict())
            return made.to("cpu")

        return replaced(model, make, skip=("lm_head",))

    return quantise


WAYS = {
    "torch.ao dynamic int8": dynamic_int8,
    "torch.ao dynamic float16": dynamic_half,
    "torchao int8 weights": torchao_by("Int8WeightOnlyConfig"),
    "torchao int8": torchao_by("Int8DynamicActivationInt8WeightConfig"),
    "torchao int4 in groups": torchao_by("IntxWeightOnlyConfig", weight_dtype=torch.int4),
    "bitsandbytes int8": bitsandbytes_8bit,
    "bitsandbytes fp4": bitsandbytes_4bit("fp4"),
    "bitsandbytes nf4": bitsandbytes_4bit("nf4"),
}


def quantised(way, **changes):
    theirs, ours = peers(hidden_size=64, num_heads=4, scale=8.0, tie_word_embeddings=False, **changes)
    plain = theirs(IDS).logits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs, ours = WAYS[way](theirs), WAYS[way](ours)
    assert not torch.equal(theirs(IDS).logits, plain)
    return theirs, ours


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_forward_steps_and_tokens_are_those_of_transformers(way):
    theirs, ours = quantised(way)
    near = {"rtol": 1e-3, "atol": 1e-3}
    torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, **near)
    mask = torch.ones_like(IDS) if way == "torch.ao dynamic int8" else MASK  # its scale is that of padding, too, which differs
    tokens = mask.bool()
    torch.testing.assert_close(
        ours(IDS, attention_mask=mask).logits[tokens], theirs(IDS, attention_mask=mask).logits[tokens], **near
    )
    caches = [None, None]
    for t in range(12):
        outs = [m(IDS[:, t : t + 1], past_key_values=c, use_cache=True) for m, c in zip((theirs, ours), caches, strict=True)]
        torch.testing.assert_close(outs[1].logits, outs[0].logits, **near)
        caches = [out.past_key_values for out in outs]
    for options in ({}, {"num_beams": 2}, {"use_cache": False}):
        how = {
            "max_new_tokens": 12,
            "do_sample": False,
            "eos_token_id": None,
            "pad_token_id": 0,
            "attention_mask": MASK,
        } | options
        assert torch.equal(ours.generate(IDS, **how), theirs.generate(IDS, **how))


@pytest.mark.parametrize("way", [w for w in WAYS if "torch" in w])
@torch.no_grad()
def test_a_quantised_state_is_loaded_again(way, tmp_path):
    _, ours = quantised(way)
    torch.save(ours.state_dict(), tmp_path / "state.pt")
    _, again = quantised(way)
    with torch.no_grad():
        again.transformer.wte.weight.zero_()
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=False), assign="torchao" in way)
    assert torch.equal(again(IDS).logits, ours(IDS).logits)
    assert torch.equal(copy.deepcopy(ours)(IDS).logits, ours(IDS).logits)


@pytest.mark.parametrize("way", ["bitsandbytes int8", "bitsandbytes nf4"])
def test_adapters_train_over_quantised_weights(way):
    peft = pytest.importorskip("peft")
    found = []
    for model in quantised(way):
        torch.manual_seed(0)
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        lora = peft.LoraConfig(r=4, target_modules=["q_proj", "c_fc"], task_type="CAUSAL_LM", init_lora_weights=False)
        model = peft.get_peft_model(model, lora)
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        found.append((loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-4, atol=1e-4)
    assert found[1][1].keys() == found[0][1].keys() and len(found[0][1]) == 12
    for name, grad in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], grad, rtol=1e-2, atol=1e-3 * float(grad.abs().max()))


@torch.no_grad()
def test_a_head_that_was_tied_is_quantised_beside_its_embedding():
    models = [dynamic_int8(m) for m in peers(hidden_size=64, num_heads=4, scale=8.0)]
    theirs, ours = models
    assert type(ours.lm_head) is type(theirs.lm_head) is not nn.Linear and type(ours.transformer.wte) is nn.Embedding
    torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, rtol=1e-3, atol=1e-3)
    how = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    assert torch.equal(ours.generate(IDS, **how), theirs.generate(IDS, **how))
