"""Tokenizer files: both forms, added tokens wherever they stand, saving; and every fault that they can have."""

import json
import os
import shutil

import pytest
import torch
from tokenizers import AddedToken

import gptneo_fast
from gptneo_fast.demo import FOLDER
from gptneo_fast.errors import InputError, TokenizerError

transformers = pytest.importorskip("transformers")
TEXT = " Hello<|endoftext|> <pad>wörld <a> <b>x<|image|> [SEP]  done"
FORMS = ("vocab", "json")
N = 1240  # tokens of the demo's tokenizer, which is quickly read


@pytest.fixture(scope="module")
def demo_files(tmp_path_factory):
    """The demo's tokenizer in both forms; its files stand in for GPT-2's where the size of the vocabulary is no matter."""
    folders = {form: tmp_path_factory.mktemp("demo") for form in FORMS}
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(FOLDER / name, folders["vocab"])
    shutil.copy(FOLDER / "tokenizer.json", folders["json"])
    return folders


def folder_of(source, tmp_path, **files):
    """A copy of a tokenizer's folder with other JSON files besides."""
    folder = tmp_path / "tokenizer"
    shutil.copytree(source, folder)
    for name, values in files.items():
        (folder / f"{name}.json").write_text(json.dumps(values), encoding="utf-8")
    return folder


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


# Faults 40 to 43


def set_in(values, path, value):
    *steps, last = path.split(".")
    for step in steps:
        values = values[int(step) if isinstance(values, list) else step]
    values[int(last) if isinstance(values, list) else last] = value


JSON_FAULTS = {  # what is changed in tokenizer.json -> words of the error
    'model.type="Unigram"': ("model is 'Unigram'; GPT-2's tokenizer has BPE",),
    "model.type=[]": (r"model is \[\]",),
    "model=null": ("model is None",),
    "model.vocab=[]": ("no vocab",),
    "model.merges=null": ("no merges",),
    'model.merges.3="a b c"': (r"model.merges\[3\]: 'a b c' is no pair of tokens",),
    'model.merges.3=["a"]': (r"model.merges\[3\]: \['a'\] is no pair",),
    'model.merges.3="q zz"': ("merge 3 .'q' 'zz'. needs 'zz', which has no id",),
    "model.dropout=0.1": (r"model.dropout is 0\.1",),
    'model.continuing_subword_prefix="##"': ("continuing_subword_prefix is '##'",),
    "model.ignore_merges=true": ("ignore_merges is True",),
    "model.vocab.Ġt=1240": ("token 'Ġt' has id 1240; ids of 1240 tokens go from 0 to 1239",),
    "model.vocab.Ġt=4294967294": ("token 'Ġt' has id 4294967294",),
    "model.vocab.Ġt=-1": ("token 'Ġt' has id -1",),
    "model.vocab.Ġt=1.5": (r"token 'Ġt' has id 1\.5",),
    "model.vocab.Ġt=true": ("token 'Ġt' has id True",),
    "model.vocab.Ġt=189": ("'Ā' and 'Ġt' have the same id 189",),
    'pre_tokenizer={"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": false}': (
        "pre_tokenizer is 'Split'; GPT-2's tokenizer has ByteLevel",
    ),
    "pre_tokenizer=null": ("pre_tokenizer is None",),
    "pre_tokenizer.use_regex=false": ("use_regex is off",),
    'normalizer={"type": "NFC"}': ("normalizer is 'NFC'",),
    'normalizer={"type": "Replace", "pattern": {"Regex": "("}, "content": ""}': ("normalizer is 'Replace'",),
    'decoder={"type": "Replace", "pattern": {"Regex": "("}, "content": ""}': ("decoder is 'Replace'",),
    'post_processor={"type": "RobertaProcessing"}': ("post_processor is 'RobertaProcessing'",),
    'post_processor={"type": "TemplateProcessing"}': ("post_processor is none that tokenizers",),
    'post_processor={"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x", "type_id": 0}}], "pair": [], '
    '"special_tokens": {"x": {"id": "x", "ids": [60000], "tokens": ["x"]}}}': ("puts id 60000 around a text",),
    "added_tokens.0.id=7": ("added token '<|endoftext|>' has id 7, but its place in the vocabulary is 0",),
    'added_tokens.0.content="<new>"': ("added token '<new>' has id 0, but its place in the vocabulary is 1240",),
    "added_tokens.0.content=5": (r"added_tokens\[0\] is .*which is no token",),
    "added_tokens.0.special=1": (r"added_tokens\[0\] is .*which is no token",),
    "added_tokens.0=5": (r"added_tokens\[0\] is 5; it needs an id and a content",),
}


@pytest.mark.parametrize("change", JSON_FAULTS)
def test_a_broken_or_foreign_tokenizer_json_is_refused_by_name(demo_files, tmp_path, change):
    folder = folder_of(demo_files["json"], tmp_path)
    path, value = change.split("=", 1)
    values = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    set_in(values, path, json.loads(value))
    (folder / "tokenizer.json").write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(TokenizerError, match=JSON_FAULTS[change][0]) as error:
        gptneo_fast.GPT2Tokenizer.from_pretrained(folder)
    assert "tokenizer" in str(error.value)


FILE_FAULTS = {  # (file, what it holds or is done to it) -> words
    "merges cut": ("merges.txt", lambda b: b[: b.index(b"\n", 4000) - 2], "no pair of tokens"),
    "a merge of three": (
        "merges.txt",
        lambda b: b.replace(b"\nh e\n", b"\nh e x\n"),
        r"merges.txt, line \d+: 'h e x' is no pair of tokens",
    ),
    "a merge of one": (
        "merges.txt",
        lambda b: b.replace(b"\nh e\n", b"\nhe\n"),
        r"merges.txt, line \d+: 'he' is no pair of tokens",
    ),
    "a merge out of the vocabulary": ("merges.txt", lambda b: b + b"zq qz\n", "needs 'zq', which has no id|needs"),
    "merges not UTF-8": ("merges.txt", lambda b: b + b"\xff\xfe\n", r"merges.txt is not UTF-8"),
    "vocab cut": ("vocab.json", lambda b: b[: len(b) // 2], r"vocab.json is not JSON"),
    "vocab empty": ("vocab.json", lambda b: b"", r"vocab.json is not JSON"),
    "vocab a list": ("vocab.json", lambda b: b'["a"]', "vocab.json holds a list"),
    "a vocab of strings": ("vocab.json", lambda b: b.replace(b":0,", b':"0",', 1), "has id '0'"),
    "a byte missing": (
        "vocab.json",
        lambda b: b.replace('"\u0100"'.encode(), b'"<gone>"').replace(b'"\\u0100"', b'"<gone>"'),
        "the first is 0x00",
    ),
    "a token twice": ("vocab.json", lambda b: b.replace(b"{", b'{"!": 0, ', 1), "given twice"),
    "a vocab without <|endoftext|> is fine": (
        "vocab.json",
        lambda b: b.replace(b'"<|endoftext|>":0,"!":1', b'"!":0').replace(b":1239", b":1"),
        None,
    ),
    "Windows ends of lines are fine": ("merges.txt", lambda b: b.replace(b"\n", b"\r\n"), None),
}


@pytest.mark.parametrize("name", FILE_FAULTS)
def test_a_broken_vocab_or_merges_file_is_refused_by_name(demo_files, tmp_path, name):
    folder = folder_of(demo_files["vocab"], tmp_path)
    file, change, words = FILE_FAULTS[name]
    before = (folder / file).read_bytes()
    after = change(before)
    assert after != before
    (folder / file).write_bytes(after)
    if words is None:
        ours = gptneo_fast.GPT2Tokenizer.from_pretrained(folder)
        assert ours.decode(ours("Hello<|endoftext|>").input_ids) == "Hello<|endoftext|>" and len(ours) == N
        return
    with pytest.raises(TokenizerError, match=words) as error:
        gptneo_fast.GPT2Tokenizer.from_pretrained(folder)
    assert "vocab.json" in str(error.value) or "merges.txt" in str(error.value)


BESIDE_FAULTS = {
    "tokenizer_config": [
        ({"model_max_length": "2048"}, "model_max_length is '2048'; it must be a int or float"),
        ({"padding_side": "up"}, "padding_side is 'up'; use 'left' or 'right'"),
        ({"add_prefix_space": 1}, "add_prefix_space is 1"),
        ({"eos_token": 5}, "eos_token is 5, which is no token"),
        ({"pad_token": {"content": 5}}, "pad_token is .* which is no token"),
        ({"pad_token": {"content": "\ud800"}}, "escapes half a character"),
        ({"extra_special_tokens": "x"}, "extra_special_tokens is 'x'; it must be a list"),
        ({"added_tokens_decoder": []}, "added_tokens_decoder is a list"),
        ({"added_tokens_decoder": {"x": "y"}}, "'x' is no id of a token"),
        ({"added_tokens_decoder": {"60000": "<y>"}}, "'<y>' has id 60000, but its place in the vocabulary is 1240"),
    ],
    "special_tokens_map": [({"eos_token": ["a"]}, "eos_token is .* which is no token")],
    "added_tokens": [
        ({"<a>": -1}, "-1 is no id of a token"),
        ({"<a>": 2**32}, "4294967296 is no id"),
        ({"<a>": N, "<b>": N}, "'<a>' and '<b>' have the same id 1240"),
        ({"": N}, "is no token"),
    ],
}


@pytest.mark.parametrize(("file", "values", "words"), [(f, v, w) for f in BESIDE_FAULTS for v, w in BESIDE_FAULTS[f]])
def test_broken_settings_are_refused_by_file_and_name(demo_files, tmp_path, file, values, words):
    folder = folder_of(demo_files["vocab"], tmp_path, **{file: values})
    with pytest.raises(TokenizerError, match=words) as error:
        gptneo_fast.GPT2Tokenizer.from_pretrained(folder)
    assert file in str(error.value) or "added token" in str(error.value)


def test_a_folder_without_a_tokenizer_says_what_was_looked_for(demo_files, tmp_path):
    with pytest.raises(TokenizerError, match=r"looked for tokenizer.json, and for vocab.json with merges.txt$"):
        gptneo_fast.GPT2Tokenizer.from_pretrained(tmp_path)
    shutil.copy(demo_files["vocab"] / "vocab.json", tmp_path)
    with pytest.raises(TokenizerError, match=r"found only vocab.json"):
        gptneo_fast.GPT2Tokenizer.from_pretrained(tmp_path)
    os.mkfifo(tmp_path / "merges.txt")
    with pytest.raises(TokenizerError, match=r"merges.txt is no regular file"):  # and does not hang
        gptneo_fast.GPT2Tokenizer.from_pretrained(tmp_path)


TEXT_FAULTS = [
    (None, "no text"),
    (b"bytes", "text is a bytes; give a string"),
    (7, "text is a int"),
    ({"a": 1}, "text is a dict"),
    (["a", None], "text 1 is a NoneType"),
    (["a", b"b"], "text 1 is a bytes"),
    ([["a", 5]], r"text 0\.1 is a int"),
    (["a", "x\ud800y"], "text 1 has a lone surrogate at character 1"),
    ("x" * (100 << 20), "104857600 characters; the limit is 16777216"),
    ([["a", "b", "c"]], "text 0 is a list of 3"),
]


@pytest.mark.parametrize(("text", "words"), TEXT_FAULTS, ids=lambda v: repr(v)[:30])
def test_what_is_no_text_is_refused_with_its_type_and_place(text, words):
    ours = gptneo_fast.GPT2Tokenizer.from_pretrained(FOLDER)
    for call in (ours, ours.encode, ours.tokenize):
        with pytest.raises(InputError, match=words):
            call(text)


def test_odd_but_whole_texts_are_fine():
    ours = gptneo_fast.GPT2Tokenizer.from_pretrained(FOLDER)
    assert ours.decode(ours("a\x00b").input_ids) == "a\x00b"
    assert ours([]) == {"input_ids": [], "attention_mask": []}
    assert ours([], return_tensors="pt").input_ids.dtype == torch.int64
    assert ours(t for t in ("a", "b")).input_ids == ours(["a", "b"]).input_ids


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([1, -1], "token id -1"),
        (-1, "token id -1"),
        (2**40, "token id 1099511627776"),
        ([1.5], r"not 1\.5"),
        ([True], "not True"),
        (["5"], "not '5'"),
        ("5", "not '5'"),
        (None, "not None"),
        (torch.tensor([1.0]), r"not 1\.0"),
        ([[1], 2], "nested unevenly"),
    ],
    ids=str,
)
def test_what_is_no_id_is_refused_with_its_value(ids, words):
    ours = gptneo_fast.GPT2Tokenizer.from_pretrained(FOLDER)
    with pytest.raises(InputError, match=words):
        ours.decode(ids)
    if words != "nested unevenly":
        with pytest.raises(InputError, match=words):
            ours.convert_ids_to_tokens(ids)
