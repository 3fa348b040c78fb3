"""GPT2Tokenizer beside transformers' on the real GPT-2 vocabulary: every form of text and option, equal in every entry."""

import copy
import os
import pickle
import signal
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings, strategies as st

import gptneo_fast
from gptneo_fast.errors import InputError, SetupError, UnknownOptionError

transformers = pytest.importorskip("transformers")
TEXTS = [
    "Hello world",
    "",
    " leading, and trailing ",
    "naïve café 日本語 🦊👩‍👩‍👧",
    "<|endoftext|>x<|endoftext|>",
    "a" * 40,
    "don't\n\n\tstop  1234",
]
PAIRS = [(a, b) for a, b in zip(TEXTS, TEXTS[::-1], strict=True) if a and b]
WORDS = [["Hello", "wor", "ld"], ["one"], ["日本", "", " x"]]


@pytest.fixture(scope="module", params=["vocab.json and merges.txt", "tokenizer.json"])
def both(request, gpt2_files):
    """(transformers' tokenizer, ours) of the same files."""
    folder = gpt2_files["json" if request.param == "tokenizer.json" else "vocab"]
    return pair_of(folder)


def pair_of(folder, **options):
    theirs = transformers.GPT2Tokenizer.from_pretrained(folder, **options)
    return theirs, gptneo_fast.GPT2TokenizerFast.from_pretrained(folder, **options)


def same(a, b):
    """Entries of two encodings are equal in name, order, type and value."""
    assert list(a) == list(b)
    for key in a:
        assert type(a[key]) is type(b[key]), key
        if isinstance(a[key], (torch.Tensor, np.ndarray)):
            assert a[key].dtype == b[key].dtype and a[key].shape == b[key].shape, key
            assert (a[key] == b[key]).all(), key
        else:
            assert a[key] == b[key], key
    return b


FORMS = {
    "a text": dict(text=TEXTS[3]),
    "an empty text": dict(text=""),
    "texts": dict(text=TEXTS),
    "one in a list": dict(text=TEXTS[:1]),
    "a pair": dict(text=TEXTS[0], text_pair=TEXTS[3]),
    "two lists": dict(text=TEXTS, text_pair=TEXTS[::-1]),
    "a list of pairs": dict(text=PAIRS),
    "texts and pairs mixed": dict(text=[PAIRS[0], "alone", list(PAIRS[1])]),
    "words": dict(text=WORDS[0], is_split_into_words=True),
    "lists of words": dict(text=WORDS, is_split_into_words=True),
    "pairs of words": dict(text=WORDS, text_pair=WORDS[::-1], is_split_into_words=True),
    "targets": dict(text=TEXTS[:2], text_target=TEXTS[2:4]),
}
ALL = dict(return_offsets_mapping=True, return_length=True, return_special_tokens_mask=True, return_token_type_ids=True)
OPTIONS = {
    "plain": {},
    "everything": ALL,
    "longest": dict(padding=True, **ALL),
    "longest left, multiple": dict(padding="longest", padding_side="left", pad_to_multiple_of=8, **ALL),
    "max_length": dict(padding="max_length", max_length=24, **ALL),
    "cut and filled": dict(padding="max_length", truncation=True, max_length=6, return_tensors="pt", **ALL),
    "cut": dict(truncation=True, max_length=5, **ALL),
    "max_length alone cuts": dict(max_length=4),
    "model_max_length": dict(truncation=True, padding="max_length"),
    "only_first": dict(truncation="only_first", max_length=34),
    "overflow": dict(truncation=True, max_length=8, stride=1, return_overflowing_tokens=True, **ALL),
    "pt": dict(padding=True, return_tensors="pt"),
    "np": dict(padding=True, return_tensors="np", **ALL),
    "no mask": dict(return_attention_mask=False),
    "split": dict(split_special_tokens=True),
    "not split": dict(split_special_tokens=False, add_special_tokens=False),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", OPTIONS)
def test_every_form_and_option_gives_what_transformers_gives(both, form, name):
    theirs, ours = both
    for tokenizer in both:
        tokenizer.pad_token, tokenizer.model_max_length = "<|endoftext|>", 64
    try:
        expected = theirs(**FORMS[form], **OPTIONS[name])
    except Exception:
        with pytest.raises(InputError):
            ours(**FORMS[form], **OPTIONS[name])
        return
    same(expected, ours(**FORMS[form], **OPTIONS[name]))
    assert theirs.encode(**FORMS["a pair"]) == ours.encode(**FORMS["a pair"])  # options do not outlive their call


@pytest.mark.parametrize("around", [{"add_bos_token": True}, {"add_bos_token": True, "add_eos_token": True}])
@pytest.mark.parametrize("option", ["everything", "cut", "overflow", "longest"])
def test_bos_and_eos_around_a_text(gpt2_files, around, option):
    theirs, ours = pair_of(gpt2_files["vocab"], pad_token="<|endoftext|>", **around)
    for form in ("a text", "texts", "a pair", "two lists"):
        same(theirs(**FORMS[form], **OPTIONS[option]), ours(**FORMS[form], **OPTIONS[option]))
    assert ours.num_special_tokens_to_add(pair=True) == theirs.num_special_tokens_to_add(pair=True) > 0
    assert ours.max_len_single_sentence == theirs.max_len_single_sentence
    for tokenizer in (theirs, ours):
        tokenizer.add_bos_token = False
    assert theirs("x").input_ids == ours("x").input_ids


def test_prefix_space_and_both_sides(gpt2_files):
    options = dict(add_prefix_space=True, padding_side="left", truncation_side="left", pad_token="<|endoftext|>")
    theirs, ours = pair_of(gpt2_files["json"], **options)
    for name in ("everything", "longest", "cut and filled", "overflow"):
        for form in ("texts", "two lists", "lists of words"):
            same(theirs(**FORMS[form], **OPTIONS[name]), ours(**FORMS[form], **OPTIONS[name]))


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60) | st.lists(
    st.sampled_from(["<|endoftext|>", " ", "\n", "'ll", "é", "e\u0301", "🦊", "\u200d", "1", "a", "\u3000", "\x00", "中"]),
    max_size=20,
).map("".join)


@settings(max_examples=300, deadline=None)
@given(text=text, pair=text)
@example(text="\u0085\u2028\ufeff", pair="\x1c\x1f")
def test_random_unicode_gives_the_ids_and_comes_back(both, text, pair):
    theirs, ours = both
    encoding = same(theirs(text, pair, **ALL), ours(text, pair, **ALL))
    ids = ours(text).input_ids
    assert ours.decode(ids) == text == theirs.decode(ids)
    assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True)
    assert encoding.tokens() == theirs(text, pair).tokens() and ours.tokenize(text) == theirs.tokenize(text)
    assert ours.convert_tokens_to_string(ours.tokenize(text)) == text


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 50256) | st.integers(0, 255) | st.just(50256), max_size=40), skip=st.booleans())
def test_the_pieces_of_a_stream_are_whole_characters_and_join_to_the_text(both, ids, skip):
    theirs, ours = both
    stream = ours.stream(skip_special_tokens=skip)
    pieces = [stream.put(i) for i in ids]
    whole = theirs.decode(ids, skip_special_tokens=skip)
    assert "".join([*pieces, stream.end()]) == whole == ours.decode(ids, skip_special_tokens=skip)
    if "\ufffd" not in whole:  # every piece then ends where a character ends
        assert all("\ufffd" not in piece for piece in pieces)


def test_a_stream_holds_back_the_bytes_of_a_character(both):
    _, ours = both
    ids = ours("🦊x").input_ids
    assert len(ids) == 4
    stream = ours.stream()
    assert [stream.put(i) for i in ids] == ["", "", "🦊", "x"] and stream.end() == ""


def test_decode_takes_lists_tensors_and_arrays_of_any_shape(both):
    theirs, ours = both
    rows = ours(TEXTS[:4], padding=True).input_ids if ours.pad_token else [ours(t).input_ids for t in TEXTS[:4]]
    even = [row[:3] for row in rows if len(row) > 2]
    for ids in (rows, rows[0], even, tuple(rows), [], 15496):
        assert ours.decode(ids) == theirs.decode(ids)
    for ids in (rows, rows[0], even, [torch.tensor(r) for r in rows if r]):
        assert ours.batch_decode(ids, skip_special_tokens=True) == theirs.batch_decode(ids, skip_special_tokens=True)
    for kind in (torch.tensor, np.array):
        for ids in (even, rows[0]):
            assert ours.decode(kind(ids)) == theirs.decode(kind(ids))
            assert ours.batch_decode(kind(ids)) == theirs.batch_decode(kind(ids))
    assert ours.decode(torch.tensor(15496)) == "Hello" == ours.decode(np.int64(15496))
    assert ours.batch_decode([]) == []
    assert ours.decode([50256, 60000, 15496]) == theirs.decode([50256, 60000, 15496]) == "<|endoftext|>Hello"
    with pytest.warns(gptneo_fast.GPTNeoFastWarning, match="clean_up_tokenization_spaces"):
        assert ours.decode(ours(" a . b").input_ids, clean_up_tokenization_spaces=True) == " a . b"


def test_tokens_and_ids_convert_both_ways(both):
    theirs, ours = both
    assert ours.convert_tokens_to_ids("Hello") == theirs.convert_tokens_to_ids("Hello") == 15496
    assert ours.convert_tokens_to_ids(["Hello", "no such token"]) == theirs.convert_tokens_to_ids(["Hello", "no such token"])
    for ids in (15496, [15496, 50256, 995]):
        assert ours.convert_ids_to_tokens(ids) == theirs.convert_ids_to_tokens(ids)
    assert ours.convert_ids_to_tokens(torch.tensor([50256, 995]), skip_special_tokens=True) == ["Ġworld"]
    assert ours.get_vocab() == theirs.get_vocab() == ours.vocab
    assert (ours.vocab_size, len(ours)) == (theirs.vocab_size, len(theirs)) == (50257, 50257)
    assert ours("Hello world").input_ids == [15496, 995]


def test_an_encoding_knows_words_and_characters_as_transformers_does(both):
    a, b = (t([" Hello, wörld", "x 🦊"], ["second text", "y"]) for t in both)
    assert b.is_fast and b.n_sequences == a.n_sequences == 2
    for row in range(2):
        assert b.tokens(row) == a.tokens(row)
        assert b.word_ids(row) == a.word_ids(row) and b.sequence_ids(row) == a.sequence_ids(row)
        for i in range(len(a["input_ids"][row])):
            assert b.token_to_chars(row, i) == a.token_to_chars(row, i)
            assert b.token_to_word(row, i) == a.token_to_word(row, i)
            assert b.token_to_sequence(row, i) == a.token_to_sequence(row, i)
        for sequence in range(2):
            for i in range(6):
                assert b.char_to_token(row, i, sequence) == a.char_to_token(row, i, sequence)
                assert b.char_to_word(row, i, sequence) == a.char_to_word(row, i, sequence)
                assert b.word_to_tokens(row, i, sequence) == a.word_to_tokens(row, i, sequence)
            assert b.word_to_chars(row, 0, sequence) == a.word_to_chars(row, 0, sequence)
    assert b.char_to_token(3) == a.char_to_token(3) and b.token_to_word(-1) == a.token_to_word(len(a[0].ids) - 1)
    assert b[0].ids == a[0].ids and b[0:1][0].ids == a[0].ids
    assert b.input_ids is b["input_ids"] and b.data == dict(a)


def test_an_encoding_moves_and_copies_as_one(both):
    _, ours = both
    batch = ours(["a b", "c d"], return_tensors="pt")
    assert batch.to("cpu") is batch
    assert batch.to("meta").input_ids.device.type == "meta"  # scripts write batch.to(device) and use batch
    for other in (pickle.loads(pickle.dumps(ours(TEXTS))), copy.deepcopy(ours(TEXTS)), ours(TEXTS).copy()):
        assert other == ours(TEXTS) and other.tokens(3) == ours(TEXTS).tokens(3)
    with pytest.raises(AttributeError, match=r"no 'labels'; it has input_ids, attention_mask"):
        batch.labels  # noqa: B018
    assert gptneo_fast.BatchEncoding({"input_ids": [[1], [2]]})[1:] == {"input_ids": [[2]]}
    with pytest.raises(InputError, match="not made from text"):
        gptneo_fast.BatchEncoding({"input_ids": [1]}).tokens()


PADS = [dict(), dict(padding="max_length", max_length=40), dict(pad_to_multiple_of=8, padding_side="left"), dict(padding=False)]


@pytest.mark.parametrize("options", PADS, ids=str)
def test_pad_collates_what_transformers_collates(both, options):
    for tokenizer in both:
        tokenizer.pad_token = "<|endoftext|>"
    theirs, ours = both
    rows = [theirs(t, return_special_tokens_mask=True, return_token_type_ids=True) for t in TEXTS[:4] if t]
    plain = [dict(row) for row in rows]
    bare = {"input_ids": [row["input_ids"] for row in plain]}
    for batch in (plain, {k: [row[k] for row in plain] for k in plain[0]}, plain[0], bare):
        same(*(t.pad(copy.deepcopy(batch), **options) for t in both))
    same(*(t.pad(copy.deepcopy(bare), return_attention_mask=False, **options) for t in both))
    assert list(ours.pad(plain, return_attention_mask=False, **options)) == [
        "input_ids",
        "token_type_ids",
        "special_tokens_mask",
    ]
    if options.get("padding", True):
        tensors = [{k: torch.tensor(v) for k, v in row.items()} for row in plain]
        same(theirs.pad(copy.deepcopy(tensors), **options), ours.pad(tensors, **options))
        same(theirs.pad(copy.deepcopy(plain), return_tensors="np", **options), ours.pad(plain, return_tensors="np", **options))


def test_collators_of_transformers_take_our_tokenizer(both):
    batches = []
    for tokenizer in both:
        tokenizer.pad_token = "<|endoftext|>"
        features = [tokenizer(t) for t in TEXTS]
        batches.append(dict(transformers.DataCollatorWithPadding(tokenizer)(features)))
        batches.append(dict(transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)(features)))
    same(batches[0], batches[2])
    same(batches[1], batches[3])


def test_a_tokenizer_is_copied_and_pickled_whole(both):
    _, ours = both
    ours.pad_token = "<|endoftext|>"
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        same(ours(TEXTS, padding=True), other(TEXTS, padding=True))
        other.add_tokens("<new>")
        other.padding_side = "left"
        assert len(other) == len(ours) + 1 and ours.padding_side == "right"


def test_threads_do_not_see_the_options_of_each_other(both):
    _, ours = both
    ours.pad_token = "<|endoftext|>"
    calls = [dict(), dict(truncation=True, max_length=3), dict(padding="max_length", max_length=30), dict(padding=True)]
    expected, wrong = [ours(TEXTS, **options) for options in calls], []

    def work(i):
        for _ in range(40):
            if ours(TEXTS, **calls[i]) != expected[i] or ours.decode(expected[i].input_ids) != [
                ours.decode(r) for r in expected[i].input_ids
            ]:
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i % 4,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


BAD = [
    (dict(padding="longestt"), "did you mean 'longest'"),
    (dict(truncation="first"), "truncation is 'first'.*only_first"),
    (dict(truncation="only_second", max_length=5), "needs pairs"),
    (dict(max_length=-1), "max_length is -1"),
    (dict(max_length=True), "max_length is True"),
    (dict(max_length=2.5), r"max_length is 2\.5"),
    (dict(truncation=True, max_length=4, stride=4, return_overflowing_tokens=True), "stride 4 must be less"),
    (dict(text_pair=TEXTS[::-1], truncation=True, max_length=7, stride=3), "text 0 keeps 3 tokens and stride is 3"),
    (dict(text_pair=TEXTS[::-1], truncation="only_second", max_length=20, stride=2), r"the texts cannot be cut|keeps"),
    (dict(padding=True, pad_to_multiple_of=0), "pad_to_multiple_of is 0"),
    (dict(padding=True, truncation=True, max_length=6, pad_to_multiple_of=4), "no multiple of pad_to_multiple_of 4"),
    (dict(padding=True, padding_side="top"), "'left' or 'right'"),
    (dict(return_tensors="tf"), "'pt', 'np' or None"),
    (dict(return_tensors="pt"), r"different lengths .* pass padding=True"),
    (dict(text_pair=["one"]), "7 texts and 1 of text_pair"),
    (dict(text_pair="one"), "7 texts and one of text_pair"),
    (dict(is_split_into_words=True), "lists of words|needs lists"),
]


@pytest.mark.parametrize(("options", "words"), BAD, ids=lambda v: str(v)[:60])
def test_options_that_cannot_be_are_named_with_the_way_out(both, options, words):
    _, ours = both
    ours.pad_token = "<|endoftext|>"
    texts = TEXTS[0] if "is_split_into_words" in options else TEXTS
    with pytest.raises(InputError, match=words):
        ours(texts, **options)
    assert ours("Hello world") == {"input_ids": [15496, 995], "attention_mask": [1, 1]}


def test_padding_without_a_pad_token_says_how_to_get_one(gpt2_files):
    ours = gptneo_fast.GPT2Tokenizer.from_pretrained(gpt2_files["vocab"])
    for call in (lambda: ours(TEXTS, padding=True), lambda: ours.pad([[1], [1, 2]])):
        with pytest.raises(InputError, match=r"tokenizer\.pad_token = tokenizer\.eos_token"):
            call()
    ours.pad_token = ours.eos_token
    assert ours.pad_token_id == ours.eos_token_id == 50256
    assert ours.pad([[1], [1, 2]]).input_ids == [[1, 50256], [1, 2]]


def test_unknown_options_and_chats_are_refused_with_advice(both):
    _, ours = both
    with pytest.raises(UnknownOptionError, match="did you mean 'max_length'"):
        ours("x", max_lenght=3)
    with pytest.raises(UnknownOptionError, match="did you mean 'skip_special_tokens'"):
        ours.decode([1], skip_special_token=True)
    with pytest.raises(SetupError, match=r"no chat template.*write the prompt as text"):
        ours.apply_chat_template([{"role": "user", "content": "hi"}])
    with pytest.raises(InputError, match="errors='strict'"):
        gptneo_fast.GPT2Tokenizer(ours.get_vocab(), [], errors="strict")
    with pytest.raises(UnknownOptionError, match="did you mean 'padding_side'"):
        gptneo_fast.GPT2Tokenizer(ours.get_vocab(), [], padding_sde="left")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_child_tokenizes_although_another_thread_did_when_it_was_forked(both):
    tokenizer = both[1]
    done = threading.Event()

    def work():
        while not done.is_set():
            tokenizer.encode("Once upon a time there was a fox. " * 200)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(8):
            child = os.fork()
            if not child:
                os._exit(0 if tokenizer.encode("a fox") else 1)
            deadline = time.monotonic() + 20
            while not (ended := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < deadline:
                time.sleep(0.01)
            if not ended[0]:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            assert ended == (child, 0)
    finally:
        done.set()
        thread.join()
