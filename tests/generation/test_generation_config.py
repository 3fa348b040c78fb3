"""GenerationConfig by itself: what is saved is read again, under any name, without a model beside it."""

import pytest

import gptneo_fast
from gptneo_fast.errors import ConfigError, InputError

SAID = {
    "do_sample": True,
    "temperature": 0.7,
    "length_penalty": 1.0,
    "bad_words_ids": [[1, 2, 3], [4, 5]],
    "eos_token_id": [2, 7],
}


@pytest.mark.parametrize("naming", [{}, {"config_file_name": "foo.json"}, {"config_name": "foo.json"}])
def test_what_was_saved_is_read_without_a_model(tmp_path, naming):
    config = gptneo_fast.GenerationConfig(**SAID, sequence_bias={(45, 67): -0.6, (89,): 1.2})
    config.save_pretrained(tmp_path, **naming)
    assert [p.name for p in tmp_path.iterdir()] == [next(iter(naming.values()), "generation_config.json")]
    read = gptneo_fast.GenerationConfig.from_pretrained(tmp_path, **naming)
    assert {k: getattr(read, k) for k in SAID} == SAID
    assert gptneo_fast.GenerationConfig.from_pretrained(tmp_path, temperature=1.5, **naming).temperature == 1.5
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GenerationConfig.from_pretrained(tmp_path, config_file_name=next(iter(naming.values()), None))
    assert {k: getattr(theirs, k) for k in SAID} == SAID
    assert read.to_diff_dict() == {k: v for k, v in theirs.to_diff_dict().items() if k != "transformers_version"}


def test_a_folder_without_the_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json"):
        gptneo_fast.GenerationConfig.from_pretrained(tmp_path)
    gptneo_fast.GenerationConfig().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"foo\.json.*'generation_config\.json'"):
        gptneo_fast.GenerationConfig.from_pretrained(tmp_path, "foo.json")


@pytest.mark.parametrize("name", ["../foo.json", "a/b.json", 3])
def test_a_file_name_that_is_a_path_is_refused(tmp_path, name):
    config = gptneo_fast.GenerationConfig()
    with pytest.raises(InputError, match="config_file_name"):
        config.save_pretrained(tmp_path, name)
    with pytest.raises(InputError, match="config_file_name"):
        gptneo_fast.GenerationConfig.from_pretrained(tmp_path, name)
    with pytest.raises(InputError, match="config_fil_name"):
        config.save_pretrained(tmp_path, config_fil_name="foo.json")
    assert not list(tmp_path.iterdir())
