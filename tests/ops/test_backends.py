"""Which backend computes, why, and that a model on interpreted kernels is the model: five classes, generate, launches."""

import json
import os
import subprocess
import sys

import pytest
import torch

from benchmarks.static.counting import Launches
from gptneo_fast import GPTNeoForCausalLM, errors
from gptneo_fast.kernels import launch
from gptneo_fast.ops import backends, ops
from gptneo_fast.tools import cli
from tests.support.peers import peers

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
interpreted = pytest.mark.skipif(not launch.INTERPRETED, reason="kernels are compiled here")
TINY = dict(num_layers=2, num_heads=2, hidden_size=16, window_size=5, vocab_size=61)


@pytest.fixture
def can_run(monkeypatch):
    """A machine whose CUDA device runs kernels, as far as choosing goes."""
    monkeypatch.setattr(backends, "_why_not_on", lambda index: "")
    monkeypatch.setattr(backends, "_interpreted", lambda: False)


@pytest.fixture
def compiled(monkeypatch):
    """A process without TRITON_INTERPRET, as far as choosing goes."""
    monkeypatch.setattr(backends, "_interpreted", lambda: False)


# The choice


def test_auto_takes_kernels_on_cuda_in_every_dtype_they_have(can_run):
    for dtype in launch.DTYPES:
        assert backends.choose("auto", CUDA, dtype).functions is ops
        assert backends.choose("triton", CUDA, dtype).functions is ops
    assert backends.choose("reference", CUDA, torch.float16).name == "reference"


def test_float64_and_gradients_take_plain_torch_and_gradients_say_so_once(can_run, recwarn):
    assert backends.choose("auto", CUDA, torch.float64).name == "reference"
    assert not recwarn.list
    with pytest.warns(errors.GPTNeoFastWarning, match=r"gradients are required.*torch\.no_grad"):
        assert backends.choose("auto", CUDA, torch.float32, grad=True).name == "reference"
    assert backends.choose("auto", CUDA, torch.float32, grad=True).name == "reference"  # an error if it warned again
    with pytest.raises(errors.SetupError, match=r"no backward and gradients are required; call under torch\.no_grad"):
        backends.choose("triton", CUDA, torch.float32, grad=True)
    with pytest.raises(errors.SetupError, match="not in float64"):
        backends.choose("triton", CUDA, torch.float64)


def test_an_unknown_backend_is_named_with_the_known_ones():
    with pytest.raises(errors.InputError, match="'cutlass' is unknown; use one of auto, triton, reference"):
        backends.choose("cutlass", CPU, torch.float32)
    with pytest.raises(errors.InputError, match="'cutlass' is unknown"):
        peers_config_model(backend="cutlass")


def test_on_the_cpu_triton_is_refused_with_both_ways_out(compiled):
    with pytest.raises(errors.SetupError, match=r"model is on the CPU; move it to 'cuda', or set TRITON_INTERPRET=1"):
        backends.choose("triton", CPU, torch.float32)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_the_constructor_and_the_loader_refuse_and_say_why(compiled, capsys):
    with pytest.raises(errors.SetupError, match=r"backend='triton': torch .* kernels run on CUDA devices; use backend="):
        peers_config_model(backend="triton")
    assert cli.main(["generate", "x", "--device", "cpu", "--backend", "triton"]) == 1
    assert "backend='triton': torch" in capsys.readouterr().err


@interpreted
def test_bfloat16_is_refused_where_kernels_are_interpreted():
    with pytest.raises(errors.SetupError, match=r"interpreter .* computes bfloat16 wrong; take float32 or float16"):
        backends.choose("triton", CPU, torch.bfloat16)


@interpreted
@pytest.mark.parametrize(
    ("of_triton", "of_numpy", "fails"),
    [("3.6.0", "2.4.6", True), ("3.6.1+git5d1", "3.0.0rc1", True), ("3.6.0", "2.3.5", False), ("3.7.0", "2.4.0", False)],
)
def test_an_interpreter_that_this_numpy_breaks_is_told_at_once(monkeypatch, of_triton, of_numpy, fails):
    import numpy as np
    import triton

    monkeypatch.setattr(triton, "__version__", of_triton)
    monkeypatch.setattr(np, "__version__", of_numpy)
    if not fails:
        backends.check("triton")
        assert backends.choose("triton", CPU, torch.float32).name == "triton"
        return
    told = f"interpreter .* of triton {of_triton} fails with numpy {of_numpy}; pip install 'numpy<2.4' or 'triton>=3.7'"
    for ask in (lambda: backends.check("triton"), lambda: backends.choose("triton", CPU, torch.float32)):
        with pytest.raises(errors.SetupError, match=told.replace("+", r"\+")):
            ask()
    assert of_numpy in backends.report()["backend triton"]
    monkeypatch.setattr(backends, "_interpreted", lambda: False)  # compiled kernels ask numpy nothing
    assert "numpy" not in backends.why_not("cpu", 0, "float32")


class Card:
    """A CUDA device that torch would describe so."""

    def __init__(self, monkeypatch, name="Tesla T4", capability=(7, 5)):
        backends._why_not_on.cache_clear()
        monkeypatch.setattr(backends, "_why_no_device", lambda: "")
        monkeypatch.setattr(backends, "_interpreted", lambda: False)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)


@pytest.fixture
def uncached():
    yield
    for cached in (backends._why_not_on, backends._why_no_kernels):
        cached.cache_clear()


def test_a_card_that_is_too_old_is_named_and_auto_goes_on_without_it(monkeypatch, uncached):
    Card(monkeypatch)
    with pytest.raises(
        errors.SetupError, match=r"Tesla T4 has compute capability 7\.5 and kernels need 8\.0; plain torch in f"
    ):
        backends.choose("triton", CUDA, torch.float16)
    with pytest.warns(errors.GPTNeoFastWarning, match=r"takes plain torch: Tesla T4 has compute capability 7\.5"):
        assert backends.choose("auto", CUDA, torch.float16).name == "reference"


def test_what_triton_says_at_the_first_launch_is_passed_on(monkeypatch, uncached):
    from gptneo_fast import kernels

    Card(monkeypatch, "H100", (9, 0))

    def no_compiler(*_):
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")

    monkeypatch.setattr(torch, "ones", lambda *shape, device: torch.zeros(shape))
    monkeypatch.setattr(kernels, "layer_norm", no_compiler)
    with pytest.raises(errors.SetupError, match=r"cannot run a kernel on H100 \(RuntimeError: Failed to find C compiler"):
        backends.choose("triton", CUDA, torch.float16)
    with pytest.warns(errors.GPTNeoFastWarning, match="cannot run a kernel on H100"):
        assert backends.choose("auto", CUDA, torch.float16).name == "reference"


def test_without_triton_the_package_to_install_is_named(monkeypatch, uncached):
    monkeypatch.setitem(sys.modules, "triton", None)
    backends._why_no_kernels.cache_clear()
    with pytest.raises(errors.SetupError, match=r"triton cannot be imported .*; pip install 'triton"):
        backends.choose("triton", CUDA, torch.float16)


def test_info_tells_what_can_be_used_and_what_a_model_runs_on(capsys):
    from gptneo_fast.demo import FOLDER

    assert cli.main(["info", str(FOLDER), "--device", "cpu", "--backend", "reference", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["model"]["backend"] == "reference: asked for"
    if launch.INTERPRETED:
        assert "interpreted" in facts["machine"]["backend triton"]


def peers_config_model(**options):
    from gptneo_fast import GPTNeoConfig

    return GPTNeoForCausalLM(GPTNeoConfig(**(dict(attention_types=[[["global", "local"], 1]], **TINY))), **options)


# Whole models, interpreted


def on_kernels(cls, **changes):
    """(the model on the reference path, the same weights on interpreted kernels)."""
    _, plain = peers(cls, **TINY, **changes)
    model = type(plain)(plain.config, backend="triton").eval()
    model.load_state_dict(plain.state_dict())
    assert str(model.backend) == "triton: asked for; the kernels are interpreted"
    plain.base_model.requested_backend = "reference"
    return plain, model


def close(got, expected, dtype=torch.float32):
    """Within the dtype's rounding, over the length of the residual stream."""
    assert (got - expected).abs().max() <= 64 * torch.finfo(dtype).eps * expected.abs().max()


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "cls",
    [
        "GPTNeoModel",
        "GPTNeoForCausalLM",
        "GPTNeoForSequenceClassification",
        "GPTNeoForTokenClassification",
        "GPTNeoForQuestionAnswering",
    ],
)
@torch.no_grad()
def test_every_class_runs_whole_on_interpreted_kernels(cls, dtype):
    plain, model = on_kernels(cls, pad_token_id=0)
    x, mask = torch.randint(3, 61, (2, 12)), torch.ones(2, 12, dtype=torch.long)
    mask[0, :5], mask[1, 9:] = 0, 0
    expected, got = plain(x, attention_mask=mask), model.to(dtype)(x, attention_mask=mask)
    for name in [n for n in expected if torch.is_tensor(expected[n])]:
        rows = mask.bool() if expected[name].shape[:2] == mask.shape else slice(None)
        assert got[name].dtype == dtype
        close(got[name].float()[rows], expected[name][rows], dtype)


@interpreted
@torch.no_grad()
def test_a_prompt_in_pieces_past_the_window_gives_the_logits_of_the_whole(monkeypatch):
    plain, model = on_kernels("GPTNeoForCausalLM", max_position_embeddings=320)
    x = torch.randint(3, 61, (1, 150))
    expected = plain(x).logits
    first = model(x[:, :9])
    second = model(x[:, 9:148], past_key_values=first.past_key_values)  # longer than a step: ring and new keys
    last = model(x[:, 148:], past_key_values=second.past_key_values)
    close(torch.cat([first.logits, second.logits, last.logits], 1), expected)


@interpreted
def test_generate_draws_the_same_tokens_on_interpreted_kernels():
    plain, model = on_kernels("GPTNeoForCausalLM")
    x, mask = torch.randint(3, 61, (2, 7)), torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    for options in (dict(do_sample=False), dict(do_sample=True, seed=3)):
        options |= dict(attention_mask=mask, max_new_tokens=4, pad_token_id=0)
        out = plain.generate(x, return_dict_in_generate=True, output_logits=True, **options)
        best = torch.stack(out.logits).topk(2).values
        assert (best[..., 0] - best[..., 1]).min() > 1e-4  # else rounding may decide
        assert torch.equal(model.generate(x, **options), out.sequences)


@interpreted
@torch.no_grad()
def test_weights_and_holes_in_masks_take_the_reference_path_for_attention():
    plain, model = on_kernels("GPTNeoModel")
    x, mask = torch.randint(3, 61, (2, 8)), torch.ones(2, 8, dtype=torch.long)
    mask[0, 3] = 0
    close(model(x, attention_mask=mask).last_hidden_state, plain(x, attention_mask=mask).last_hidden_state)
    for got, expected in zip(*(m(x, output_attentions=True).attentions for m in (model, plain)), strict=True):
        close(got, expected)


@interpreted
def test_kernels_refuse_gradients_and_the_model_goes_on_without():
    _, model = on_kernels("GPTNeoForCausalLM")
    x = torch.randint(3, 61, (1, 4))
    with pytest.raises(errors.SetupError, match="no backward"):
        model(x, labels=x)
    with torch.no_grad():
        loss = model(x, labels=x).loss
    model.requires_grad_(False)
    assert torch.equal(model(x, labels=x).loss, loss)


@interpreted
@torch.no_grad()
def test_under_autocast_the_modules_compute():
    plain, model = on_kernels("GPTNeoModel")
    x = torch.randint(3, 61, (1, 6))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), Launches() as counted:
        hidden = model(x).last_hidden_state
    assert not any(name.startswith("_") for name in counted.launches)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(hidden, plain(x).last_hidden_state)


@interpreted
@pytest.mark.parametrize("rows", ["few", "many"])
@torch.no_grad()
def test_a_prefill_launches_at_most_8_kernels_a_layer_and_3(rows):
    _, model = on_kernels("GPTNeoModel")
    x = torch.randint(3, 61, (1, 70 if rows == "many" else 9))
    L = model.config.num_layers
    for use_cache, most in ((True, 8 * L + 3), (False, 7 * L + 3)):
        with Launches() as counted:
            model(x, use_cache=use_cache)
        kernels = [name for name in counted.launches if not name.startswith("aten.")]
        assert len(kernels) == (most - 1 if rows == "many" else len(kernels)) <= most, counted.launches


@interpreted
@torch.no_grad()
def test_rows_of_forward_s_logits_begin_on_sixteen_bytes_and_are_the_module_s_once_it_is_touched():
    plain, model = on_kernels("GPTNeoForCausalLM")
    ids, V = torch.randint(3, 61, (2, 6)), model.config.vocab_size
    assert V % 8
    for keep, shape in ((0, (2, 6)), (1, (2, 1)), (torch.tensor([[1], [4]]), (2, 1)), (torch.ones(2, 6, dtype=bool), (12,))):
        logits = model(ids, logits_to_keep=keep).logits
        assert logits.shape == (*shape, V) and all(stride % 8 == 0 for stride in logits.stride()[:-1])
        close(logits, plain(ids, logits_to_keep=keep).logits)
    close(model(ids, labels=ids).loss, plain(ids, labels=ids).loss)
    handle = model.lm_head.register_forward_hook(lambda module, args, out: out * 0)
    assert not model(ids).logits.any()
    handle.remove()
    model.lm_head.forward = lambda x: torch.nn.functional.linear(x, model.lm_head.weight) * 0
    assert not model(ids).logits.any()
    del model.lm_head.forward
    model.lm_head = torch.nn.Sequential(model.lm_head)
    assert model(ids).logits.is_contiguous()


@interpreted
def test_gradients_that_a_hook_begins_pass_what_kernels_would_compute():
    """A frozen model on kernels, a vector that is to be learnt: from its block on plain torch computes, the last norm too."""
    plain, model = on_kernels("GPTNeoForCausalLM")
    grads, x = [], torch.randint(3, 61, (1, 6))
    for each in (plain, model):
        each.requires_grad_(False)
        vector = torch.zeros(16, requires_grad=True)
        each.transformer.h[0].register_forward_hook(lambda module, args, out, v=vector: (out[0] + v, *out[1:]))
        each(x, labels=x).loss.backward()
        grads.append(vector.grad)
    assert grads[0].abs().max() > 0
    close(grads[1], grads[0])


# Tracing


@pytest.mark.skipif(torch.cuda.is_available(), reason="the tensors would be real")
@torch.no_grad()
def test_a_prefill_on_fake_cuda_tensors_runs_over_the_ops_and_waits_for_nothing(can_run, monkeypatch):
    from torch._subclasses import FakeTensorMode

    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: pytest.fail("a copy to the host"))
    monkeypatch.setattr(torch.Tensor, "numpy", lambda x: pytest.fail("a copy to the host"))
    _, model = peers(**TINY)
    seen = []
    with FakeTensorMode():  # item(), tolist(), bool() and nonzero() raise
        for module in model.modules():
            for name, p in list(module._parameters.items()):
                if p is not None:
                    fake = torch.empty(p.shape, dtype=p.dtype, device="cuda")
                    module._parameters[name] = torch.nn.Parameter(fake, requires_grad=False)
        assert model.backend.functions is ops
        monkeypatch.setattr(backends, "choose", lambda *_: backends.Choice("triton", "a test", Recorder(seen)))
        ids, positions = (torch.empty(shape, dtype=torch.long, device="cuda") for shape in ((2, 12), (1, 12)))
        hidden = model.transformer.run(ids, positions)
    assert hidden.shape == (2, 12, 16) and hidden.device.type == "cuda"
    layer = ["norm_qkv", "attention", "linear_add", "norm_linear", "linear_add"]
    assert seen == ["embed", *layer, *layer, "layer_norm"]


class Recorder:
    """Stands for `ops` and notes which op is called."""

    def __init__(self, seen):
        self.seen = seen

    def __getattr__(self, name):
        self.seen.append(name)
        return getattr(ops, name)


def test_the_choice_of_kernels_can_be_traced(can_run):
    def f(x, device, grad):
        return x * 2 if backends.choose("auto", device, torch.float16, grad).functions is ops else x * 3

    compiled = torch.compile(f, fullgraph=True, backend="eager")
    assert compiled(torch.ones(2), CUDA, False).tolist() == [2, 2]
    assert compiled(torch.ones(2), CUDA, True).tolist() == [3, 3]


def test_interpreting_is_decided_by_the_environment_of_the_process():
    code = (
        "import torch; from gptneo_fast.ops import backends\n"
        "try: print(backends.choose('triton', torch.device('cpu'), torch.float32))\n"
        "except backends.SetupError as error: print(error)"
    )
    for value, words in (("1", "the kernels are interpreted"), ("0", "set TRITON_INTERPRET=1 before Python starts")):
        env = os.environ | {"TRITON_INTERPRET": value}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
        assert words in done.stdout, done.stderr


def test_what_tracers_take_for_constant_has_the_mark_that_torch_gives():
    marked = vars(torch.compiler.assume_constant_result(lambda: ""))
    assert marked and marked.items() <= vars(backends.why_not).items()
    assert marked.items() <= vars(backends.why_no_extension).items()
