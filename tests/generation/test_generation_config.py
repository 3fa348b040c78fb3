"""GenerationConfig by itself: what is saved is read again, under any name, without a model beside it."""

import json
from contextlib import suppress

import pytest
import torch

import gptneo_fast
from gptneo_fast.errors import ConfigError, InputError, UnknownOptionError
from gptneo_fast.generation.options import NOT_OFFERED
from tests.support.peers import peers

SAID = {
    "do_sample": True,
    "temperature": 0.7,
    "length_penalty": 1.0,
    "bad_words_ids": [[1, 2, 3], [4, 5]],
    "eos_token_id": [2, 7],
}


def test_a_config_goes_to_one_file(tmp_path):
    gptneo_fast.GenerationConfig(**SAID).to_json_file(tmp_path / "mine.json")
    for library in (gptneo_fast, pytest.importorskip("transformers")):
        read = library.GenerationConfig.from_pretrained(tmp_path, config_file_name="mine.json")
        assert {k: getattr(read, k) for k in SAID} == SAID


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


SAVED = [  # options, and whether transformers writes them into a file
    {"do_sample": False, "temperature": 0.5},
    {"temperature": 0.5},
    {"do_sample": True, "temperature": 0.5},
    {"top_k": 10},
    {"top_k": 50, "top_p": 1.0, "temperature": 1.0},
    {"min_p": 0.1},
    {"top_h": 0.3},
    {"typical_p": 0.5},
    {"epsilon_cutoff": 0.1},
    {"eta_cutoff": 0.1},
    {"early_stopping": True},
    {"early_stopping": True, "num_beams": 2},
    {"length_penalty": 0.5, "num_beams": 1},
    {"length_penalty": 0.5, "num_beams": 3},
    {"output_scores": True},
    {"output_scores": True, "return_dict_in_generate": True},
    {"num_return_sequences": 2, "num_beams": 3},
    {"num_return_sequences": 4, "num_beams": 3},
    {"forced_eos_token_id": 3, "suppress_tokens": [3, 4]},
    {"forced_eos_token_id": [3, 5], "suppress_tokens": [3, 4]},
]


@pytest.mark.parametrize("options", SAVED, ids=str)
def test_options_that_contradict_each_other_are_not_saved_as_in_transformers(tmp_path, options):
    transformers = pytest.importorskip("transformers")
    saved = []
    for of in (transformers, gptneo_fast):
        with suppress(ValueError if of is transformers else InputError):
            of.GenerationConfig(**options).save_pretrained(tmp_path / of.__name__)
        saved.append((tmp_path / of.__name__).exists())
    assert saved[0] == saved[1]


def test_a_contradiction_that_a_file_has_is_saved_until_something_changes(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.5, "transformers_version": "5"}')
    read = gptneo_fast.GenerationConfig.from_pretrained(tmp_path)
    read.save_pretrained(tmp_path / "again")
    read.top_p = 0.3
    with pytest.raises(InputError, match=r"temperature=0\.5 has a say only with do_sample=True.*top_p=0\.3"):
        read.save_pretrained(tmp_path / "changed")
    assert not (tmp_path / "changed").exists()
    with pytest.warns(gptneo_fast.GPTNeoFastWarning, match="top_p=0.3"):
        read.validate()


def test_a_model_is_not_saved_with_a_contradiction(tmp_path):
    model = peers()[1]
    model.generation_config.temperature = 0.5
    with pytest.raises(InputError, match=r"temperature=0\.5"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    model.generation_config.do_sample = True
    model.save_pretrained(tmp_path / "model")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True},
        {"num_beams": 3},
        {"num_beams": 3, "do_sample": True},
        {"num_beams": 1, "prompt_lookup_num_tokens": 2},
        {"do_sample": True, "prompt_lookup_num_tokens": 2},
    ],
    ids=str,
)
def test_the_mode_of_a_generation_has_transformers_name(options):
    transformers = pytest.importorskip("transformers")
    ours, theirs = gptneo_fast.GenerationConfig(**options), transformers.GenerationConfig(**options)
    for assistant in (None, object()):
        assert ours.get_generation_mode(assistant) == theirs.get_generation_mode(assistant).value
    assert ours.get_generation_mode() is gptneo_fast.GenerationMode(theirs.get_generation_mode().value)


@pytest.mark.parametrize("name", NOT_OFFERED)
def test_an_option_of_transformers_that_is_not_offered_is_none_or_an_error(name):
    config = gptneo_fast.GenerationConfig(**{name: None})
    assert getattr(config, name) is None and name not in config.to_dict()
    for neutral in NOT_OFFERED[name][0]:
        assert getattr(gptneo_fast.GenerationConfig(**{name: neutral}), name) == neutral
    if name not in ("trust_remote_code", "disable_compile"):
        with pytest.raises(InputError, match=rf"{name}={{'a': 2}} is not offered: \w+"):
            gptneo_fast.GenerationConfig(**{name: {"a": 2}})
        with pytest.raises(InputError, match=rf"{name}='x' is not offered"):
            setattr(config, name, "x")


def test_what_is_no_option_is_named():
    with pytest.raises(UnknownOptionError, match="did you mean 'temperature'"):
        gptneo_fast.GenerationConfig(temperture=0.5)
    with pytest.raises(UnknownOptionError, match="streamer is an argument of generate"):
        gptneo_fast.GenerationConfig(streamer=None)
    with pytest.raises(AttributeError, match="did you mean 'num_beams'"):
        _ = gptneo_fast.GenerationConfig().num_beam


def test_every_option_of_transformers_is_known():
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GenerationConfig(max_new_tokens=3, num_beams=2).to_dict()
    ours = gptneo_fast.GenerationConfig(**theirs)  # with all that it holds beside options
    assert ours.to_dict() == {"max_new_tokens": 3, "num_beams": 2}
    model, ids = peers()[1], torch.tensor([[5, 6, 7]])
    found = model.generate(ids, transformers.GenerationConfig(max_new_tokens=3, num_beams=2))
    assert torch.equal(found, model.generate(ids, max_new_tokens=3, num_beams=2))


OLD = {"do_sample": True, "temperature": 0.3, "max_length": 17, "no_repeat_ngram_size": 3, "bad_words_ids": [[4, 5]]}


@pytest.mark.parametrize(
    "written",
    [
        OLD,
        {"use_cache": False},
        {"output_attentions": True},
        {"output_hidden_states": True, "top_k": 4},
        {"num_beam_groups": 1},
    ],
    ids=lambda written: next(iter(written)),
)
def test_a_config_json_of_old_says_how_to_generate_as_in_transformers(tmp_path, written):
    theirs, ids = peers(pad_token_id=0)[0], torch.tensor([[5, 6, 7]])
    theirs.config.save_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    place = tmp_path / "config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | written))
    theirs = type(theirs).from_pretrained(tmp_path)
    ours = gptneo_fast.GPTNeoForCausalLM.from_pretrained(tmp_path)
    unsaid = {"use_cache": True, "output_attentions": False, "output_hidden_states": False}  # or so, where theirs says it
    for name in ours.generation_config.__dataclass_fields__.keys() - {"seed"}:
        found, wanted = getattr(ours.generation_config, name), getattr(theirs.generation_config, name)
        assert found == wanted or (found is None and wanted == unsaid[name]), name
    found = []
    for model in (theirs, ours):
        torch.manual_seed(0)
        found.append(model.generate(ids, attention_mask=torch.ones_like(ids)))
    assert isinstance(found[0], torch.Tensor) == isinstance(found[1], torch.Tensor)
    assert torch.equal(*(out if isinstance(out, torch.Tensor) else out.sequences for out in found))
    ours.save_pretrained(tmp_path / "again")
    assert gptneo_fast.GenerationConfig.from_pretrained(tmp_path / "again") == ours.generation_config


def test_what_a_config_json_of_old_says_and_cannot_be_had_is_named():
    config = peers()[1].config
    with pytest.warns(gptneo_fast.GPTNeoFastWarning, match=r"penalty_alpha=0\.6 is not offered: .*; it is left out"):
        made = gptneo_fast.GenerationConfig.from_model_config(config.replace(penalty_alpha=0.6, top_k=4))
    assert made.top_k == 4 and made.penalty_alpha is None
    with pytest.raises(ConfigError, match=r"says of generation .* temperature=-3 is not a finite number"):
        gptneo_fast.GPTNeoForCausalLM(config.replace(temperature=-3))
