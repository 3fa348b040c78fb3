"""generate() against transformers on the CPU in float32: equal token for token, with the same seed when sampling."""

import pytest
import torch

import gptneo_fast
from tests.support.peers import field_names, peers
from tests.support.prompts import PROMPTS, V, prompt

# Options of every kind; each row runs greedily and sampled, on single, batched and left-padded prompts.
OPTIONS = {
    "nothing": {},
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 3},
    "top_k 0": {"top_k": 0, "temperature": 2.0},
    "top_k beyond the vocabulary": {"top_k": 5000},
    "top_p": {"top_p": 0.5},
    "top_p 0": {"top_p": 0.0},
    "min_p": {"min_p": 0.2},
    "typical_p": {"typical_p": 0.4},
    "top_h": {"top_h": 0.4},
    "epsilon_cutoff": {"epsilon_cutoff": 0.03},
    "eta_cutoff": {"eta_cutoff": 0.03},
    "all warpers": {"temperature": 1.5, "top_k": 30, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.9, "epsilon_cutoff": 1e-3},
    "renormalize": {"renormalize_logits": True, "top_p": 0.8},
    "repetition_penalty": {"repetition_penalty": 1.7},
    "rewarded repetition": {"repetition_penalty": 0.6},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "no token twice": {"no_repeat_ngram_size": 1},
    "bad_words_ids": {"bad_words_ids": [[5], [7, 9], [2], [11, 12, 13]]},
    "sequence_bias": {"sequence_bias": {(5,): 4.0, (6, 7): -3.0, (8, 9, 10): 2.5}},
    "sequence_bias as a list": {"sequence_bias": [[[5], 4.0], [[6, 7], -3.0]]},
    "min_length": {"min_length": 20},
    "min_new_tokens": {"min_new_tokens": 8},
    "forced_bos": {"forced_bos_token_id": 5},
    "forced_eos": {"forced_eos_token_id": 2, "max_new_tokens": 9},
    "several forced eos": {"forced_eos_token_id": [2, 4], "max_new_tokens": 9},
    "suppress_tokens": {"suppress_tokens": list(range(3, 40))},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(3, 60))},
    "exponential_decay": {"exponential_decay_length_penalty": (3, 1.5)},
    "remove_invalid_values": {"remove_invalid_values": True},
    "several eos": {"eos_token_id": [2, 17, 40, 41, 42, 43]},
    "no eos": {"eos_token_id": None},
    "no top_k": {"top_k": None, "temperature": None, "top_p": None},
    "guidance": {"guidance_scale": 1.8},
    "max_length": {"max_length": 40},
    "no cache": {"use_cache": False},
    "chunked prefill": {"prefill_chunk_size": 4},
}


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    return peers(pad_token_id=0, scale=6.0)


def both(models, batch, seed=3, **options):
    out = []
    for model in models:
        torch.manual_seed(seed)
        out.append(model.generate(**batch, **options))
    return out


@pytest.mark.parametrize("strategy", ["greedy", "sample"])
@pytest.mark.parametrize("kind", PROMPTS)
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_gives_the_tokens_of_transformers(models, name, kind, strategy):
    options = dict(OPTIONS[name])
    if name == "chunked prefill" and kind == "padded":
        pytest.skip("transformers refuses chunks of padded prompts")
    if "max_length" not in options:
        options.setdefault("max_new_tokens", 24)
    for seed in (3, 4):
        a, b = both(models, prompt(kind), seed, do_sample=strategy == "sample", pad_token_id=0, **options)
        assert torch.equal(a, b)


SORTED = tuple(map(int, pytest.importorskip("transformers").__version__.split(".")[:2])) >= (5, 24)
BEAMS = {
    "3 beams": {"num_beams": 3},
    "all of them returned": {"num_beams": 4, "num_return_sequences": 4},
    "long ones": {"num_beams": 3, "length_penalty": 2.0},
    "short ones": {"num_beams": 3, "length_penalty": -1.0},
    "no length penalty, exact": {"num_beams": 3, "length_penalty": 0.0, "early_stopping": "never"},
    "exact": {"num_beams": 2, "early_stopping": "never"},
    "early": {"num_beams": 3, "early_stopping": True, "eos_token_id": [2, 17, 40, 41, 42, 43]},
    "several eos": {"num_beams": 2, "eos_token_id": list(range(2, 30))},
    "no eos": {"num_beams": 2, "eos_token_id": None},
    "processors": {"num_beams": 3, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "min_new_tokens": 5},
    "warpers": {"num_beams": 3, "top_k": 4, "top_p": 0.9, "temperature": 1.3, "eos_token_id": [2, 5, 6]},
    "no cache": {"num_beams": 3, "use_cache": False},
}


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("kind", PROMPTS)
@pytest.mark.parametrize("name", BEAMS)
def test_beams_give_the_tokens_scores_and_parents_of_transformers(models, name, kind, do_sample):
    if do_sample and not SORTED:
        pytest.skip("transformers before 5.24 left drawn beams unsorted")
    more = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "pad_token_id": 0}
    a, b = both(models, prompt(kind), do_sample=do_sample, max_new_tokens=20, **more, **BEAMS[name])
    assert torch.equal(a.sequences, b.sequences)
    torch.testing.assert_close(b.sequences_scores, a.sequences_scores, rtol=1e-4, atol=1e-4)
    assert torch.equal(a.beam_indices, b.beam_indices)
    assert field_names(a) == list(b)
    assert len(a.scores) == len(b.scores)
    for name in ("scores", "logits"):
        for x, y in zip(a[name], b[name], strict=True):
            torch.testing.assert_close(y, x, rtol=1e-4, atol=1e-3)
    theirs = models[0].compute_transition_scores(a.sequences, a.scores, a.beam_indices)
    torch.testing.assert_close(
        models[1].compute_transition_scores(b.sequences, b.scores, b.beam_indices), theirs, rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("kind", ["one", "padded"])
@pytest.mark.parametrize("do_sample", [False, True])
def test_past_the_window_of_256(kind, do_sample):
    models = peers(window_size=256, num_layers=2, scale=6.0, pad_token_id=0)
    a, b = both(models, prompt(kind, T=240), do_sample=do_sample, max_new_tokens=40, min_new_tokens=40)
    assert a.shape[1] == 280
    assert torch.equal(a, b)


@pytest.mark.parametrize("kind", PROMPTS)
def test_outputs_of_each_step_equal_transformers(models, kind):
    wanted = ("output_scores", "output_logits", "output_attentions", "output_hidden_states", "return_dict_in_generate")
    batch = prompt(kind)
    a, b = both(models, batch, max_new_tokens=6, do_sample=True, top_k=5, **dict.fromkeys(wanted, True))
    assert field_names(a) == list(b)
    assert torch.equal(a.sequences, b.sequences)
    for name in ("scores", "logits"):
        for x, y in zip(a[name], b[name], strict=True):
            torch.testing.assert_close(y, x, rtol=1e-4, atol=1e-4)
    for name in ("attentions", "hidden_states"):
        for step, (x, y) in enumerate(zip(a[name], b[name], strict=True)):
            real = batch["attention_mask"].bool() if step == 0 else torch.ones(len(a.sequences), 1, dtype=torch.bool)
            for u, v in zip(x, y, strict=True):
                u, v = (t.transpose(1, 2) if name == "attentions" else t for t in (u, v))
                torch.testing.assert_close(v[real], u[real], rtol=1e-4, atol=1e-4)
    assert b.past_key_values.get_seq_length() == b.sequences.shape[1] - 1
    torch.testing.assert_close(
        models[1].compute_transition_scores(b.sequences, b.scores, normalize_logits=True),
        models[0].compute_transition_scores(a.sequences, a.scores, normalize_logits=True),
        rtol=1e-4, atol=1e-4,
    )  # fmt: skip


@pytest.mark.parametrize("kind", PROMPTS)
def test_num_return_sequences(models, kind):
    a, b = both(models, prompt(kind), do_sample=True, num_return_sequences=3, max_new_tokens=9)
    assert torch.equal(a, b)
    assert len(a) == 3 * len(prompt(kind)["input_ids"])


def test_token_types_positions_embeddings_and_a_cache_of_an_earlier_call(models):
    batch = prompt("padded")
    types = torch.randint(3, V, batch["input_ids"].shape)
    a, b = both(models, batch, token_type_ids=types, max_new_tokens=8)
    assert torch.equal(a, b)
    a, b = both(models, prompt("batch"), position_ids=torch.arange(7, 18)[None].expand(3, -1), max_new_tokens=8)
    assert torch.equal(a, b)

    embeds = models[0].get_input_embeddings()(prompt("batch")["input_ids"]).detach()
    a, b = both(models, {"inputs_embeds": embeds}, max_new_tokens=8)
    assert torch.equal(a, b) and a.shape == (3, 8)

    whole = prompt("batch", T=30)["input_ids"]
    out = []
    for model in models:
        past = model(whole[:, :20], use_cache=True).past_key_values
        out.append(model.generate(whole, past_key_values=past, max_new_tokens=8))
    assert torch.equal(*out)
    assert torch.equal(out[1], models[1].generate(whole, max_new_tokens=8))
    past = models[1](whole[:, :20]).past_key_values
    rest = models[1].generate(whole[:, 20:], attention_mask=torch.ones(3, 30), past_key_values=past, max_new_tokens=8)
    assert torch.equal(rest, out[1][:, 20:])


def test_a_users_processors_criteria_and_prefix_function(models):
    def only_even(ids, scores):
        scores = scores.clone()
        scores[:, 1::2] = -float("inf")
        return scores

    def ends_in_40(ids, scores, **kwargs):
        return ids[:, -1] == 40

    def prefix(row, ids):
        return [3 + row, 5, 6, (int(ids[-1]) + 1) % V]

    for more in (
        {"logits_processor": [only_even]},
        {"logits_processor": [only_even], "num_beams": 2},
        {"prefix_allowed_tokens_fn": prefix},
        {"prefix_allowed_tokens_fn": prefix, "num_beams": 3},
        {"prefix_allowed_tokens_fn": prefix, "bad_words_ids": [[3], [4], [5], [6]], "top_k": 2},
    ):
        for do_sample in (False, True):
            a, b = both(models, prompt("batch"), do_sample=do_sample, max_new_tokens=12, **more)
            assert torch.equal(a, b), more
    from transformers import StoppingCriteriaList as Theirs

    a = models[0].generate(**prompt("one"), stopping_criteria=Theirs([ends_in_40]), max_new_tokens=50)
    b = models[1].generate(**prompt("one"), stopping_criteria=gptneo_fast.StoppingCriteriaList([ends_in_40]), max_new_tokens=50)
    assert torch.equal(a, b) and int(b[0, -1]) == 40 and b.shape[1] < 61


def test_the_same_seed_option_gives_the_same_text_and_leaves_torchs_generator_alone(models):
    _, model = models
    state = torch.get_rng_state()
    a = model.generate(**prompt("one"), do_sample=True, seed=7, max_new_tokens=30)
    assert torch.equal(a, model.generate(**prompt("one"), do_sample=True, seed=7, max_new_tokens=30))
    assert not torch.equal(a, model.generate(**prompt("one"), do_sample=True, seed=8, max_new_tokens=30))
    assert torch.equal(state, torch.get_rng_state())


def test_pad_tokens_are_told_from_the_ids_only_where_pad_is_not_eos(models):
    batch = prompt("padded")
    for pad in (0, 2):
        a, b = both(models, {"input_ids": batch["input_ids"]}, pad_token_id=pad, max_new_tokens=12)
        assert torch.equal(a, b)


def test_no_prompt_begins_with_bos(models):
    a, b = both(models, {}, max_new_tokens=9)
    assert torch.equal(a, b) and int(b[0, 0]) == 1


def test_max_time_ends_the_text(models):
    out = models[1].generate(**prompt("one"), max_time=1e-9, max_new_tokens=200, eos_token_id=None)
    assert out.shape[1] == 12


def test_a_generation_config_is_beaten_by_keywords_and_beats_the_models_own(models):
    from transformers import GenerationConfig as Theirs

    values = {"do_sample": True, "top_k": 4, "max_new_tokens": 9, "pad_token_id": 0, "eos_token_id": 2}
    out = []
    for model, kind in zip(models, (Theirs, gptneo_fast.GenerationConfig), strict=True):
        torch.manual_seed(0)
        out.append(model.generate(prompt("one")["input_ids"], generation_config=kind(**values), max_new_tokens=11))
    assert torch.equal(*out) and out[1].shape[1] == 22
    _, model = models
    before = model.generation_config
    model.generation_config = gptneo_fast.GenerationConfig(max_length=15, eos_token_id=None)
    assert model.generate(prompt("one")["input_ids"]).shape[1] == 15
    assert model.generate(prompt("one")["input_ids"], max_new_tokens=2).shape[1] == 13
    model.generation_config = before
    assert model.generate(prompt("one")["input_ids"], eos_token_id=None).shape[1] == 31


def test_generation_config_json_goes_both_ways(tmp_path):
    from transformers import GenerationConfig as Theirs

    values = {"do_sample": True, "temperature": 0.7, "eos_token_id": [2, 3], "bad_words_ids": [[1, 2]], "max_new_tokens": 7}
    Theirs(**values).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(gptneo_fast.GPTNeoConfig().to_json_string())
    ours = gptneo_fast.GenerationConfig.from_pretrained(tmp_path, top_p=0.9)
    assert ours.to_dict() == values | {"top_p": 0.9}
    ours.save_pretrained(tmp_path)
    theirs = Theirs.from_pretrained(tmp_path)
    assert {k: getattr(theirs, k) for k in ours.to_dict()} == ours.to_dict()
    biased = gptneo_fast.GenerationConfig(sequence_bias={(1, 2): 0.5})
    biased.save_pretrained(tmp_path)
    assert gptneo_fast.GenerationConfig.from_pretrained(tmp_path).sequence_bias == [[[1, 2], 0.5]]


@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_a_loop_of_ones_own_over_prepared_inputs_gives_the_tokens_of_generate(padded):
    _, ours = peers()
    ids = torch.randint(3, 97, (2, 6))
    mask = torch.ones_like(ids)
    mask[1, : 3 * padded] = 0
    expected = ours.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False, eos_token_id=None)
    for more in ({}, {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}):
        if padded and not more:
            continue  # columns are counted then, padding among them
        text, keywords = ids, {"attention_mask": mask, "use_cache": True, **more}
        for _ in range(9):
            out = ours(**ours.prepare_inputs_for_generation(text, **keywords))
            text = torch.cat([text, out.logits[:, -1:].argmax(-1)], 1)
            keywords = ours._update_model_kwargs_for_generation(out, keywords)
        assert torch.equal(text, expected)
        assert out.past_key_values.get_seq_length() == 14 and keywords["attention_mask"].shape == text.shape


def test_a_negative_prompt_is_counted_in_columns_whatever_its_mask_hides():
    theirs, ours = peers()
    ids, negative = torch.randint(3, 97, (2, 12)), torch.randint(3, 97, (2, 6))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    how = dict(negative_prompt_ids=negative, negative_prompt_attention_mask=mask, guidance_scale=2.0, max_new_tokens=12)
    assert torch.equal(ours.generate(ids, do_sample=False, **how), theirs.generate(ids, do_sample=False, **how))


@pytest.mark.parametrize("shortest", [5, 14])
def test_the_columns_of_embeddings_count_to_a_shortest_length(shortest):
    theirs, ours = peers()
    ids = torch.randint(3, 97, (2, 12))
    how = dict(min_length=shortest, eos_token_id=list(range(50)), pad_token_id=0, max_new_tokens=20, do_sample=False)
    found = [model.generate(inputs_embeds=model.get_input_embeddings()(ids), **how) for model in (theirs, ours)]
    assert torch.equal(found[1], found[0])


def test_a_generation_config_of_transformers_may_stand_on_the_model(tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs, ours = peers()
    ids = torch.randint(3, 97, (2, 5))
    for model in (theirs, ours):
        model.generation_config = transformers.GenerationConfig(max_new_tokens=7, do_sample=False, pad_token_id=0)
    assert torch.equal(ours.generate(ids), theirs.generate(ids))
    ours.generation_config.max_new_tokens = 3  # the user's own object
    assert ours.generate(ids).shape == (2, 8)
    ours.save_pretrained(tmp_path)
    assert gptneo_fast.GPTNeoForCausalLM.from_pretrained(tmp_path).generation_config.max_new_tokens == 3
