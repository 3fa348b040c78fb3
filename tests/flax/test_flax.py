"""The Flax classes beside our torch reference: random configurations, caches, padding; files; arguments."""

import json
import random
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
import flax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from flax.traverse_util import flatten_dict  # noqa: E402

from gptneo_fast.flax import FlaxGPTNeoForCausalLM, FlaxGPTNeoModel, attention, weights  # noqa: E402  # noqa: E402


def random_config(seed):
    draw = random.Random(seed)
    layers = [draw.choice(["global", "local"]) for _ in range(draw.randint(1, 4))]
    heads = draw.choice([2, 4, 8])
    return gptneo_fast.GPTNeoConfig(
        vocab_size=draw.randint(40, 130),
        hidden_size=heads * draw.choice([8, 16]),  # narrower, a norm of few numbers makes rounding errors large
        num_heads=heads,
        num_layers=len(layers),
        attention_types=[[layers, 1]],
        intermediate_size=draw.choice([None, 24]),
        max_position_embeddings=160,
        window_size=draw.choice([1, 2, 7, 16, 31]),
        tie_word_embeddings=draw.random() < 0.7,
        bos_token_id=1,
        eos_token_id=2,
    )


def pair(config, cls="GPTNeoForCausalLM", scale=0.08):
    """(ours in torch, ours in Flax with the same weights), attention peaked as in a trained model."""
    torch_model = getattr(gptneo_fast, cls)(config, backend="reference").eval()
    with torch.no_grad():
        for p in torch_model.parameters():
            p.copy_(torch.randn_like(p) * scale + (1 if p.dim() == 1 else 0))
    flax_model = {"GPTNeoForCausalLM": FlaxGPTNeoForCausalLM, "GPTNeoModel": FlaxGPTNeoModel}[cls](config, _do_init=False)
    flax_model._is_initialized = True
    flax_model.params = weights.from_torch(torch_model.state_dict(), config, flax_model._causal)
    return torch_model, flax_model


def ids_of(config, B, T, seed=0):
    return torch.randint(0, config.vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))


def close(flax_array, torch_tensor, relative=1e-5, where=...):
    """Held to the issue's bound: the largest error beside the largest value."""
    a, b = np.asarray(flax_array, np.float64)[where], torch_tensor.detach().double().numpy()[where]
    assert a.shape == b.shape
    assert np.abs(a - b).max() <= relative * np.abs(b).max()


@pytest.mark.parametrize("seed", range(5))
def test_logits_equal_the_reference_past_the_window(seed):
    config = random_config(seed)
    theirs, ours = pair(config)
    for T in (config.window_size + 1, 75):
        ids = ids_of(config, 2, T)
        want, got = theirs(ids).logits, ours(ids.numpy()).logits
        close(got, want)
        close(got[:, -1], want[:, -1])


@pytest.mark.parametrize("seed", range(3))
def test_cached_steps_equal_the_whole_however_the_text_is_cut(seed):
    config = random_config(seed)
    theirs, ours = pair(config)
    ids = ids_of(config, 2, 60)
    want = theirs(ids).logits
    cut = random.Random(seed).choice([(1, 20, 1, 3), (20, 1, 1, 40), (5, 5, 20, 1, 1), (40, 1, 1, 3)])
    cache, at = ours.init_cache(2, 60), 0
    while at < 60:
        n = min(cut[0], 60 - at)
        cut = (*cut[1:], 1) if len(cut) > 1 else cut
        out = ours(ids[:, at : at + n].numpy(), past_key_values=cache)
        close(out.logits, want[:, at : at + n])
        cache, at = out.past_key_values, at + n
    assert int(cache["index"]) == 60


@pytest.mark.parametrize("seed", [0, 3])
def test_left_padding_with_and_without_a_cache_equals_the_reference(seed):
    config = random_config(seed)
    theirs, ours = pair(config)
    ids, mask = ids_of(config, 3, 50), torch.ones(3, 50, dtype=torch.long)
    mask[1, :9], mask[2, :33] = 0, 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    want, real = theirs(ids, attention_mask=mask, position_ids=positions).logits, mask.bool().numpy()
    close(ours(ids.numpy(), mask.numpy(), positions.numpy()).logits, want, where=real)
    cache, outs = ours.init_cache(3, 50), []
    whole = mask.numpy()  # of all the cache's columns, as transformers' Flax classes want it
    for begin, end in ((0, 36), (36, 37), (37, 38), (38, 42), (42, 50)):
        part = slice(begin, end)
        out = ours(ids[:, part].numpy(), whole, positions[:, part].numpy(), past_key_values=cache)
        cache = out.past_key_values
        outs.append(out.logits)
    close(jnp.concatenate(outs, 1), want, where=real)


def test_a_row_that_sees_nothing_gives_zeros_and_no_nan():
    q = jnp.ones((1, 1, 2, 4))
    seen = jnp.array([[False, False], [True, False]])[None, None]
    out, weights_ = attention.attend(q, q, q * 3, seen)
    assert np.array_equal(out[0, 0, 0], np.zeros(4)) and np.array_equal(out[0, 0, 1], np.full(4, 3))
    assert np.array_equal(weights_[0, 0], [[0, 0], [1, 0]])


def test_local_layers_keep_a_window_of_slots_and_no_more():
    config = gptneo_fast.GPTNeoConfig(hidden_size=64, num_heads=4, num_layers=4)
    model = FlaxGPTNeoModel(config, _do_init=False)
    cache = jax.eval_shape(lambda: model.init_cache(2, 2048))
    assert [cache["keys"][str(i)].shape[2] for i in range(4)] == [2048, 256, 2048, 256]
    numbers = sum(x.size for x in jax.tree_util.tree_leaves(cache)) - 1  # one is the index
    assert numbers == 0.5625 * 2 * 4 * 2 * 2048 * 64


def test_the_real_window_of_256_is_kept_by_rings_and_bands():
    config = gptneo_fast.GPTNeoConfig(**(SMALL | dict(window_size=256, hidden_size=16, num_heads=2)))
    theirs, ours = pair(config, scale=0.3)
    ids = ids_of(config, 1, 600)
    want = theirs(ids).logits
    close(ours(ids.numpy()).logits, want)
    out = ours(ids[:, :594].numpy(), past_key_values=ours.init_cache(1, 600))
    for at in range(594, 600):
        out = ours(ids[:, at : at + 1].numpy(), past_key_values=out.past_key_values)
        close(out.logits, want[:, at : at + 1])


def test_hidden_states_and_attentions_equal_the_reference():
    config = gptneo_fast.GPTNeoConfig(**SMALL)
    theirs, ours = pair(config, "GPTNeoModel")
    ids = ids_of(config, 2, 20)
    want = theirs(ids, output_hidden_states=True, output_attentions=True)
    got = ours(ids.numpy(), output_hidden_states=True, output_attentions=True)
    close(got.last_hidden_state, want.last_hidden_state)
    assert len(got.hidden_states) == 4 and len(got.attentions) == 3
    for a, b in zip(got.hidden_states, want.hidden_states, strict=True):
        close(a, b)
    for a, b in zip(got.attentions, want.attentions, strict=True):
        close(a, b)
    as_tuple = ours(ids.numpy(), return_dict=False)
    assert len(as_tuple) == 1
    close(as_tuple[0], want.last_hidden_state)
    assert got[0] is got["last_hidden_state"]


def test_gradients_equal_the_references():
    config = gptneo_fast.GPTNeoConfig(**SMALL)
    theirs, ours = pair(config)
    ids = ids_of(config, 2, 30)

    def loss(params):
        logits = ours(ids.numpy(), params=params).logits[:, :-1]
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(ids.numpy())[:, 1:, None], -1)
        return -chosen.mean()

    got = jax.grad(loss)(ours.params)
    torch.nn.functional.cross_entropy(theirs(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    grads = weights.from_torch({n: p.grad for n, p in theirs.named_parameters()}, config, True)
    for path, g in flatten_dict(grads).items():
        close(flatten_dict(got)[path], torch.from_numpy(np.array(g)), relative=1e-4)


def test_dropout_needs_a_key_and_train_and_is_drawn_from_the_key():
    config = gptneo_fast.GPTNeoConfig(**(SMALL | dict(resid_dropout=0.5, attention_dropout=0.3, embed_dropout=0.1)))
    _, ours = pair(config)
    ids, key = ids_of(config, 1, 12).numpy(), jax.random.PRNGKey
    with pytest.raises(InputError, match="dropout_rng"):
        ours(ids, train=True)
    plain = ours(ids).logits
    one, again, two = (ours(ids, train=True, dropout_rng=key(k)).logits for k in (0, 0, 1))
    assert np.array_equal(one, again) and not np.allclose(one, two) and not np.allclose(one, plain)
    assert np.array_equal(ours(ids, dropout_rng=key(0)).logits, plain)


def test_bfloat16_errs_by_no_more_than_torch_in_bfloat16():
    config = gptneo_fast.GPTNeoConfig(**SMALL)
    theirs, ours = pair(config)
    ids = ids_of(config, 2, 40)
    exact = theirs.double()(ids).logits.detach().numpy()
    usual = np.abs(theirs.bfloat16()(ids).logits.detach().float().numpy() - exact)
    low = FlaxGPTNeoForCausalLM(config, dtype=jnp.bfloat16, _do_init=False)
    logits = low(ids.numpy(), params=ours.to_bf16(ours.params)).logits
    assert logits.dtype == jnp.bfloat16
    error = np.abs(np.asarray(logits, np.float64) - exact)
    assert error.max() <= 2 * usual.max() and error.mean() <= 1.5 * usual.mean()


def test_casts_make_new_trees_and_follow_their_mask():
    ours = FlaxGPTNeoModel(gptneo_fast.GPTNeoConfig(**SMALL))
    low = ours.to_bf16(ours.params)
    assert {x.dtype for x in jax.tree_util.tree_leaves(low)} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree_util.tree_leaves(ours.params)} == {jnp.dtype("float32")}
    mask = jax.tree_util.tree_map(lambda x: x.ndim > 1, ours.params)
    half = ours.to_fp16(flax.core.freeze(ours.params), mask)
    assert half["ln_f"]["scale"].dtype == jnp.float32 and half["wte"]["embedding"].dtype == jnp.float16
    assert ours.to_fp32(low)["wte"]["embedding"].dtype == jnp.float32


# Files


def same_tree(a, b):
    a, b = flatten_dict(a), flatten_dict(b)
    assert a.keys() == b.keys()
    for path in a:
        assert a[path].dtype == b[path].dtype and np.array_equal(a[path], b[path]), path


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("options", [{}, {"max_shard_size": "40KB"}, {"safe_serialization": True}])
def test_what_is_saved_loads_in_flax_and_in_torch_without_a_bit_changed(tmp_path, dtype, options):
    _, ours = pair(gptneo_fast.GPTNeoConfig(**SMALL))
    tree = weights.cast(ours.params, dtype)
    ours.save_pretrained(tmp_path, params=tree, **options)
    files = {p.name for p in tmp_path.iterdir()}
    assert ("model.safetensors" in files) == bool(options.get("safe_serialization"))
    assert ("flax_model.msgpack.index.json" in files) == ("max_shard_size" in options)
    loaded = FlaxGPTNeoForCausalLM.from_pretrained(tmp_path)
    same_tree(loaded.params, tree)
    torch_model = gptneo_fast.GPTNeoForCausalLM.from_pretrained(tmp_path)
    same_tree(weights.from_torch(torch_model.state_dict(), ours.config, True), tree)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["GPTNeoForCausalLM"]


def test_saving_again_in_one_file_leaves_no_shards(tmp_path):
    _, ours = pair(gptneo_fast.GPTNeoConfig(**SMALL))
    ours.save_pretrained(tmp_path, max_shard_size="40KB")
    ours.save_pretrained(tmp_path)
    names = {p.name for p in tmp_path.iterdir()}
    assert "flax_model.msgpack" in names and not any("-of-" in name or "index" in name for name in names)


def test_flax_serialization_restores_what_is_saved(tmp_path):
    _, ours = pair(gptneo_fast.GPTNeoConfig(**SMALL))
    ours.save_pretrained(tmp_path)
    tree = flax.serialization.msgpack_restore((tmp_path / "flax_model.msgpack").read_bytes())
    same_tree(tree, jax.tree_util.tree_map(np.asarray, ours.params))
    names = {"/".join(path) for path in flatten_dict(tree)}
    assert {"transformer/h/0/attn/attention/q_proj/kernel", "transformer/wte/embedding", "transformer/ln_f/scale"} <= names
    assert tree["transformer"]["h"]["0"]["mlp"]["c_fc"]["kernel"].shape == (32, 128)  # [in, out]


def test_checkpoints_of_torch_load_and_a_base_model_takes_a_causal_ones_trunk(tmp_path):
    theirs, ours = pair(gptneo_fast.GPTNeoConfig(**SMALL))
    theirs.save_pretrained(tmp_path)
    same_tree(FlaxGPTNeoForCausalLM.from_pretrained(tmp_path, from_pt=True).params, ours.params)
    model, params = FlaxGPTNeoModel.from_pretrained(tmp_path, _do_init=False)
    same_tree(params, ours.params["transformer"])
    with pytest.raises(InputError, match="_do_init=False"):
        model.params  # noqa: B018
    ids = ids_of(ours.config, 1, 5)
    close(model(ids.numpy(), params=params).last_hidden_state, theirs.transformer(ids).last_hidden_state)


# Arguments


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


ODD = [5, -1, 10**400, 1.5, True, b"x", "x", [None], [[1], [1, 2]], [[10**400]], {}, np.array(3), np.array([["a"]])]
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
