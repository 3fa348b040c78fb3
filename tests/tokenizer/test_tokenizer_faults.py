"""Every fault that tokenizer files and arguments can have: refused by name (faults 40 to 43)."""

import json
import os
import shutil

import pytest
import torch

import gptneo_fast
from gptneo_fast.demo import FOLDER
from gptneo_fast.errors import InputError, TokenizerError
from tests.support.tokenizer_folders import N, folder_of

transformers = pytest.importorskip("transformers")


def set_in(values, path, value):
    *steps, last = path.split(".")
    for step in steps:
        values = values[int(step) if isinstance(values, list) else step]
    values[int(last) if isinstance(values, list) else last] = value


def template(single, pair):
    """A post-processor of these texts (A, B) and special tokens, none of which it lists."""
    kinds = {"A": "Sequence", "B": "Sequence", "X": "SpecialToken"}
    pieces = [[{kinds[name]: {"id": name, "type_id": 0}} for name in names] for names in (single, pair)]
    return json.dumps({"type": "TemplateProcessing", "single": pieces[0], "pair": pieces[1], "special_tokens": {}})


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
    f"post_processor={template(['X', 'A'], ['A', 'B'])}": ("post_processor.single names 'X', which its special_tokens do not",),
    f"post_processor={template(['A'], ['A', 'X', 'B'])}": ("post_processor.pair names 'X'",),
    f"post_processor={template([], ['A', 'B'])}": (
        r"post_processor.single puts together \[\] and not \['A'\]: texts would be",
    ),
    f"post_processor={template(['B'], ['A', 'B'])}": (r"post_processor.single puts together \['B'\]",),
    f"post_processor={template(['A'], ['A'])}": (r"post_processor.pair puts together \['A'\] and not \['A', 'B'\]",),
    f'added_tokens.0.content="{"x" * 5000}"': (r"added_tokens\[0\] has 5000 characters; a token has at most 4096",),
    "added_tokens.0.id=7": ("added token '<|endoftext|>' has id 7, but its place in the vocabulary is 0",),
    'added_tokens.0.content="<new>"': ("added token '<new>' has id 0, but its place in the vocabulary is 1240",),
    "added_tokens.0.content=5": (r"added_tokens\[0\] is .*which is no token",),
    "added_tokens.0.special=1": (r"added_tokens\[0\] is .*which is no token",),
    "added_tokens.0=5": (r"added_tokens\[0\] is 5; it needs an id and a content",),
}


@pytest.mark.parametrize("change", JSON_FAULTS, ids=lambda change: change[:90])
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
