"""generate() in JAX beside torch's: tokens of every option, draws from the right distribution, nothing compiled twice."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import gptneo_fast
from gptneo_fast.errors import InputError, UnknownOptionError
from tests.support.peers import SMALL

jax = pytest.importorskip("jax")
pytest.importorskip("flax")
import jax.numpy as jnp  # noqa: E402

from gptneo_fast.flax import FlaxGPTNeoModel, decoding, scores  # noqa: E402
from gptneo_fast.flax.scores import Knobs, Rules  # noqa: E402
from gptneo_fast.generation import warpers  # noqa: E402
from tests.flax.test_flax import ids_of, pair  # noqa: E402


@pytest.fixture(scope="module")
def models():
    """The same small model in torch and in Flax, with an end token that comes up now and then."""
    torch.manual_seed(5)
    return pair(gptneo_fast.GPTNeoConfig(**SMALL), scale=0.2)


def prompts(B=3, T=6):
    """(ids, mask) with left padding in two rows."""
    ids, mask = ids_of(gptneo_fast.GPTNeoConfig(**SMALL), B, T, seed=2), torch.ones(B, T, dtype=torch.long)
    mask[1:2, :2], mask[2:3, :4] = 0, 0
    return ids, mask


def same_tokens(models, margin=1e-3, **options):
    """Flax gives torch's tokens; a row is let go where two candidates are too close to rank."""
    theirs, ours = models
    ids, mask = prompts()
    want = theirs.generate(
        ids, attention_mask=mask, return_dict_in_generate=True, output_scores=True, pad_token_id=0, **options
    )
    got = np.asarray(ours.generate(ids.numpy(), attention_mask=mask.numpy(), pad_token_id=0, **options).sequences)
    compared = 0
    for row in range(len(ids)):
        for step, points in enumerate(want.scores):
            best = points[row].topk(2).values
            if best[0] - best[1] < margin and best[0].isfinite():
                break
            column = ids.shape[1] + step
            assert got[row, column] == want.sequences[row, column], (row, step)
            compared += 1
    assert not got[:, want.sequences.shape[1] :].any()  # padding
    assert compared > len(ids) * len(want.scores) // 2
    return want.sequences


GREEDY = [
    {"eos_token_id": [13, 22, 57]},
    {"max_length": 9},
    {"min_new_tokens": 12, "eos_token_id": [13, 22, 57]},
    {"min_length": 11, "eos_token_id": 13},
    {"repetition_penalty": 1.7},
    {"no_repeat_ngram_size": 3},
    {"forced_eos_token_id": 9},
    {"suppress_tokens": [13, 22]},
    {"begin_suppress_tokens": [13, 22, 57, 60]},
]


@pytest.mark.filterwarnings("ignore:max_length has no say")
@pytest.mark.parametrize("options", GREEDY, ids=str)
def test_greedy_tokens_equal_torchs(models, options):
    same_tokens(models, **({"max_new_tokens": 24, "eos_token_id": None} | options))


def test_greedy_goes_on_past_the_window_of_256():
    config = gptneo_fast.GPTNeoConfig(**(SMALL | dict(window_size=256)))
    theirs, ours = pair(config, scale=0.2)
    ids = ids_of(config, 1, 250)
    want = theirs.generate(ids, max_new_tokens=40, eos_token_id=None, return_dict_in_generate=True, output_scores=True)
    gaps = [float(s.topk(2).values[0] @ torch.tensor([1.0, -1.0])) for s in want.scores]
    sure = next((i for i, gap in enumerate(gaps) if gap < 1e-3), 40)
    got = ours.generate(ids.numpy(), max_new_tokens=40, eos_token_id=None).sequences
    assert sure > 20 and np.array_equal(got[0, : 250 + sure], want.sequences[0, : 250 + sure])


@pytest.mark.parametrize(
    "options",
    [
        {"eos_token_id": None},
        {"eos_token_id": [13, 22], "early_stopping": True, "length_penalty": 0.5},
        {"eos_token_id": 13, "early_stopping": "never", "length_penalty": 2.0},
        {"eos_token_id": [13, 22], "length_penalty": -1.0, "num_return_sequences": 3},
    ],
    ids=str,
)
def test_beams_equal_torchs(models, options):
    theirs, ours = models
    ids, mask = prompts()
    options = options | {"num_beams": 3, "max_new_tokens": 14, "pad_token_id": 0}
    want = theirs.generate(ids, attention_mask=mask, **options)
    out = ours.generate(ids.numpy(), attention_mask=mask.numpy(), **options)
    assert np.array_equal(out.sequences[:, : want.shape[1]], want)
    assert not np.asarray(out.sequences)[:, want.shape[1] :].any() and out.scores.shape == (len(want),)


def test_a_beams_score_is_the_log_probability_of_its_tokens(models):
    theirs, ours = models
    ids, _ = prompts()
    out = ours.generate(ids.numpy(), num_beams=2, max_new_tokens=8, eos_token_id=None)
    sequences = torch.from_numpy(np.array(out.sequences)).long()
    log_probs = theirs(sequences).logits[:, ids.shape[1] - 1 : -1].log_softmax(-1)
    total = log_probs.gather(-1, sequences[:, ids.shape[1] :, None]).sum((1, 2))
    np.testing.assert_allclose(out.scores, total.detach(), rtol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7, "top_k": 0},
        {"top_k": 5},
        {"top_k": 0, "top_p": 0.8},
        {"top_k": 20, "top_p": 0.6, "temperature": 1.4},
        {"top_k": 0, "min_p": 0.05},
        {"top_k": 200, "top_p": 0.9, "min_p": 0.02},
    ],
    ids=str,
)
def test_what_may_be_drawn_and_how_likely_equals_torchs_warpers(options):
    points = torch.randn(4, 97, generator=torch.Generator().manual_seed(1)) * 2
    config = gptneo_fast.GenerationConfig(do_sample=True, **options).resolved()
    want = points
    for warper in warpers.warpers_of(config):
        want = warper(None, want)
    rules = Rules(temperature=config.temperature != 1, top_k=config.top_k, top_p=config.top_p < 1, min_p=bool(config.min_p))
    got = np.asarray(
        scores.warp(rules, Knobs(1.0, config.temperature, config.top_p, config.min_p), jnp.asarray(points.numpy()))
    )
    assert np.array_equal(np.isfinite(got), want.isfinite().numpy())
    np.testing.assert_allclose(jax.nn.softmax(got), want.softmax(-1), rtol=1e-5, atol=1e-7)


def test_sampling_draws_each_token_as_often_as_it_is_likely(models):
    theirs, ours = models
    ids, _ = prompts(1)
    out = ours.generate(
        ids.numpy(), do_sample=True, top_k=8, temperature=3.0, max_new_tokens=1, num_return_sequences=20000, seed=3
    )
    drawn = np.bincount(np.asarray(out.sequences)[:, -1], minlength=97) / 20000
    points = theirs(ids).logits[0, -1] / 3.0
    likely = torch.where(points >= points.topk(8).values[-1], points, -torch.inf).softmax(-1).detach().numpy()
    assert (drawn[likely == 0] == 0).all()
    spread = np.sqrt(likely * (1 - likely) / 20000)
    assert (np.abs(drawn - likely) <= 5 * spread + 1e-9).all() and (likely > 0.01).sum() > 2


def test_a_key_or_a_seed_fixes_the_draws(models):
    ours, ids = models[1], prompts()[0].numpy()

    def draw(**options):
        return np.asarray(ours.generate(ids, do_sample=True, temperature=2.0, max_new_tokens=12, **options).sequences)

    assert np.array_equal(draw(seed=7), draw(prng_key=jax.random.PRNGKey(7)))
    assert np.array_equal(draw(), draw(seed=0)) and not np.array_equal(draw(seed=7), draw(seed=8))


def test_a_draw_follows_the_keys_as_transformers_flax_classes_split_them(models):
    theirs, ours = models
    ids, key = prompts(1)[0], jax.random.PRNGKey(11)
    got = ours.generate(ids.numpy(), do_sample=True, top_k=0, max_new_tokens=6, prng_key=key, eos_token_id=None).sequences
    text = ids
    for _ in range(6):
        key_now, key = jax.random.split(key)
        token = jax.random.categorical(key_now, jnp.asarray(theirs(text).logits[:, -1].detach().numpy()))
        text = torch.cat([text, torch.tensor(np.array(token))[:, None]], 1)
    assert np.array_equal(got, text)


def test_other_weights_and_strengths_compile_nothing_anew(models):
    ours, ids = models[1], prompts()[0].numpy()

    def draw(params=None, **options):
        return np.asarray(ours.generate(ids, do_sample=True, max_new_tokens=9, params=params, **options).sequences)

    first = draw(temperature=0.9, top_p=0.9)
    compiled = decoding.search._cache_size()
    half = jax.tree_util.tree_map(lambda x: x / 2, ours.params)
    assert not np.array_equal(first, draw(half, temperature=1.5, top_p=0.7, seed=4))
    assert decoding.search._cache_size() == compiled


def test_without_tracing_the_tokens_are_the_same(models):
    ours, ids = models[1], prompts(1, 3)[0].numpy()
    eager = ours.generate(ids, max_new_tokens=3, trace=False).sequences
    assert np.array_equal(eager, ours.generate(ids, max_new_tokens=3).sequences)


def test_processors_of_the_user_see_the_columns_filled_and_change_the_choice(models):
    ours, ids = models[1], prompts()[0].numpy()

    def count(sequences, points, filled):
        return jnp.where(jnp.arange(97) == filled, points + 1e6, points)

    out = ours.generate(ids, max_new_tokens=5, logits_processor=[count], eos_token_id=None).sequences
    assert np.array_equal(out[:, 6:], np.tile(np.arange(6, 11), (3, 1)))


def test_nothing_more_to_generate_gives_the_prompt(models):
    ids = prompts()[0].numpy()
    assert np.array_equal(models[1].generate(ids, max_new_tokens=0).sequences, ids)


def test_generate_inside_jit_equals_generate_outside(models):
    ours, ids = models[1], prompts()[0].numpy()
    inside = jax.jit(lambda ids, params: ours.generate(ids, params=params, max_new_tokens=7).sequences)(ids, ours.params)
    assert np.array_equal(inside, ours.generate(ids, max_new_tokens=7).sequences)


def test_the_embedded_model_tells_the_same_story_in_flax():
    from gptneo_fast.demo import FOLDER

    theirs = gptneo_fast.load(FOLDER, device="cpu", dtype="float32")
    ours = gptneo_fast.FlaxGPTNeoForCausalLM.from_pretrained(FOLDER)
    ids = theirs.tokenizer("Once upon a time", return_tensors="np").input_ids
    want = theirs.generate(torch.from_numpy(ids), max_new_tokens=60)
    got = ours.generate(ids, max_new_tokens=60).sequences
    assert np.array_equal(got[:, : want.shape[1]], want)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"max_new_token": 3}, UnknownOptionError, "did you mean 'max_new_tokens'"),
        ({"max_new_tokens": 700}, InputError, "640 positions"),
        ({"max_length": 6}, InputError, "the prompt has 6 tokens and max_length is 6"),
        ({"num_beams": 2, "do_sample": True}, InputError, "beam sampling"),
        ({"stop_strings": "x"}, InputError, "stop_strings='x' is not offered in Flax"),
        ({"bad_words_ids": [[1]]}, InputError, "bad_words_ids"),
        ({"typical_p": 0.5}, InputError, "typical_p=0.5"),
        ({"use_cache": False}, InputError, "use_cache=False"),
        ({"temperature": -1.0, "do_sample": True}, InputError, "temperature"),
        ({"attention_mask": np.ones((3, 5))}, InputError, "expected [3, 6]"),
        ({"attention_mask": np.zeros((3, 6))}, InputError, "row 0 of attention_mask is all zero"),
        ({"attention_mask": np.eye(3, 6)}, InputError, "ends in padding"),
        ({"logits_processor": [3]}, InputError, "logits_processor holds a int"),
    ],
    ids=str,
)
def test_a_wrong_option_is_refused_before_anything_runs(models, options, error, words):
    with pytest.raises(error) as caught:
        models[1].generate(prompts()[0].numpy(), **options)
    assert words in str(caught.value)


def test_the_example_tells_a_story():
    example = Path(gptneo_fast.__file__).parents[1] / "examples" / "flax_generate.py"
    done = subprocess.run([sys.executable, example], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Once upon a time") and len(done.stdout.split()) > 25


def test_the_base_model_has_no_generate():
    assert not FlaxGPTNeoModel.can_generate() and gptneo_fast.FlaxGPTNeoForCausalLM.can_generate()
