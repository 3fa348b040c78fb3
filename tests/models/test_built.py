"""What is set on the configuration of a model that is built, and names of transformers' models that scripts ask for."""

import copy
import json
import pickle

import pytest
import torch

import gptneo_fast
from gptneo_fast.errors import CheckpointError, ConfigError, GPTNeoFastWarning, InputError
from tests.support.peers import SMALL, peers

transformers = pytest.importorskip("transformers")
IDS = torch.arange(3, 23)[None]
TWO = SMALL | {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 4}


def fresh(**changes):
    torch.manual_seed(0)
    return gptneo_fast.GPTNeoForCausalLM(gptneo_fast.GPTNeoConfig(**(TWO | changes))).eval()


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("attention_layers", ["global", "global"], "says that layer 1 is global, and the block was built local, of window 4"),
        ("attention_types", [[["local"], 2]], "says that layer 0 is local, of window 4, and the block was built global"),
        ("attention_layers", ["global"], "has 1 layers, and the model 2 blocks"),
    ],
)
def test_layers_of_another_kind_are_refused_at_the_next_use_and_may_be_set_back(name, value, words):
    model = fresh()
    before, text = model(IDS).logits, model.generate(IDS, max_new_tokens=5)
    setattr(model.config, name, value)
    for use in (model, model.transformer, lambda ids: model.generate(ids, max_new_tokens=2)):
        with pytest.raises(ConfigError, match=f"{words}.* config.replace"):
            use(IDS)
    model.config.attention_layers = ["global", "local"]
    assert torch.equal(model(IDS).logits, before) and torch.equal(model.generate(IDS, max_new_tokens=5), text)


@pytest.mark.parametrize(
    "head", ["GPTNeoForSequenceClassification", "GPTNeoForTokenClassification", "GPTNeoForQuestionAnswering"]
)
def test_heads_refuse_them_too(head):
    model = getattr(gptneo_fast, head)(gptneo_fast.GPTNeoConfig(**TWO, pad_token_id=0)).eval()
    model.config.attention_types = [[["global"], 2]]
    with pytest.raises(ConfigError, match="layer 1 is global"):
        model(IDS)


def test_layers_set_between_two_steps_are_refused_at_the_second():
    model, shown = fresh(), []

    class Setting:
        def put(self, ids):
            shown.append(ids)
            if len(shown) == 3:  # the prompt and two tokens
                model.config.attention_layers = ["local", "local"]

        def end(self):
            pytest.fail("it went on")

    with pytest.raises(ConfigError, match="layer 0 is local, of window 4"):
        model.generate(IDS, max_new_tokens=8, streamer=Setting())
    assert len(shown) <= 4


def test_a_whole_configuration_set_on_a_trunk_is_compared_with_its_blocks():
    model = fresh()
    model.transformer.config = model.config.replace(window_size=3)
    with pytest.raises(ConfigError, match="layer 1 is local, of window 3, and the block was built local, of window 4"):
        model(IDS)
    model.transformer.config = model.config.replace(bos_token_id=3)
    assert torch.equal(model(IDS).logits, fresh()(IDS).logits)


def test_a_model_may_lose_layers_with_its_configuration(tmp_path):
    model = fresh(num_layers=4, attention_types=[[["global", "local"], 2]])
    del model.transformer.h[1:3]
    for i, block in enumerate(model.transformer.h):
        block.attn.layer_id = block.attn.attention.layer_id = i
    model.config.num_layers, model.config.attention_layers = 2, ["global", "local"]
    want = model(IDS).logits
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(gptneo_fast.GPTNeoForCausalLM.from_pretrained(tmp_path)(IDS).logits, want)


def test_copies_know_their_layers():
    model = fresh()
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(IDS).logits, model(IDS).logits)
        copied.config.attention_layers = ["local", "local"]
        with pytest.raises(ConfigError, match="layer 0 is local, of window 4"):
            copied(IDS)
    model(IDS)


def test_a_configuration_of_old_that_asks_for_checkpointing_has_it_once(tmp_path):
    for of in (transformers, gptneo_fast):
        config = of.GPTNeoConfig(**TWO, gradient_checkpointing=True)
        for cls in ("GPTNeoModel", "GPTNeoForCausalLM", "GPTNeoForTokenClassification"):
            model = getattr(of, cls)(copy.deepcopy(config))
            assert model.is_gradient_checkpointing and not hasattr(model.config, "gradient_checkpointing")
    fresh().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    for said in (True, False):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"gradient_checkpointing": said}))
        loaded = gptneo_fast.GPTNeoForCausalLM.from_pretrained(tmp_path)
        assert loaded.is_gradient_checkpointing is said
        loaded.train()(IDS, labels=IDS, use_cache=False).loss.backward()
        assert loaded.transformer.wte.weight.grad is not None


def test_attention_kernels_may_be_named_on_a_built_model():
    theirs, ours = peers()
    want = ours(IDS).logits
    for name in ("eager", {"": "eager"}):
        theirs.set_attn_implementation(name)
        ours.set_attn_implementation(name)
    theirs.set_attn_implementation("sdpa")  # a warning of its log
    with pytest.warns(GPTNeoFastWarning, match="'sdpa'.* changes nothing"):
        ours.set_attn_implementation("sdpa")
    assert theirs.config._attn_implementation == ours.config._attn_implementation == "eager"
    assert torch.equal(ours(IDS).logits, want)
    for other in ("flash_attention_2", 5, {"": "sdpb"}):
        with pytest.raises(InputError, match=r"attn_implementation .* is not offered"):
            ours.set_attn_implementation(other)


def test_attributes_are_transformers():
    for theirs, ours in (peers(), peers("GPTNeoModel"), peers("GPTNeoForQuestionAnswering")):
        assert ours.base_model.embed_dim == theirs.base_model.embed_dim == 32
        attention = [m.h[0].attn.attention for m in (theirs.base_model, ours.base_model)]
        assert attention[0].is_causal is attention[1].is_causal is True
        assert ours.get_decoder() is ours.base_model and theirs.get_decoder() is theirs.base_model
        for model in (theirs, ours):
            assert not hasattr(model.base_model, "vocab_size")
            model.resize_token_embeddings(103)
            assert model.vocab_size == model.config.vocab_size == 103


def test_labels_of_a_batch_for_training_have_no_say_in_generate():
    theirs, ours = peers(pad_token_id=0)
    want = theirs.generate(IDS, labels=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4, do_sample=False)
    assert torch.equal(ours.generate(IDS, labels=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4), want)


def test_weights_of_another_size_are_a_runtime_error_as_in_transformers(tmp_path):
    fresh().save_pretrained(tmp_path)
    for of in (transformers, gptneo_fast):
        with pytest.raises(RuntimeError):
            of.GPTNeoForCausalLM.from_pretrained(tmp_path, vocab_size=50)
    with pytest.raises(CheckpointError, match=r"vocab_size is 97 in the weights and 50 in config\.json") as caught:
        gptneo_fast.GPTNeoForCausalLM.from_pretrained(tmp_path, vocab_size=50)
    assert isinstance(caught.value, ValueError)
