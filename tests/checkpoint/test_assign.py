"""A checkpoint against its configuration: what is missing, too much, of another shape; nothing is loaded by halves."""

import re
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

import gptneo_fast
from gptneo_fast.checkpoint import load_into
from gptneo_fast.checkpoint.assign import canonical
from gptneo_fast.checkpoint.fill import Copier
from gptneo_fast.errors import CheckpointError, GPTNeoFastWarning, InputError
from tests.support.peers import SMALL

Causal, Trunk = gptneo_fast.GPTNeoForCausalLM, gptneo_fast.GPTNeoModel
HEADED = [
    (gptneo_fast.GPTNeoForSequenceClassification, ["score.weight"]),
    (gptneo_fast.GPTNeoForTokenClassification, ["classifier.bias", "classifier.weight"]),
    (gptneo_fast.GPTNeoForQuestionAnswering, ["qa_outputs.bias", "qa_outputs.weight"]),
]


def config(**changes):
    return gptneo_fast.GPTNeoConfig(**SMALL).replace(**changes)


@pytest.fixture
def folder(tmp_path):
    Causal(config()).save_pretrained(tmp_path)
    return tmp_path


def tensors(folder):
    return load_file(folder / "model.safetensors")


def put(folder, values):
    save_file(values, folder / "model.safetensors")


def refused(folder, *words, cls=Causal, **options):
    with pytest.raises(CheckpointError) as caught:
        cls.from_pretrained(folder, **options)
    for word in words:
        assert str(word) in str(caught.value), (word, str(caught.value))


def test_20_missing_tensors_are_listed(folder):
    values = tensors(folder)
    del values["transformer.h.1.ln_1.bias"], values["transformer.wpe.weight"]
    put(folder, values)
    refused(folder, folder, "no tensor for h.1.ln_1.bias, wpe.weight", "does config.json belong to these weights?")


def test_20_a_configuration_of_more_layers_is_told_as_that(folder):
    config(num_layers=5).save_pretrained(folder)
    refused(folder, "no tensor for h.3.", "and 18 more", "num_layers is 5 in config.json, the weights have 3 layers")


def test_21_surplus_tensors_are_listed_and_let_in_where_strict_is_false(folder):
    put(folder, tensors(folder) | {"transformer.h.0.attn.extra": torch.ones(1)})
    refused(folder, "transformer.h.0.attn.extra fit no parameter")
    with pytest.warns(GPTNeoFastWarning, match=r"transformer\.h\.0\.attn\.extra"):
        _, info = Causal.from_pretrained(folder, strict=False, output_loading_info=True)
    assert info["unexpected_keys"] == {"transformer.h.0.attn.extra"}


def test_21_a_configuration_of_fewer_layers_is_told_as_that(folder):
    config(num_layers=2).save_pretrained(folder)
    refused(folder, "transformer.h.2.", "fit no parameter", "num_layers is 2 in config.json, the weights have 3 layers")


def test_21_mask_buffers_and_a_tied_head_are_dropped_without_a_word(folder):
    values = tensors(folder)
    more = {
        "transformer.h.0.attn.attention.bias": torch.ones(1, 1, 640, 640, dtype=torch.uint8),
        "transformer.h.0.attn.attention.masked_bias": torch.tensor(-1e9),
        "lm_head.weight": values["transformer.wte.weight"].clone(),
    }
    put(folder, values | more)
    model, info = Causal.from_pretrained(folder, output_loading_info=True)
    assert info == {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}
    assert model.lm_head.weight is model.transformer.wte.weight
    assert all(torch.equal(p, values[n]) for n, p in model.named_parameters())
    Trunk.from_pretrained(folder)


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("transformer.h.0.attn.attention.bias", None),
        ("h.11.attn.attention.masked_bias", None),
        ("transformer.h.0.attn.attention.out_proj.bias", "h.0.attn.attention.out_proj.bias"),
        ("h.0.mlp.c_fc.bias", "h.0.mlp.c_fc.bias"),
        ("lm_head.weight", "lm_head.weight"),
    ],
)
def test_a_name_with_bias_in_it_is_a_mask_buffer_only_in_full(name, kept):
    assert canonical(name) == kept


@pytest.mark.parametrize(("cls", "head"), HEADED)
def test_21_the_head_of_another_class_is_named_in_one_note(tmp_path, cls, head):
    cls(config()).save_pretrained(tmp_path)
    with pytest.warns(GPTNeoFastWarning) as notes:
        Causal.from_pretrained(tmp_path)
    (note,) = notes
    assert f"{', '.join(head)} belong to another class than GPTNeoForCausalLM" in str(note.message)


@pytest.mark.parametrize(("cls", "head"), HEADED)
@pytest.mark.parametrize("base", [Causal, Trunk])
def test_a_head_that_is_not_there_starts_fresh_with_one_warning_that_names_it(tmp_path, cls, head, base):
    base(config()).save_pretrained(tmp_path)
    with pytest.warns(GPTNeoFastWarning) as notes:
        model, info = cls.from_pretrained(tmp_path, output_loading_info=True)
    (note,) = notes
    assert f"no weights for {', '.join(head)}: freshly initialised" in str(note.message)
    assert sorted(info["missing_keys"]) == head
    for name in head:
        p = model.get_parameter(name)
        assert p.isfinite().all() and (p == 0).all() == name.endswith("bias")


@pytest.mark.parametrize("base", [Causal, Trunk])
def test_the_prefix_of_the_trunk_may_be_there_or_not(tmp_path, base):
    saved = base(config())
    saved.save_pretrained(tmp_path)
    want = {n.removeprefix("transformer."): p for n, p in saved.named_parameters()}
    for cls in (Causal, Trunk):
        for name, p in cls.from_pretrained(tmp_path).named_parameters():
            assert torch.equal(p, want[name.removeprefix("transformer.")]), name


def test_one_parameter_under_two_names_is_refused(folder):
    values = tensors(folder)
    put(folder, values | {"wpe.weight": values["transformer.wpe.weight"] + 1})
    refused(folder, "'wpe.weight'", "'transformer.wpe.weight'", "are one parameter")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 64}, "hidden_size is 32 in the weights and 64 in config.json"),
        ({"vocab_size": 96}, "vocab_size is 97 in the weights and 96 in config.json"),
        ({"max_position_embeddings": 2048}, "max_position_embeddings is 640 in the weights and 2048 in config.json"),
        ({"intermediate_size": 100}, "intermediate_size is 128 in the weights and 100 in config.json"),
    ],
)
def test_22_a_size_that_differs_names_the_field_of_the_configuration(folder, changes, words):
    config(**changes).save_pretrained(folder)
    refused(folder, words, "config.json asks for")


def test_22_a_tensor_of_another_rank_is_named(folder):
    put(folder, tensors(folder) | {"transformer.wpe.weight": torch.ones(640 * 32)})
    refused(folder, "'transformer.wpe.weight' is [20480], config.json asks for [640, 32]")


def test_22_nothing_is_read_from_weights_that_do_not_fit(folder, monkeypatch):
    monkeypatch.setattr(Copier, "fill", lambda *_: pytest.fail("weights were read"))
    config(hidden_size=64).save_pretrained(folder)
    refused(folder)


def test_a_head_of_another_size_is_refused_or_starts_afresh(tmp_path):
    cls = gptneo_fast.GPTNeoForSequenceClassification
    cls(config(num_labels=3)).save_pretrained(tmp_path)
    refused(tmp_path, "num_labels is 3 in the weights and 5", "ignore_mismatched_sizes=True", cls=cls, num_labels=5)
    with pytest.warns(GPTNeoFastWarning, match=r"score\.weight \[3, 32\] and not \[5, 32\]: freshly initialised"):
        model, info = cls.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True, output_loading_info=True)
    assert (
        info["mismatched_keys"] == {("score.weight", (3, 32), (5, 32))}
        and not info["missing_keys"]
        and model.score.weight.shape == (5, 32)
    )
    assert model.score.weight.std() < 0.1


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_23_a_head_unlike_the_embedding_it_is_tied_to_is_refused(folder, dtype):
    values = tensors(folder)
    head = values["transformer.wte.weight"].clone()
    put(folder, values | {"lm_head.weight": head})
    Causal.from_pretrained(folder, dtype=dtype)
    head[-1, -1] += 1
    put(folder, values | {"lm_head.weight": head})
    refused(
        folder, "lm_head.weight [97, 32] differs from wte.weight [97, 32]", "tie_word_embeddings", "strict=False", dtype=dtype
    )
    with pytest.warns(GPTNeoFastWarning, match=r"wte\.weight is used"):
        model = Causal.from_pretrained(folder, strict=False)
    assert torch.equal(model.lm_head.weight, values["transformer.wte.weight"])
    put(folder, values | {"lm_head.weight": head[:50].clone()})
    refused(folder, "lm_head.weight [50, 32] differs")
    loaded = None
    put(folder, values | {"lm_head.weight": head})
    config(tie_word_embeddings=False).save_pretrained(folder)
    loaded = Causal.from_pretrained(folder)
    assert torch.equal(loaded.lm_head.weight, head)


def test_all_faults_of_fit_are_told_at_once(folder):
    values = tensors(folder)
    del values["transformer.ln_f.bias"]
    values["transformer.wpe.weight"] = torch.ones(641, 32)
    values["transformer.h.0.ln_1.weight"] = torch.ones(32, dtype=torch.int64)
    values["mystery"] = torch.ones(1)
    put(folder, values)
    refused(folder, "ln_f.bias", "max_position_embeddings is 641", "'transformer.h.0.ln_1.weight' is int64", "mystery fit no")


def test_a_model_whose_loading_fails_keeps_its_weights(folder):
    from gptneo_fast.checkpoint.safetensors import stored_in
    from gptneo_fast.checkpoint.weight_file import WeightFile

    values = tensors(folder)
    values["transformer.wte.weight"][0, 0] = float("nan")
    put(folder, values)
    model = Causal(config())
    before = {n: p.clone() for n, p in model.named_parameters()}
    file = WeightFile(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="holds nan"):
        load_into(model, stored_in(file), device=torch.device("cpu"), where="here")
    file.close()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert model.lm_head.weight is model.transformer.wte.weight


def test_a_configuration_that_is_handed_in_stays_as_it_is(folder):
    given = config()
    before = given.to_dict()
    model = Causal.from_pretrained(folder, config=given, dtype="bfloat16")
    assert given.to_dict() == before and model.config.dtype is torch.bfloat16


def test_saving_again_removes_the_shards_or_the_single_file_of_before(tmp_path):
    first, second = Causal(config()), Causal(config(num_layers=2))
    first.save_pretrained(tmp_path)
    second.save_pretrained(tmp_path, max_shard_size="30KB")
    names = sorted(p.name for p in tmp_path.iterdir())
    assert "model.safetensors" not in names and "model.safetensors.index.json" in names
    loaded = Causal.from_pretrained(tmp_path)
    assert all(torch.equal(p, loaded.get_parameter(n)) for n, p in second.named_parameters())
    first.save_pretrained(tmp_path)
    assert [p.name for p in tmp_path.iterdir() if re.match(r"model.*safetensors", p.name)] == ["model.safetensors"]
    loaded = Causal.from_pretrained(tmp_path)
    assert all(torch.equal(p, loaded.get_parameter(n)) for n, p in first.named_parameters())


def test_33_a_save_that_fails_leaves_the_old_checkpoint(folder, monkeypatch):
    import huggingface_hub

    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "save_torch_state_dict", full)
    with pytest.raises(CheckpointError, match=f"cannot be written to {folder}: No space left on device; free some space"):
        Causal(config(num_layers=2)).save_pretrained(folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    with pytest.raises(CheckpointError, match="is a file; give a folder"):
        Causal(config()).save_pretrained(folder / "config.json")
    with pytest.raises(CheckpointError, match="cannot be written to /proc/nowhere"):
        Causal(config()).save_pretrained("/proc/nowhere")


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_state_dict_and_a_configuration_make_a_model_as_in_transformers(folder, dtype):
    transformers = pytest.importorskip("transformers")
    made = Causal.from_pretrained(folder)
    weights = dict(made.state_dict()) | {"transformer.wpe.weight": made.transformer.wpe.weight.t().clone().t()}  # strided
    ours = Causal.from_pretrained(None, config=made.config, state_dict=weights, dtype=dtype)
    theirs = transformers.GPTNeoForCausalLM.from_pretrained(
        None, config=transformers.GPTNeoConfig.from_dict(made.config.to_dict()), state_dict=weights, dtype=dtype
    )
    assert not ours.training and ours.dtype is theirs.dtype
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.get_parameter(name), value), name
    ours.transformer.ln_f.weight.data.zero_()
    assert made.transformer.ln_f.weight.abs().sum() > 0  # a copy
    trunk = {name.removeprefix("transformer."): value for name, value in weights.items() if name != "lm_head.weight"}
    with pytest.warns(GPTNeoFastWarning, match=r"score\.weight: freshly initialised"):
        _, info = gptneo_fast.GPTNeoForSequenceClassification.from_pretrained(
            None, config=made.config, state_dict=trunk, output_loading_info=True
        )
    assert info["missing_keys"] == {"score.weight"} and not info["unexpected_keys"]


def test_weights_come_from_one_place_and_fit(folder):
    made = Causal.from_pretrained(folder)
    weights = made.state_dict()
    for name, options, words in [
        (None, {}, "the model's name is None and config"),
        (None, {"config": made.config}, "the model's name is None and state_dict"),
        (None, {"state_dict": weights}, "the model's name is None and config"),
        (folder, {"state_dict": weights}, "give None in place of the one"),
        (None, {"config": made.config, "state_dict": 5}, "state_dict is 5; give a dict"),
        (None, {"config": made.config, "state_dict": {"a": 5}}, "state_dict is {'a': 5}; give a dict"),
    ]:
        with pytest.raises(InputError, match=words):
            Causal.from_pretrained(name, **options)
    for changes, words in [
        ({"x": torch.ones(2)}, "state_dict: x fit no parameter"),
        ({"transformer.ln_f.bias": torch.full((32,), float("nan"))}, "state_dict: tensor 'transformer.ln_f.bias' holds nan"),
        ({"transformer.ln_f.bias": torch.ones(32, dtype=torch.long)}, "is int64"),
        ({"transformer.ln_f.bias": torch.ones(3)}, "'transformer.ln_f.bias' is .3., config.json asks for"),
    ]:
        with pytest.raises(CheckpointError, match=words):
            Causal.from_pretrained(None, config=made.config, state_dict=weights | changes)


@pytest.mark.parametrize("cls", ["GPTNeoForTokenClassification", "GPTNeoForCausalLM", "GPTNeoModel"])
@pytest.mark.parametrize(
    "change", [{}, {"num_labels": 5}, {"vocab_size": 50}, {"max_position_embeddings": 99}, {"hidden_size": 16}]
)
@pytest.mark.parametrize("tied", [True, False])
def test_reports_of_sizes_that_are_ignored_are_transformers(tmp_path, cls, change, tied):
    transformers = pytest.importorskip("transformers")
    getattr(gptneo_fast, cls)(config(num_labels=3, tie_word_embeddings=tied)).save_pretrained(tmp_path)
    found = []
    for library in (transformers, gptneo_fast):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model, info = getattr(library, cls).from_pretrained(
                tmp_path, ignore_mismatched_sizes=True, output_loading_info=True, **change
            )
        assert all(torch.isfinite(p).all() and p.abs().max() < 2 for p in model.parameters())
        found.append(
            (info["missing_keys"], info["unexpected_keys"], {(k, *map(tuple, s)) for k, *s in info["mismatched_keys"]})
        )
    assert found[0] == found[1]
    named = " ".join(str(w.message) for w in caught if issubclass(w.category, GPTNeoFastWarning))
    assert bool(found[1][2]) == ("freshly initialised" in named)


def test_untied_weights_are_saved_and_loaded(tmp_path):
    transformers = pytest.importorskip("transformers")
    made = Causal(config(tie_word_embeddings=False))
    made.save_pretrained(tmp_path)
    for library in (gptneo_fast, transformers):
        loaded, info = library.GPTNeoForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"] and not loaded.config.tie_word_embeddings
        assert torch.equal(loaded.lm_head.weight, made.lm_head.weight)
        assert torch.equal(loaded.transformer.wte.weight, made.transformer.wte.weight)
