"""Vocabularies of one's own texts, and the keywords that name special tokens, beside transformers'."""

import pytest
from tokenizers import AddedToken

import gptneo_fast
from gptneo_fast.demo import FOLDER
from gptneo_fast.errors import GPTNeoFastError, GPTNeoFastWarning, InputError, UnknownOptionError

transformers = pytest.importorskip("transformers")
CORPUS = [["hello world hello", "the dog ran"], *([["a cat sat on the mat"]] * 5)]


def both(**options):
    return [library.GPT2TokenizerFast.from_pretrained(FOLDER, **options) for library in (transformers, gptneo_fast)]


@pytest.mark.parametrize(
    ("made_with", "options"),
    [
        ({}, {}),
        ({}, {"new_special_tokens": ["<n>", AddedToken("<m>", lstrip=True)], "min_frequency": 2}),
        ({"pad_token": "<p>", "extra_special_tokens": ["<x>"]}, {"special_tokens_map": {"<p>": "<pad>"}, "length": 7}),
        ({"add_prefix_space": True, "model_max_length": 9, "padding_side": "left"}, {"max_token_length": 3}),
    ],
    ids=str,
)
def test_a_vocabulary_of_ones_own_texts_is_that_of_transformers(made_with, options, tmp_path):
    theirs, ours = (t.train_new_from_iterator(iter(CORPUS), 300, show_progress=False, **options) for t in both(**made_with))
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.all_special_tokens == theirs.all_special_tokens and ours.special_tokens_map == theirs.special_tokens_map
    assert (ours.model_max_length, ours.padding_side) == (theirs.model_max_length, theirs.padding_side)
    text = "hello <n> world, the <m> cat <x> <pad>"
    assert ours(text).input_ids == theirs(text).input_ids
    assert ours.decode(ours(text).input_ids) == theirs.decode(theirs(text).input_ids)
    ours.save_pretrained(tmp_path)
    assert gptneo_fast.GPT2Tokenizer.from_pretrained(tmp_path)(text) == ours(text)


def test_tokens_around_a_text_keep_their_places_in_a_new_vocabulary():
    tokenizer = gptneo_fast.GPT2Tokenizer.from_pretrained(FOLDER, add_bos_token=True, bos_token="<s>")
    tokenizer.add_bos_token = True
    trained = tokenizer.train_new_from_iterator(CORPUS, 300, special_tokens_map={"<s>": "<b>"}, show_progress=False)
    assert trained.bos_token == "<b>" and trained.add_bos_token
    assert trained("hello").input_ids[0] == trained.bos_token_id == trained.convert_tokens_to_ids("<b>")


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((5, 300), {}, "text_iterator is 5"),
        (("a text", 300), {}, "text_iterator is 'a text'"),
        (([1], 300), {}, "text 0 is a int"),
        (([["a"], ["b", None]], 300), {}, "text 1.1 is a NoneType"),
        ((["a\ud800"], 300), {}, "lone surrogate"),
        ((CORPUS, "300"), {}, "vocab_size='300'"),
        ((CORPUS, 10**400), {}, "vocab_size=10+"),
        ((CORPUS, -1), {}, "vocab_size=-1"),
        ((CORPUS, 300), {"min_frequency": 1.5}, "min_frequency=1.5"),
        ((CORPUS, 300), {"length": "all"}, "length='all'"),
        ((CORPUS, 300), {"new_special_tokens": [5]}, "new_special_tokens 0 is a int"),
        ((CORPUS, 300), {"special_tokens_map": ["a"]}, "special_tokens_map is"),
        ((CORPUS, 300), {"min_frequenzy": 2}, "did you mean 'min_frequency'"),
    ],
    ids=lambda v: str(v)[:30],
)
def test_what_no_vocabulary_is_made_of_is_named(arguments, options, message):
    tokenizer = gptneo_fast.GPT2Tokenizer.from_pretrained(FOLDER)
    with pytest.raises(GPTNeoFastError, match=message):
        tokenizer.train_new_from_iterator(*arguments, **({"show_progress": False} | options))


def test_special_tokens_without_a_name_are_set_by_text_and_by_id():
    for tokenizer in both(extra_special_tokens=["<x>", "<y>"]):
        assert tokenizer.extra_special_tokens == ["<x>", "<y>"] and tokenizer.extra_special_tokens_ids == [1240, 1241]
        tokenizer.extra_special_tokens = ("<y>",)
        assert tokenizer.all_special_ids == [0, 1241]
        tokenizer.extra_special_tokens_ids = [3, 1240]
        assert tokenizer.extra_special_tokens == ["#", "<x>"] and tokenizer.extra_special_tokens_ids == [3, 1240]
        tokenizer.extra_special_tokens = None
        assert tokenizer.extra_special_tokens_ids == []
    ours = both()[1]
    for value in ("<x>", 5, {"a_token": "<a>"}, [5]):
        with pytest.raises(InputError, match="extra_special_tokens"):
            ours.extra_special_tokens = value
        if not isinstance(value, dict):  # which names tokens there
            with pytest.raises(InputError, match="extra_special_tokens"):
                gptneo_fast.GPT2Tokenizer.from_pretrained(FOLDER, extra_special_tokens=value)
    with pytest.raises(InputError, match=r"extra_special_tokens_ids is 99999; give an id"):
        ours.extra_special_tokens_ids = [99999]


def test_do_lower_case_changes_nothing_as_in_transformers():
    with pytest.warns(GPTNeoFastWarning, match="do_lower_case=True changes nothing"):
        theirs, ours = both(do_lower_case=True)
    assert ours("The DOG").input_ids == theirs("The DOG").input_ids
    both(do_lower_case=False, from_slow=False)


def test_the_template_in_use_can_be_asked_for():
    for tokenizer in both():
        tokenizer.chat_template = {"default": "a", "tool_use": "b", "other": "c"}
        assert [tokenizer.get_chat_template(), tokenizer.get_chat_template(tools=[{}])] == ["a", "b"]
        assert [tokenizer.get_chat_template("other"), tokenizer.get_chat_template("{{ x }}")] == ["c", "{{ x }}"]


def test_saving_says_what_it_does_not_offer(tmp_path):
    tokenizer = gptneo_fast.GPT2Tokenizer.from_pretrained(FOLDER)
    assert tokenizer.save_pretrained(tmp_path, push_to_hub=False, filename_prefix=None)
    with pytest.raises(UnknownOptionError, match="upload_folder"):
        tokenizer.save_pretrained(tmp_path, push_to_hub=True)
    with pytest.raises(UnknownOptionError, match="did you mean 'legacy_format'"):
        tokenizer.save_pretrained(tmp_path, legacy_formats=True)
