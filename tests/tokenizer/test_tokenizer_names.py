"""Names of transformers' tokenizers that libraries and older scripts ask for: they are there, and say what is so."""

import pytest

import gptneo_fast
from gptneo_fast.errors import InputError, UnknownOptionError
from tests.tokenizer.test_tokenizer import pair_of


@pytest.fixture
def both(gpt2_files):
    return pair_of(gpt2_files["json"])


def test_attributes_say_what_transformers_say(both):
    theirs, ours = both
    for name in ("SPECIAL_TOKENS_ATTRIBUTES", "backend", "slow_tokenizer_class", "verbose", "deprecation_warnings", "is_fast"):
        assert getattr(ours, name) == getattr(theirs, name), name
    ours.deprecation_warnings["Asking-to-pad-a-fast-tokenizer"] = True
    assert gptneo_fast.GPT2Tokenizer(tokenizer_object=ours.backend_tokenizer).deprecation_warnings == {}
    tokens = ours.tokenize("naïve 🦊")
    assert ours.decoder.decode(tokens) == theirs.decoder.decode(tokens) == "naïve 🦊"
    with pytest.raises(UnknownOptionError, match="upload_folder"):
        ours.push_to_hub("a/b")


def test_init_kwargs_make_the_same_tokenizer_again(both):
    theirs, ours = both
    ours.pad_token, ours.padding_side, ours.chat_template, ours.add_bos_token = "<|endoftext|>", "left", "x", True
    kept = ours.init_kwargs
    shared = ("errors", "eos_token", "bos_token", "unk_token", "name_or_path")
    assert {k: str(kept[k]) for k in shared} == {k: str(theirs.init_kwargs[k]) for k in shared}
    again = gptneo_fast.GPT2Tokenizer(tokenizer_object=ours.backend_tokenizer, **kept)
    assert again.init_kwargs == kept and again("a b").input_ids == ours("a b").input_ids
    kept["pad_token"] = "other"
    assert ours.init_kwargs["pad_token"] == "<|endoftext|>"


def test_text_is_cleaned_up_as_in_transformers(both):
    theirs, ours = both
    text = "Hi , it 's do n't ' x ' . I 'm , we 've you 're ! ? ok .  ."
    assert ours.clean_up_tokenization(text) == theirs.clean_up_tokenization(text) != text
    assert ours.decode(ours(text).input_ids) == text  # decode cleans up nothing
    with pytest.raises(InputError, match="text is a list"):
        ours.clean_up_tokenization([text])


def test_another_bos_token_is_put_before_texts_once_that_is_asked_for(both):
    _, ours = both
    ours.add_bos_token = True
    ours.bos_token = "Hello"
    assert ours("world").input_ids == [50256, 6894]
    ours.update_post_processor()
    assert ours("world").input_ids == [15496, 6894]
