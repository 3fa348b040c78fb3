"""Tokenizer files: both forms, added tokens wherever they stand, saving."""

import json
import os
import shutil

import pytest
import torch
from tokenizers import AddedToken

import gptneo_fast
from gptneo_fast.demo import FOLDER
from gptneo_fast.errors import InputError, TokenizerError
from tests.support.tokenizer_folders import FORMS, N, folder_of

transformers = pytest.importorskip("transformers")
TEXT = " Hello<|endoftext|> <pad>wörld <a> <b>x<|image|> [SEP]  done"


def equal(theirs, ours, text=TEXT):
    for options in ({}, {"split_special_tokens": True}):
        assert ours(text, **options).input_ids == theirs(text, **options).input_ids
    ids = ours(text).input_ids
    assert ours.tokenize(text) == theirs.tokenize(text)
    for skip in (False, True):
        assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert ours.get_vocab() == theirs.get_vocab() and len(ours) == len(theirs) and ours.vocab_size == theirs.vocab_size
    assert ours.all_special_tokens == theirs.all_special_tokens and ours.all_special_ids == theirs.all_special_ids
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert ours.added_tokens_encoder == theirs.added_tokens_encoder == ours.get_added_vocab()
    assert str(ours.added_tokens_decoder) == str(theirs.added_tokens_decoder)
    assert ours.extra_special_tokens == theirs.extra_special_tokens
    assert ours.extra_special_tokens_ids == theirs.extra_special_tokens_ids
    for name in (
        "model_max_length",
        "padding_side",
        "truncation_side",
        "pad_token",
        "pad_token_id",
        "sep_token",
        "cls_token_id",
    ):
        assert getattr(ours, name) == getattr(theirs, name), name
    stream = ours.stream()
    assert "".join([*map(stream.put, ids), stream.end()]) == theirs.decode(ids, skip_special_tokens=True)


def loaded(folder, **options):
    theirs = transformers.GPT2Tokenizer.from_pretrained(folder, **options)
    ours = gptneo_fast.GPT2Tokenizer.from_pretrained(folder, **options)
    equal(theirs, ours)
    return theirs, ours


TOKEN = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
OLD = {"__type": "AddedToken", "content": "<|endoftext|>", **{k: v for k, v in TOKEN.items() if k != "special"}}
BESIDE = {
    "nothing": {},
    "a config of today": dict(
        tokenizer_config={
            "tokenizer_class": "GPT2Tokenizer",
            "model_max_length": 2048,
            "pad_token": "<pad>",
            "padding_side": "left",
        }
    ),
    "a config of 2021": dict(
        tokenizer_config={
            "errors": "replace",
            "unk_token": OLD,
            "bos_token": OLD,
            "eos_token": OLD,
            "add_prefix_space": False,
            "model_max_length": 2048,
            "special_tokens_map_file": None,
            "name_or_path": "gpt2",
            "tokenizer_class": "GPT2Tokenizer",
        },
        special_tokens_map={
            k: {n: v for n, v in OLD.items() if n != "__type"} for k in ("bos_token", "eos_token", "unk_token")
        },
    ),
    "a special_tokens_map": dict(
        tokenizer_config={"pad_token": "<a>"},
        special_tokens_map={"pad_token": "<pad>", "sep_token": {"content": "[SEP]", **TOKEN | {"lstrip": True}}},
    ),
    "added_tokens": dict(
        added_tokens={"<a>": N, "<pad>": N + 1, "<b>": N + 2}, special_tokens_map={"pad_token": "<pad>", "eos_token": "<b>"}
    ),
    "an added_tokens_decoder": dict(
        tokenizer_config={
            "added_tokens_decoder": {
                "0": {"content": "<|endoftext|>", **TOKEN},
                str(N): {"content": "<pad>", **TOKEN | {"rstrip": True}},
                str(N + 1): {"content": "<a>", **TOKEN | {"special": False}},
            },
            "pad_token": "<pad>",
        },
        special_tokens_map={"pad_token": "<never read>"},
    ),
    "extra special tokens": dict(tokenizer_config={"additional_special_tokens": ["<a>", "<b>"], "truncation_side": "left"}),
    "a token of a name of its own": dict(
        tokenizer_config={"image_token": "<|image|>", "extra_special_tokens": {"ab_token": "<a>"}}
    ),
    "bos before a text": dict(tokenizer_config={"add_bos_token": True, "bos_token": "<|endoftext|>"}),
    "a space before a text": dict(tokenizer_config={"add_prefix_space": True}),
    "no limit": dict(tokenizer_config={"model_max_length": int(1e30), "unk_token": "<|endoftext|>"}),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", BESIDE)
def test_what_stands_beside_the_vocabulary_counts_as_in_transformers(demo_files, tmp_path, form, name):
    folder = folder_of(demo_files[form], tmp_path, **BESIDE[name])
    theirs, ours = loaded(folder)
    loaded(folder, pad_token="<b>", model_max_length=7, padding_side="right", truncation_side="left")
    if name == "a token of a name of its own":
        assert (ours.image_token, ours.image_token_id) == (theirs.image_token, theirs.image_token_id)
        assert ours.ab_token_id == theirs.ab_token_id

    written = [ours.save_pretrained(tmp_path / "ours", legacy_format=True), theirs.save_pretrained(tmp_path / "theirs")]
    assert all(os.path.isfile(path) for paths in written for path in paths)
    for saved in (tmp_path / "ours", tmp_path / "theirs"):  # each reads what the other wrote
        again, mine = loaded(saved)
        assert mine(TEXT).input_ids == again(TEXT).input_ids == ours(TEXT).input_ids
        assert mine.get_vocab() == ours.get_vocab() and mine.special_tokens_map == ours.special_tokens_map
    (tmp_path / "ours" / "tokenizer.json").unlink()  # vocab.json, merges.txt and added_tokens.json are left
    assert gptneo_fast.GPT2Tokenizer.from_pretrained(tmp_path / "ours").get_vocab() == ours.get_vocab()


def test_auto_classes_of_transformers_and_ours_read_the_demo_and_each_other(tmp_path):
    for name in ("AutoTokenizer", "GPT2TokenizerFast"):
        theirs, ours = getattr(transformers, name).from_pretrained(FOLDER), getattr(gptneo_fast, name).from_pretrained(FOLDER)
        equal(theirs, ours)
    ours.save_pretrained(tmp_path)
    shutil.copy(FOLDER / "config.json", tmp_path)
    equal(transformers.AutoTokenizer.from_pretrained(tmp_path), gptneo_fast.AutoTokenizer.from_pretrained(tmp_path))


def test_both_forms_give_equal_ids(gpt2_files):
    a, b = (gptneo_fast.GPT2Tokenizer.from_pretrained(gpt2_files[form]) for form in FORMS)
    assert a(TEXT).input_ids == b(TEXT).input_ids and a.get_vocab() == b.get_vocab()
    vocab = json.loads((gpt2_files["vocab"] / "vocab.json").read_text(encoding="utf-8"))
    merges = [
        tuple(m.split(" ")) for m in (gpt2_files["vocab"] / "merges.txt").read_text(encoding="utf-8").split("\n")[1:] if m
    ]
    for given in (
        dict(vocab=vocab, merges=merges),
        dict(vocab=gpt2_files["vocab"] / "vocab.json", merges=str(gpt2_files["vocab"] / "merges.txt")),
        dict(tokenizer_file=gpt2_files["json"] / "tokenizer.json"),
        dict(tokenizer_object=a.backend_tokenizer),
    ):
        assert gptneo_fast.GPT2Tokenizer(**given)(TEXT).input_ids == a(TEXT).input_ids
    with pytest.raises(InputError, match="or use from_pretrained"):
        gptneo_fast.GPT2Tokenizer()


@pytest.mark.parametrize("form", FORMS)
def test_tokens_are_added_and_named_as_in_transformers(demo_files, form):
    theirs, ours = loaded(demo_files[form])
    both = (theirs, ours)
    counts = [
        [
            t.add_special_tokens({"pad_token": "<pad>", "sep_token": AddedToken("[SEP]", lstrip=True)}),
            t.add_special_tokens({"pad_token": "<pad>"}),
            t.add_tokens(["<a>", "Ġthe", "<a>"]),
            t.add_tokens("<b>", special_tokens=True),
            t.add_tokens(AddedToken("done", single_word=True)),
            t.add_special_tokens({"additional_special_tokens": ["<|image|>"]}),
            t.add_special_tokens({"extra_special_tokens": ["<c>", "<|image|>"]}, replace_extra_special_tokens=False),
            t.add_tokens([]),
        ]
        for t in both
    ]
    assert counts[0] == counts[1] and sum(counts[1]) == 8
    equal(theirs, ours)
    assert ours.token_bytes(ours.convert_tokens_to_ids("<a>")) == b"<a>"
    for tokenizer in both:
        tokenizer.eos_token = "<a>"
        tokenizer.cls_token_id = 300
        tokenizer.pad_token = None
        tokenizer.extra_special_tokens = ["<b>"]
    equal(theirs, ours)
    assert (ours.eos_token, ours.cls_token_id, ours.pad_token_id) == ("<a>", 300, None)
    ids = [300, ours.eos_token_id, 301]
    assert ours.get_special_tokens_mask(ids, already_has_special_tokens=True) == [1, 1, 0]
    assert ours.get_special_tokens_mask(ids, already_has_special_tokens=True) == theirs.get_special_tokens_mask(
        ids, already_has_special_tokens=True
    )


def test_a_model_grows_with_its_tokenizer(checkpoint):
    model = gptneo_fast.AutoModelForCausalLM.from_pretrained(checkpoint)
    tokenizer = gptneo_fast.AutoTokenizer.from_pretrained(checkpoint)
    assert tokenizer.add_special_tokens({"pad_token": "<|pad|>"}) == 1
    batch = tokenizer(["The fox", "Once upon a time there"], padding=True, padding_side="left", return_tensors="pt")
    with pytest.raises(InputError, match=str(tokenizer.pad_token_id)):
        model(**batch)
    model.resize_token_embeddings(len(tokenizer))
    out = model.generate(**batch, max_new_tokens=4, pad_token_id=tokenizer.pad_token_id)
    alone = model.generate(**tokenizer("The fox", return_tensors="pt"), max_new_tokens=4, pad_token_id=tokenizer.pad_token_id)
    assert torch.equal(out[0, -6:], alone[0, -6:])


def test_a_name_for_a_token_that_is_not_there_warns_and_wrong_values_are_refused(demo_files):
    theirs, ours = loaded(demo_files["vocab"])
    with pytest.warns(gptneo_fast.GPTNeoFastWarning, match="add_special_tokens"):
        ours.pad_token = "<none>"
    theirs.pad_token = "<none>"
    assert ours.pad_token_id == theirs.pad_token_id == 0
    for name, value, words in (
        ("pad_token_id", N, "0 to 1239"),
        ("pad_token_id", -1, "no id"),
        ("pad_token_id", True, "True"),
        ("pad_token", 5, "pad_token is a int"),
    ):
        with pytest.raises(InputError, match=words):
            setattr(ours, name, value)
    with pytest.raises(InputError, match="did you mean 'pad_token'"):
        ours.add_special_tokens({"padd_token": "<p>"})
    with pytest.raises(InputError, match="give a list"):
        ours.add_special_tokens({"extra_special_tokens": "<p>"})
    with pytest.raises(InputError, match="new_tokens 1 is a int"):
        ours.add_tokens(["<p>", 3])
    with pytest.raises(AttributeError, match="did you mean 'eos_token_id'"):
        ours.eos_token_idd  # noqa: B018
    assert len(ours) == N


def test_saving_leaves_what_stands_there_when_it_fails(demo_files, tmp_path, monkeypatch):
    ours = gptneo_fast.GPT2Tokenizer.from_pretrained(demo_files["vocab"])
    ours.save_pretrained(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    ours.add_tokens("<new>")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(TokenizerError, match=r"cannot be written to .*No space left"):
        ours.save_pretrained(tmp_path)
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    (tmp_path / "file").write_text("")
    with pytest.raises(TokenizerError, match="is a file; give a folder"):
        ours.save_pretrained(tmp_path / "file")
