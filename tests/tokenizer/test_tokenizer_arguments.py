"""Arguments that are of no kind that a tokenizer takes: each is an error that names it, and the tokenizer serves on."""

import inspect

import numpy as np
import pytest
import torch

import gptneo_fast
from gptneo_fast.demo import FOLDER
from gptneo_fast.errors import GPTNeoFastError, InputError

ODD = [None, 5, -1, 10**400, -(10**5000), 1.5, float("nan"), True, b"x", "\ud800", [None], [[1]], [10**5000], {}, {"a": 1}, {1}]
ODD += [np.int64(3), np.float32(1.5), np.array(3), np.array([1, 2]), torch.tensor(3), torch.tensor([1, 2]), object()]
USUAL = {
    "__call__": {"text": "a"},
    "add_special_tokens": {"special_tokens_dict": {"pad_token": "<p>"}},
    "add_tokens": {"new_tokens": ["zz"]},
    "apply_chat_template": {"conversation": [{"role": "user", "content": "x"}]},
    "batch_decode": {"sequences": [[1]]},
    "clean_up_tokenization": {"text": "a ."},
    "convert_ids_to_tokens": {"ids": [1]},
    "convert_tokens_to_ids": {"tokens": "a"},
    "convert_tokens_to_string": {"tokens": ["a"]},
    "decode": {"token_ids": [1]},
    "encode_message_with_chat_template": {"message": {"role": "user", "content": "x"}},
    "get_special_tokens_mask": {"token_ids_0": [1], "already_has_special_tokens": True},
    "num_special_tokens_to_add": {},
    "pad": {"encoded_inputs": {"input_ids": [[1], [1, 2]]}},
    "save_pretrained": {},
    "save_vocabulary": {},
    "stream": {},
    "token_bytes": {"token_id": 1},
    "train_new_from_iterator": {"text_iterator": ["a b"], "vocab_size": 260, "show_progress": False},
}
FURTHER = {
    "__call__": ("add_special_tokens", "is_split_into_words", "return_tensors", "return_overflowing_tokens"),
    "train_new_from_iterator": ("min_frequency", "limit_alphabet", "max_token_length", "show_progress"),
}


def fresh():
    tokenizer = gptneo_fast.GPT2Tokenizer.from_pretrained(FOLDER)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    return tokenizer


def survives(call, what):
    """Whatever is raised is ours."""
    try:
        call()
    except GPTNeoFastError:
        return
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error


@pytest.mark.filterwarnings("ignore::gptneo_fast.errors.GPTNeoFastWarning")
@pytest.mark.parametrize("method", USUAL)
def test_odd_arguments_are_named(method, tmp_path):
    tokenizer = fresh()
    signature = inspect.signature(getattr(type(tokenizer), method)).parameters.values()
    names = [p.name for p in signature if p.name != "self" and p.kind != p.VAR_KEYWORD]
    usual = USUAL[method] | ({"save_directory": tmp_path} if method.startswith("save_") else {})
    for name in (*names, *FURTHER.get(method, ())):
        for value in ODD:
            one = fresh() if method.startswith("add_") else tokenizer
            survives(lambda one=one, name=name, value=value: getattr(one, method)(**(usual | {name: value})), (name, value))
    assert tokenizer("Once upon").input_ids == fresh()("Once upon").input_ids


@pytest.mark.filterwarnings("ignore::gptneo_fast.errors.GPTNeoFastWarning")
def test_odd_settings_are_named():
    names = [p for p in inspect.signature(gptneo_fast.GPT2Tokenizer).parameters if p not in ("vocab", "merges", "special")]
    for name in (*names, "pad_token", "foo_token", "do_lower_case", "extra_special_tokens_ids", "eos_token_id"):
        for value in ODD:
            survives(lambda n=name, v=value: gptneo_fast.GPT2Tokenizer.from_pretrained(FOLDER, **{n: v}), (name, value))
            if name not in ("tokenizer_file", "tokenizer_object", "added_tokens_decoder", "errors", "name_or_path"):
                survives(lambda n=name, v=value: used(n, v), ("set", name, value))


def used(name, value):
    tokenizer = fresh()
    setattr(tokenizer, name, value)
    tokenizer(["a", "b c d"], padding=True, truncation=True, max_length=3)
    tokenizer("a b", truncation=True)
    tokenizer.decode([1], skip_special_tokens=True)
    tokenizer.apply_chat_template([{"role": "user", "content": "x"}])


def test_a_folders_vocabulary_is_the_only_one():
    vocab = fresh().get_vocab()
    for name, value in {"vocab": vocab, "merges": [], "tokenizer_file": "t.json", "tokenizer_object": fresh()}.items():
        with pytest.raises(InputError, match=rf"{name} goes not with from_pretrained.* use GPT2Tokenizer\({name}="):
            gptneo_fast.GPT2Tokenizer.from_pretrained(FOLDER, **{name: value})
    assert gptneo_fast.GPT2Tokenizer.from_pretrained(FOLDER, vocab=None).get_vocab() == vocab


def test_integers_may_be_numpys_and_sizes_have_limits():
    tokenizer = fresh()
    for two in (np.int64(2), torch.tensor(2), np.array(2)):
        assert tokenizer("Once upon a time", max_length=two, truncation=True) == tokenizer(
            "Once upon a time", max_length=2, truncation=True
        )
    for options in ({"padding": "max_length", "max_length": 2**40}, {"padding": True, "pad_to_multiple_of": 2**40}):
        with pytest.raises(InputError, match=r"1099511627776.* the limit is 16777216"):
            tokenizer("a", **options)
    tokenizer.model_max_length = None
    assert tokenizer("a b c", truncation=True) == tokenizer("a b c")
