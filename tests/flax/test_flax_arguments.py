"""What the Flax classes say of wrong arguments, of what is set on their configuration, and where there is no jax."""

import subprocess
import sys

import numpy as np
import pytest
import torch

import gptneo_fast
from gptneo_fast.errors import CacheError, ConfigError, GPTNeoFastError, InputError
from tests.support.peers import SMALL

jax = pytest.importorskip("jax")
pytest.importorskip("flax")
import jax.numpy as jnp  # noqa: E402
from flax.traverse_util import flatten_dict  # noqa: E402

from gptneo_fast.flax import FlaxGPTNeoForCausalLM, FlaxGPTNeoModel  # noqa: E402
from tests.flax.test_flax import ids_of, same_tree  # noqa: E402


@pytest.fixture(scope="module")
def small():
    return FlaxGPTNeoForCausalLM(gptneo_fast.GPTNeoConfig(**SMALL), seed=3)


def test_fresh_weights_have_the_spread_of_the_configuration_and_follow_the_seed(small):
    flat = flatten_dict(small.params, sep="/")
    kernel = np.asarray(flat["transformer/h/0/mlp/c_fc/kernel"])
    assert 0.018 < kernel.std() < 0.022 and abs(kernel.mean()) < 0.002
    assert (np.asarray(flat["transformer/ln_f/scale"]) == 1).all() and not np.asarray(flat["transformer/ln_f/bias"]).any()
    same_tree(small.params, FlaxGPTNeoForCausalLM(small.config, seed=3).params)
    other = FlaxGPTNeoForCausalLM(small.config, seed=4).params
    assert not np.array_equal(other["transformer"]["wte"]["embedding"], small.params["transformer"]["wte"]["embedding"])
    assert set(flatten_dict(small.params)) == small.required_params
    completed = small.init_weights(small.key, params={"transformer": {"ln_f": {"bias": jnp.full(32, 7.0)}}})
    assert (np.asarray(completed["transformer"]["ln_f"]["bias"]) == 7).all()


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda m: m([[1, 97]]), InputError, "input_ids[0, 1] is 97; it must be from 0 to 96"),
        (lambda m: m([[1, -1]]), InputError, "input_ids[0, 1] is -1"),
        (lambda m: m(jnp.ones((1, 2))), InputError, "float32"),
        (lambda m: m(jnp.ones(3, int)), InputError, "shape [3]"),
        (lambda m: m(jnp.ones((1, 641), int)), InputError, "640 positions"),
        (lambda m: m([[1, 2]], [[1, 1, 1]]), InputError, "attention_mask has shape [1, 3]; expected [1, 2]"),
        (lambda m: m([[1, 2]], position_ids=[[0, 640]]), InputError, "position_ids[0, 1] is 640"),
        (lambda m: m([[1, 2]], position_ids=[[0]]), InputError, "position_ids has shape [1, 1]"),
        (lambda m: m([[1, 2]], past_key_values=m.init_cache(2, 8)), CacheError, "has 2 rows and input_ids 1"),
        (lambda m: m([[1, 2, 3]], past_key_values=m.init_cache(1, 2)), CacheError, "0 held + 3 new do not fit"),
        (lambda m: m([[1]], past_key_values={"h": 1}), CacheError, "not what init_cache"),
        (lambda m: m([[1]], [[1]], past_key_values=m.init_cache(1, 8)), InputError, "expected [1, 8], of all the cache's"),
        (lambda m: m.init_cache(1, 641), InputError, "from 1 to 640"),
        (lambda m: m.init_cache(0, 4), InputError, "at least 1"),
        (lambda m: setattr(m, "params", {"transformer": {}}), InputError, "has no 'transformer/wte/embedding'"),
        (lambda m: setattr(m, "params", 3), InputError, "params is a int"),
        (lambda m: FlaxGPTNeoModel(m.config, dtype=jnp.int32), InputError, "int32 is not floating point"),
        (lambda m: FlaxGPTNeoModel({}), InputError, "config is a dict"),
    ],
)
def test_a_wrong_argument_is_named_with_its_limit(small, call, error, words):
    with pytest.raises(error) as caught:
        call(small)
    assert words in str(caught.value)


def test_a_call_inside_jit_equals_one_outside(small):
    ids = ids_of(small.config, 2, 9).numpy()
    inside = jax.jit(lambda ids, params: small(ids, params=params))(ids, small.params)
    np.testing.assert_allclose(inside.logits, small(ids).logits, rtol=1e-5, atol=1e-6)


def test_without_jax_the_names_say_what_to_install_and_the_rest_works():
    code = (
        "import sys; sys.modules['jax'] = None\n"
        "import gptneo_fast\n"
        "from gptneo_fast.errors import SetupError\n"
        "try:\n    gptneo_fast.FlaxGPTNeoModel\n"
        "except SetupError as error:\n    assert isinstance(error, ImportError); print(error)\n"
        "from gptneo_fast import *"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'gptneo-fast[flax]'" in done.stdout


def test_the_names_resolve_at_the_root():
    assert gptneo_fast.FlaxGPTNeoModel is FlaxGPTNeoModel
    assert gptneo_fast.FlaxGPTNeoForCausalLM is FlaxGPTNeoForCausalLM
    assert "FlaxGPTNeoModel" in dir(gptneo_fast)


def test_an_activation_that_is_not_computed_is_refused():
    with pytest.raises(InputError, match="activation_function 'relu' is not offered by the Flax classes"):
        gptneo_fast.FlaxGPTNeoModel(gptneo_fast.GPTNeoConfig(**SMALL, activation_function="relu"))


@pytest.mark.parametrize(
    "changes",
    [{"attention_layers": ["global", "global"]}, {"attention_types": [[["local"], 2]]}, {"resid_dropout": 0.5}],
    ids=str,
)
def test_what_is_set_on_the_configuration_counts_from_the_next_call_on(changes):
    config = gptneo_fast.GPTNeoConfig(**(SMALL | {"num_layers": 2, "attention_types": [[["global", "local"], 1]]}))
    model, ids = FlaxGPTNeoForCausalLM(config), np.arange(20).reshape(1, 20)
    how = dict(train=True, dropout_rng=jax.random.PRNGKey(0)) if "resid_dropout" in changes else {}
    before = model(ids, **how).logits
    for name, value in changes.items():
        setattr(model.config, name, value)
    fresh = FlaxGPTNeoForCausalLM(model.config.replace(), _do_init=False)
    np.testing.assert_array_equal(model(ids, **how).logits, fresh(ids, params=model.params, **how).logits)
    assert not np.array_equal(model(ids, **how).logits, before)
    np.testing.assert_array_equal(
        model.generate(ids, max_new_tokens=4).sequences, fresh.generate(ids, params=model.params, max_new_tokens=4).sequences
    )


@pytest.mark.parametrize("cls", [FlaxGPTNeoForCausalLM, FlaxGPTNeoModel])
def test_what_the_parameters_follow_and_options_of_generate_are_refused_on_the_configuration(cls):
    small = SMALL | {"num_layers": 2, "attention_types": [[["global", "local"], 1]]}
    ids = np.arange(5).reshape(1, 5)
    for name, value in {"hidden_size": 64, "num_heads": 2, "window_size": 3, "layer_norm_epsilon": 0.1}.items():
        with pytest.raises(ConfigError, match=f"{name} shapes the weights of a model that is built"):
            setattr(cls(gptneo_fast.GPTNeoConfig(**small)).config, name, value)
    for name, value in {"num_layers": 3, "vocab_size": 98, "tie_word_embeddings": False, "max_position_embeddings": 9}.items():
        model = cls(gptneo_fast.GPTNeoConfig(**small))
        setattr(model.config, name, value)
        calls = [model, model.generate] if model.can_generate() else [model]
        for call in calls:
            with pytest.raises(ConfigError, match=f"config.{name} is {value} and the model was built with"):
                call(ids)
        setattr(model.config, name, model._built[name])
        assert len(model(ids)) == 1
    for name, value in {"max_length": 9, "do_sample": True, "num_beams": 2, "temperature": 0.5, "output_scores": True}.items():
        with pytest.raises(ConfigError, match=rf"set model\.generation_config\.{name}"):
            setattr(cls(gptneo_fast.GPTNeoConfig(**small)).config, name, value)
    model.config = gptneo_fast.GPTNeoConfig(**(small | {"window_size": 3}))
    with pytest.raises(ConfigError, match=r"config\.window_size is 3"):
        model(ids)


ODD = [5, -1, 10**5000, 1.5, True, b"x", "x", [None], [[1], [1, 2]], [[10**5000]], {}, np.array(3), np.array([["a"]])]
ODD += [torch.tensor(1.5), object()]


def test_arguments_of_no_kind_that_is_taken_are_named():
    model = FlaxGPTNeoForCausalLM(gptneo_fast.GPTNeoConfig(**(SMALL | {"num_layers": 1, "attention_types": [[["local"], 1]]})))
    ids = np.array([[5, 6, 7]])
    calls = {
        name: lambda v, n=name: model(**({"input_ids": ids} | {n: v})) for name in ("attention_mask", "position_ids", "params")
    }
    for name in ("input_ids", "attention_mask", "params", "prng_key", "generation_config"):
        calls[f"generate {name}"] = lambda v, n=name: model.generate(**({"input_ids": ids, "max_new_tokens": 1} | {n: v}))
    calls["dropout_rng"] = lambda v: model(ids, train=True, dropout_rng=v)
    calls["init_cache"] = lambda v: model.init_cache(1, v if v not in (5, True) else "5")
    calls["dtype"] = lambda v: FlaxGPTNeoModel(model.config, dtype=v, _do_init=False)
    calls["seed"] = lambda v: FlaxGPTNeoModel(model.config, seed=v if v != 5 else "5", _do_init=False)
    for name, call in calls.items():
        for value in ODD:
            if isinstance(value, (np.ndarray, torch.Tensor)) and name in ("init_cache", "seed"):
                continue
            with pytest.raises(GPTNeoFastError):
                call(value)
    typed = model.generate(ids, max_new_tokens=3, do_sample=True, prng_key=jax.random.key(0)).sequences
    np.testing.assert_array_equal(typed, model.generate(ids, max_new_tokens=3, do_sample=True).sequences)
    np.testing.assert_array_equal(model(torch.tensor(ids)).logits, model(ids).logits)
