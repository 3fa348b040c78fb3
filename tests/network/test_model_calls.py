"""What a transformers script does with a model besides calling it: sizes, dtypes, copies, embeddings, saving, gradients."""

import copy
import json
import pickle

import pytest
import torch

import gptneo_fast
from gptneo_fast.errors import InputError, UnknownOptionError
from tests.support.peers import CLASSES, SMALL, peers

transformers = pytest.importorskip("transformers")
IDS = torch.tensor([[5, 9, 30, 4, 96, 17], [3, 3, 8, 44, 60, 12]])


@pytest.mark.parametrize("cls", CLASSES)
def test_parameters_are_counted_and_named_as_in_transformers(cls):
    theirs, ours = peers(cls)
    for options in ({}, {"only_trainable": True}, {"exclude_embeddings": True}):
        assert ours.num_parameters(**options) == theirs.num_parameters(**options)
    for model in (theirs, ours):
        model.get_input_embeddings().weight.requires_grad_(False)
    assert ours.num_parameters(only_trainable=True) == theirs.num_parameters(only_trainable=True) < ours.num_parameters()
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert ours.base_model_prefix == theirs.base_model_prefix and ours.can_generate() == theirs.can_generate()
    assert (ours.device, ours.dtype) == (theirs.device, theirs.dtype)


@pytest.mark.parametrize("cls", CLASSES)
def test_transformers_loads_what_every_class_saves_and_the_other_way(cls, tmp_path):
    theirs, ours = peers(cls, num_labels=3, pad_token_id=0)
    ours.save_pretrained(tmp_path / "ours", max_shard_size="30KB")
    theirs.save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        expected = ours(IDS)[0]
        for folder in ("ours", "theirs"):
            loaded = getattr(transformers, cls).from_pretrained(tmp_path / folder, attn_implementation="eager")
            assert loaded.config.num_labels == 3 and loaded.config.attention_layers == list(ours.config.attention_layers)
            torch.testing.assert_close(loaded(IDS)[0], expected, rtol=1e-5, atol=1e-5)
            again = getattr(gptneo_fast, cls).from_pretrained(tmp_path / folder)
            assert torch.equal(again(IDS)[0], expected)
            assert all(torch.equal(v, ours.state_dict()[k]) for k, v in loaded.state_dict().items())
    auto = {"GPTNeoModel": "AutoModel"}.get(cls, cls.replace("GPTNeo", "AutoModel"))
    assert type(getattr(transformers, auto).from_pretrained(tmp_path / "ours")).__name__ == cls
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["architectures"] == [cls]


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_is_whole_and_its_own(cls, copied):
    _, ours = peers(cls, pad_token_id=0)
    other = copied(ours)
    expected = ours(IDS)[0]
    assert torch.equal(other(IDS)[0], expected)
    head = other.get_output_embeddings()
    assert head is None or head.weight is other.get_input_embeddings().weight  # still tied
    with torch.no_grad():
        other.get_input_embeddings().weight.zero_()
    other.config.pad_token_id = 5
    assert torch.equal(ours(IDS)[0], expected) and ours.config.pad_token_id == 0
    if ours.can_generate():
        assert torch.equal(copied(ours).generate(IDS, max_new_tokens=4), ours.generate(IDS, max_new_tokens=4))


@pytest.mark.parametrize(
    ("change", "dtype"), [("half", torch.float16), ("bfloat16", torch.bfloat16), ("double", torch.float64)]
)
def test_other_dtypes_by_method_keep_the_tie_and_are_what_to_gives(change, dtype):
    _, ours = peers()
    model, other = getattr(copy.deepcopy(ours), change)(), copy.deepcopy(ours).to(dtype)
    assert model.dtype == dtype and model.lm_head.weight is model.transformer.wte.weight
    logits = model(IDS).logits
    assert logits.dtype == dtype and torch.equal(logits, other(IDS).logits) and torch.isfinite(logits).all()
    assert torch.equal(model.generate(IDS, max_new_tokens=5), other.generate(IDS, max_new_tokens=5))
    exact = ours.double()(IDS).logits if dtype == torch.float64 else None
    assert exact is None or torch.equal(logits, exact)
    assert model.float().dtype == torch.float32 and model.lm_head.weight is model.transformer.wte.weight


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("cls", CLASSES)
def test_embeddings_are_resized_as_in_transformers(cls, tie):
    theirs, ours = peers(cls, tie_word_embeddings=tie, pad_token_id=0)
    before = ours(IDS)[0]
    for size, multiple, expected in ((100, None, 100), (101, 8, 104), (97, None, 97)):
        for model in (theirs, ours):
            wte = model.resize_token_embeddings(size, pad_to_multiple_of=multiple, mean_resizing=False)
            assert wte.num_embeddings == wte.weight.shape[0] == model.config.vocab_size == expected
        assert ours.num_parameters() == theirs.num_parameters()
        assert [tuple(p.shape) for p in ours.parameters()] == [tuple(p.shape) for p in theirs.parameters()]
        head = ours.get_output_embeddings()
        assert head is None or ((head.weight is ours.get_input_embeddings().weight) == tie and head.out_features == expected)
        after = ours(IDS)[0]
        assert torch.equal(after[..., : before.shape[-1]], before) if "Causal" in cls else torch.equal(after, before)
    assert ours.resize_token_embeddings() is ours.get_input_embeddings()
    for size in (0, -3, 2.5, True):
        with pytest.raises(InputError, match="new_num_tokens"):
            ours.resize_token_embeddings(size)


def test_new_rows_start_at_the_mean_of_the_old():
    _, ours = peers()
    mean = ours.get_input_embeddings().weight.mean(0)
    new = ours.resize_token_embeddings(103).weight[97:]
    spread = ours.get_input_embeddings().weight[:97].std(0)
    assert ((new - mean).abs() <= 0.1 * spread).all()
    ours.generate(torch.tensor([[101, 102]]), max_new_tokens=3)  # new ids are ids


def test_embeddings_can_be_put_in_the_models_place():
    _, ours = peers()
    other = torch.nn.Embedding(97, SMALL["hidden_size"])
    ours.set_input_embeddings(other)
    assert ours.lm_head.weight is not other.weight  # as in transformers
    ours.tie_weights()
    assert ours.get_input_embeddings() is other and ours.lm_head.weight is other.weight
    _, base = peers("GPTNeoModel")
    base.set_input_embeddings(other)
    assert base.get_input_embeddings() is other


@pytest.mark.parametrize("cls", CLASSES[1:])
def test_gradient_checkpointing_changes_no_gradient_of_any_class(cls):
    _, ours = peers(cls, pad_token_id=0, num_labels=3)
    labels = {
        "GPTNeoForCausalLM": {"labels": IDS},
        "GPTNeoForSequenceClassification": {"labels": torch.tensor([0, 2])},
        "GPTNeoForTokenClassification": {"labels": IDS % 3},
        "GPTNeoForQuestionAnswering": {"start_positions": torch.tensor([0, 1]), "end_positions": torch.tensor([2, 5])},
    }[cls]
    ours.train()
    grads, dropout = [], [m for m in ours.modules() if isinstance(m, torch.nn.Dropout)]
    assert dropout or cls != "GPTNeoForTokenClassification"
    for change in ("disable", "enable", "disable"):
        getattr(ours, f"gradient_checkpointing_{change}")()
        assert ours.is_gradient_checkpointing == (change == "enable")
        ours.zero_grad()
        torch.manual_seed(1)
        ours(IDS, use_cache=False, **labels).loss.backward()
        grads.append([p.grad.clone() for p in ours.parameters()])
    for a, b, c in zip(*grads, strict=True):
        torch.testing.assert_close(b, a)
        assert torch.equal(a, c)
    with pytest.raises(UnknownOptionError, match="use_reentrent"):
        ours.gradient_checkpointing_enable({"use_reentrent": True})


@pytest.mark.parametrize("cls", CLASSES)
def test_attentions_are_weights_over_what_a_query_sees(cls):
    theirs, ours = peers(cls, pad_token_id=0)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    a, b = (m(IDS, attention_mask=mask, output_attentions=True).attentions for m in (theirs, ours))
    assert len(b) == SMALL["num_layers"]
    for layer, (x, y) in enumerate(zip(a, b, strict=True)):
        assert y.shape == (2, SMALL["num_heads"], 6, 6)
        rows = mask.bool()
        torch.testing.assert_close(y.transpose(1, 2)[rows], x.transpose(1, 2)[rows], rtol=1e-5, atol=1e-6)
        sums = y.sum(-1).transpose(1, 2)[rows]
        torch.testing.assert_close(sums, torch.ones_like(sums))
        assert (y[..., torch.ones(6, 6).triu(1).bool()] == 0).all(), layer
        assert (y[0, :, 2:, :2] == 0).all(), layer
    ours.config.output_attentions = True
    assert ours(IDS).attentions is not None
