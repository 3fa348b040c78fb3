"""Models in 8 and 4 bits: the same models, true modules, and no change that is lost."""

import copy
import pickle

import pytest
import torch

import gptneo_fast
from gptneo_fast.demo import FOLDER
from gptneo_fast.errors import InputError, UnknownOptionError
from gptneo_fast.models.load import TASKS
from gptneo_fast.network.quantized import QuantizedEmbedding, QuantizedLinear
from gptneo_fast.ops.quantized import QuantizedWeight
from tests.support.peers import SMALL
from tests.support.serial import ids_of, lively, require_same, serial

NAMES = ["int8", "int4"]
IDS = torch.tensor([ids_of(20), ids_of(20, 1)])


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype is b[name].dtype and torch.equal(tensor, b[name]), name


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.mark.parametrize("task", TASKS)
def test_every_class_computes_what_its_weights_stand_for(task, name):
    model = TASKS[task](gptneo_fast.GPTNeoConfig(**SMALL, pad_token_id=0)).eval().quantize_(name)
    plain = copy.deepcopy(model).dequantize_()
    assert model.is_quantized and not plain.is_quantized and "quantization_config" not in vars(plain.config)
    assert {type(m) for m in plain.modules()}.isdisjoint({QuantizedLinear, QuantizedEmbedding, QuantizedWeight})
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            got, want = model(IDS)[0], plain(IDS)[0]
            assert got.requires_grad is grad
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    assert model.num_parameters() == plain.num_parameters()
    assert model.get_memory_footprint() < plain.get_memory_footprint()


def test_tokens_are_those_of_what_the_weights_stand_for(name):
    model = lively().quantize_(name)
    plain = copy.deepcopy(model).dequantize_()
    for n in (1, 7, 300):
        prompt = ids_of(n)
        require_same(plain, prompt, serial(model, prompt, max_new_tokens=40), serial(plain, prompt, max_new_tokens=40), 1e-2)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("rows", [1, 3])
def test_what_stands_behind_a_tensor_in_memory_does_not_matter(group, rows):
    """Of q and k, too, whose last rows are multiplied beside the first of v."""
    model = lively(hidden_size=96, num_heads=4).quantize_("int4", group)
    ids = torch.tensor([ids_of(1, seed) for seed in range(rows)])
    cache = model.transformer.new_cache(rows)
    with torch.no_grad():
        want = model(ids, past_key_values=cache).logits
        for weight in {id(m): m for m in model.modules() if isinstance(m, QuantizedWeight)}.values():
            for name, tensor in weight.named_buffers():
                behind = torch.full((256,), float("nan")) if tensor.is_floating_point() else torch.full((256,), 255)
                room = torch.cat([tensor.flatten(), behind.to(tensor.dtype)])
                weight._buffers[name] = room[: tensor.numel()].view_as(tensor)
        cache = model.transformer.new_cache(rows)
        assert torch.equal(model(ids, past_key_values=cache).logits, want)


def test_what_cannot_be_is_said(tmp_path):
    model = lively()
    with pytest.raises(InputError, match="quantize='int2' is unknown"):
        model.quantize_("int2")
    with pytest.raises(InputError, match="load_in_4bit is not offered; use quantize"):
        gptneo_fast.load(FOLDER, load_in_4bit=True)
    with pytest.raises((InputError, UnknownOptionError), match="quantize"):
        gptneo_fast.load(FOLDER, quantise="int8")
    with pytest.raises(InputError, match="calibrate holds no texts"):
        model.quantize_("int4", calibrate=[])
    assert not model.is_quantized
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[3, 2] = float("inf")
    with pytest.raises(InputError, match=r"transformer.h.1.mlp.c_fc.weight has NaN or infinite"):
        model.quantize_("int4")
    assert not model.is_quantized
    model = lively()
    model.transformer.h[0].mlp.c_fc = torch.nn.Sequential(model.transformer.h[0].mlp.c_fc)
    with pytest.raises(InputError, match=r"h.0.mlp.c_fc is a Sequential and no plain Linear; quantise first"):
        model.quantize_("int8")
    model = lively().quantize_("int8")
    with pytest.raises(InputError, match="is int8 already"):
        model.quantize_("int4")
    with pytest.raises(InputError, match="whose rows cannot change; resize first"):
        model.resize_token_embeddings(7)
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="is int8 already"):
        gptneo_fast.load(tmp_path, quantize="int4")


def test_to_transformers_wants_floats():
    pytest.importorskip("transformers")
    model = lively().quantize_("int8")
    with pytest.raises(InputError, match=r"dequantize_\(\) first"):
        model.to_transformers()
    made = model.dequantize_().to_transformers()
    torch.testing.assert_close(made(IDS).logits, model(IDS).logits)


def test_nothing_that_changes_a_weight_is_lost_without_a_word(name):
    layer = lively().quantize_(name).transformer.h[0].mlp.c_fc
    for change in (
        lambda: layer.weight.data.add_(1),
        lambda: layer.weight.add_(1),
        lambda: torch.nn.init.normal_(layer.weight),
        lambda: torch.nn.utils.parametrize.register_parametrization(layer, "weight", torch.nn.Identity()),
    ):
        with pytest.raises((AttributeError, TypeError, KeyError, ValueError, RuntimeError)):
            change()


def test_a_weight_of_floats_in_its_place_counts(name):
    model, prompt = lively().quantize_(name), ids_of(5)
    layer = model.transformer.h[0].mlp.c_fc
    want = copy.deepcopy(model)
    want.transformer.h[0].mlp.c_fc = torch.nn.Linear(layer.in_features, layer.out_features)
    weight = torch.nn.Parameter(layer.weight.dequantize().flip(0))
    layer.weight = want.transformer.h[0].mlp.c_fc.weight = weight
    want.transformer.h[0].mlp.c_fc.bias = layer.bias
    assert serial(model, prompt, max_new_tokens=8) == serial(want, prompt, max_new_tokens=8)


def test_a_weight_of_floats_in_its_place_is_trained(name):
    model = lively().quantize_(name).requires_grad_(False)
    layers = model.transformer.h[0].attn.attention.q_proj, model.transformer.wte
    for layer in layers:
        layer.weight = torch.nn.Parameter(layer.weight.dequantize())
    model(IDS, labels=IDS).loss.backward()
    assert all(layer.weight.grad.abs().sum() > 0 for layer in layers)


def test_what_a_user_set_on_an_embedding_is_not_dropped(name):
    model = lively()
    model.transformer.wte.max_norm = 1.0
    with pytest.raises(InputError, match=r"has max_norm=1\.0"):
        model.quantize_(name)
    model.transformer.wte.max_norm = None
    model.quantize_(name)
    with pytest.raises(IndexError):
        model.transformer.wte(torch.tensor([-1]))
    model.transformer.wte.max_norm = 1.0
    with pytest.raises(InputError, match=r"max_norm=1\.0 changes rows"):
        model(IDS)


def test_a_mixture_is_not_saved_and_weights_are_not_drawn_anew(name, tmp_path):
    model = lively().quantize_(name)
    before = model(IDS).logits
    model.init_weights()  # nothing is left to initialise
    torch.testing.assert_close(model(IDS).logits, before, rtol=0, atol=0)
    with pytest.raises(InputError, match="cannot be initialised afresh"):
        model._init_weights(model.lm_head)
    model.transformer.h[0].mlp.c_fc = torch.nn.Linear(SMALL["hidden_size"], 4 * SMALL["hidden_size"])
    with pytest.raises(InputError, match=r"h.0.mlp.c_fc is a Linear among layers in int"):
        model.save_pretrained(tmp_path)


def test_trainer_takes_adapters_on_it_and_nothing_else(name):
    trainer = pytest.importorskip("transformers.trainer_utils")
    validate = trainer.validate_quantization_for_training
    model = lively().quantize_(name)
    with pytest.raises(ValueError, match="purely quantized"):
        validate(model)
    validate(model.dequantize_())


def test_an_engine_sees_that_integers_or_scales_changed(name):
    """Prefixes that it shares are let go then."""
    from gptneo_fast.engine.work import _state_of

    model = lively().quantize_(name)
    weight = model.transformer.h[0].mlp.c_fc.weight
    for tensor in (weight.values, weight.scales):
        before = _state_of(model)
        assert _state_of(model) == before
        tensor.copy_(tensor.flip(0))
        assert _state_of(model) != before


def test_copies_devices_and_dtypes_keep_every_bit(name):
    model = lively().quantize_(name)
    model.lm_head.weight = model.transformer.wte.weight
    before = copy.deepcopy(model.state_dict())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.half().to(torch.bfloat16).float()):
        assert other.lm_head.weight is other.transformer.wte.weight
        for key, tensor in other.state_dict().items():
            if key.endswith((".values", ".scales")):
                assert tensor.dtype is before[key].dtype and torch.equal(tensor, before[key])
    with torch.device("meta"):
        assert model.to("meta").transformer.wte.weight.values.is_meta


def test_loading_a_state_dict_is_seen_by_the_next_step(name):
    model, other = lively().quantize_(name), lively(num_layers=SMALL["num_layers"])
    with torch.no_grad():
        for p in other.parameters():
            p.copy_(p.flip(0))
    other.quantize_(name)
    prompt = ids_of(9)
    before = serial(model, prompt, max_new_tokens=8)
    model.load_state_dict(other.state_dict())
    assert serial(model, prompt, max_new_tokens=8) == serial(other, prompt, max_new_tokens=8) != before


def test_hooks_stay_where_they_are_and_count(name):
    model, seen = lively(), []
    layer = model.transformer.h[1].mlp.c_fc
    handle = layer.register_forward_hook(lambda module, args, out: seen.append(tuple(args[0].shape)) or out * 0)
    model.quantize_(name)
    assert model.transformer.h[1].mlp.c_fc is layer and isinstance(layer, QuantizedLinear)
    prompt = ids_of(5)
    hooked = serial(model, prompt, max_new_tokens=6)
    assert len(seen) == 6
    handle.remove()
    assert serial(model, prompt, max_new_tokens=6) != hooked and len(seen) == 6


def test_one_layer_of_floats_among_the_others_counts(name):
    model = lively().quantize_(name)
    prompt = ids_of(5)
    before = serial(model, prompt, max_new_tokens=8)
    with torch.no_grad():
        model.transformer.h[0].attn.attention.k_proj = torch.nn.Linear(SMALL["hidden_size"], SMALL["hidden_size"], bias=False)
    got = serial(model, prompt, max_new_tokens=8)
    plain = copy.deepcopy(model).dequantize_()
    require_same(plain, prompt, got, serial(plain, prompt, max_new_tokens=8), 1e-2)
    assert got != before


def test_gradients_reach_what_stands_on_top_and_what_stands_before(name):
    model = lively().quantize_(name)
    plain = copy.deepcopy(model).dequantize_()
    found = []
    for m in (model, plain):
        adapter = torch.full((SMALL["hidden_size"],), 0.5, requires_grad=True)
        m.transformer.h[0].attn.register_forward_hook(lambda module, args, out, adapter=adapter: (out[0] + adapter, *out[1:]))
        m(IDS, labels=IDS).loss.backward()
        found.append((adapter.grad, m.transformer.wpe.weight.grad, m.transformer.h[0].mlp.c_fc.bias.grad))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_training_with_autocast_follows_that_of_floats(name):
    model = lively().quantize_(name)
    plain = copy.deepcopy(model).dequantize_()
    with torch.autocast("cpu", torch.bfloat16):
        losses = [m(IDS, labels=IDS).loss for m in (model, plain)]
    torch.testing.assert_close(*losses, rtol=1e-2, atol=1e-2)


def test_engine_scores_and_drafts_take_it(name):
    model = lively().quantize_(name)
    prompts = [ids_of(n) for n in (3, 30, 9)]
    with gptneo_fast.Engine(model, max_rows=2) as engine:
        jobs = [engine.submit(prompt, max_new_tokens=12) for prompt in prompts]
        assert [job.result() for job in jobs] == [serial(model, p, max_new_tokens=12) for p in prompts]
    plain = copy.deepcopy(model).dequantize_()
    for got, want in zip(model.score(prompts), plain.score(prompts), strict=True):
        torch.testing.assert_close(torch.tensor(got.total), torch.tensor(want.total), rtol=1e-3, atol=1e-2)
    draft = serial(model, prompts[1], max_new_tokens=20, prompt_lookup_num_tokens=3)
    assert draft == serial(model, prompts[1], max_new_tokens=20)


@pytest.mark.parametrize("shape", ["embedded", "random"])
def test_calibration_lowers_the_loss(shape):
    """On texts that it has not seen, in the mean over them; random weights on random tokens, by the error of the logits."""
    if shape == "embedded":
        whole = gptneo_fast.load(FOLDER, dtype="float32")
        texts = [whole.generate_text("Once upon a time", max_new_tokens=150, seed=i, do_sample=True) for i in range(24)]
        texts = [whole.tokenizer.encode("Once upon a time" + text) for text in texts]
    else:
        whole, texts = lively(hidden_size=128, num_heads=4), [ids_of(120, seed) for seed in range(24)]
    models = [copy.deepcopy(whole).quantize_("int4", calibrate=how) for how in (None, texts[:12])]

    @torch.no_grad()
    def loss(model):
        divergence = torch.nn.functional.kl_div
        total = 0
        for text in texts[12:]:
            ids = torch.tensor([text])
            logits, exact = (m(ids).logits[0].log_softmax(-1) for m in (model, whole))
            total += divergence(logits, exact, log_target=True, reduction="batchmean").item()
        return total

    plain, calibrated = map(loss, models)
    assert calibrated < plain


def test_what_would_be_wrong_in_silence_is_refused(name):
    model = lively().quantize_(name)
    with pytest.raises(InputError, match=r"of which \.type\(torch\.float64\) would make other numbers"):
        model.type(torch.float64)
    with pytest.raises(InputError, match="cannot be trained"):
        model.lm_head.requires_grad_(True)
    model.requires_grad_(False)
    plain = lively()
    with torch.no_grad():
        plain.transformer.wpe.weight[0] = float("nan")
    with pytest.raises(InputError, match="gets is not finite"):
        plain.quantize_(name, calibrate=[[1, 2, 3, 4]])
    plain, seen = lively(), []
    before = plain.state_dict()

    def fail(*_):
        seen.append(1)
        if len(seen) > 1:
            raise KeyboardInterrupt

    plain.transformer.h[-1].mlp.register_forward_hook(lambda *_: fail())
    with pytest.raises(KeyboardInterrupt):
        plain.quantize_(name, calibrate=[[1, 2, 3, 4]])
    assert plain.state_dict().keys() == before.keys() and all(
        p is plain.state_dict()[k] or torch.equal(p, plain.state_dict()[k]) for k, p in before.items()
    )
    for given in ({"input_ids": [1, 2]}, torch.tensor(5)):
        with pytest.raises(InputError, match="texts is a"):
            model.score(given)


def test_a_pickle_of_a_gpus_model_is_brought_into_order_by_its_first_step(name):
    """Its weights lie row by row, until they are read."""
    model = lively().quantize_(name)
    other, prompt = copy.deepcopy(model), ids_of(9)
    weights = {m.weight for m in other.modules() if isinstance(m, QuantizedLinear)}
    for weight in weights:
        weight.values, weight.scales = weight.row_by_row()
    assert serial(other, prompt, max_new_tokens=8) == serial(model, prompt, max_new_tokens=8)
    assert weights and all(weight.is_side_by_side for weight in weights)
