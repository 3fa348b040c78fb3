"""Checkpoints in 8 and 4 bits: rounded while they load, saved bit for bit; damaged, foreign and forgetful ones are refused."""

# ruff: noqa: F811 (a fixture)
import gc
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import gptneo_fast
from gptneo_fast.demo import FOLDER
from gptneo_fast.errors import CheckpointError, ConfigError, GPTNeoFastWarning
from gptneo_fast.ops.quantized import QuantizedWeight
from tests.models.test_quantize import name, same  # noqa: F401
from tests.support.serial import lively


def test_loading_rounds_as_the_model_does(name, tmp_path):
    whole = gptneo_fast.load(FOLDER)
    model = gptneo_fast.load(FOLDER, quantize=name)
    same(model, whole.quantize_(name))
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.config.quantization_config == whole.config.quantization_config
    model.save_pretrained(tmp_path)
    written, fc = load_file(tmp_path / "model.safetensors"), "transformer.h.0.mlp.c_fc.weight"
    assert "lm_head.weight.values" not in written
    rows = model.transformer.h[0].mlp.c_fc.weight.row_by_row()  # as GPUs have them, whatever device they come from
    assert all(map(torch.equal, (written[f"{fc}.values"], written[f"{fc}.scales"]), rows))
    again = gptneo_fast.load(tmp_path, dtype="bfloat16")
    same(model.to(torch.bfloat16), again)
    assert again.lm_head.weight is again.transformer.wte.weight and again.dtype is torch.bfloat16
    again.save_pretrained(tmp_path / "again")
    same(again, gptneo_fast.load(tmp_path / "again"))


def test_a_state_dict_is_a_checkpoint_too(name, tmp_path):
    model = gptneo_fast.load(FOLDER, quantize=name)
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.warns(GPTNeoFastWarning, match="pytorch_model.bin only"):
        again = gptneo_fast.load(tmp_path)
    same(model, again)
    same(model, type(model).from_pretrained(None, config=model.config, state_dict=model.state_dict()))
    assert again.transformer.h[0].mlp.c_fc.weight.is_side_by_side


def test_an_untied_head_is_kept_for_itself(name, tmp_path):
    model = lively().quantize_(name)
    assert model.lm_head.weight is not model.transformer.wte.weight
    model.save_pretrained(tmp_path)
    same(model, gptneo_fast.load(tmp_path))


def test_no_more_than_one_tensor_of_floats_is_held_while_loading(monkeypatch):
    gc.collect()
    before = {id(t) for t in gc.get_objects() if isinstance(t, torch.Tensor)}
    held, known = [], QuantizedWeight.fill

    def fill(self, weight):
        mine = [t for t in gc.get_objects() if isinstance(t, torch.Tensor) and id(t) not in before and not t.is_meta]
        held.append(sum(t.numel() for t in mine if t.dim() == 2 and t.is_floating_point() and t.dtype is weight.dtype))
        return known(self, weight)

    monkeypatch.setattr(QuantizedWeight, "fill", fill)
    model = gptneo_fast.load(FOLDER, quantize="int4")
    largest, positions = model.transformer.wte.weight.shape.numel(), model.transformer.wpe.weight.numel()
    assert len(held) == 1 + 6 * len(model.transformer.h)
    assert max(held) <= largest + positions


def spoilt(folder, **changes):
    tensors = load_file(folder / "model.safetensors")
    for end, change in changes.items():
        key = next(k for k in tensors if k.endswith(end.replace("__", ".")))
        tensors[key] = change(tensors[key])
    tensors = {k: t for k, t in tensors.items() if t is not None}
    save_file(tensors, folder / "model.safetensors")


DAMAGED = {
    "no scales": ({"c_fc__weight__scales": lambda t: None}, "no tensor for .*c_fc.weight.scales"),
    "no values": ({"wte__weight__values": lambda t: None}, "no tensor for .*wte.weight.values"),
    "another dtype": (
        {"c_fc__weight__scales": lambda t: t.half()},
        "c_fc.weight.scales' is float16, and quantization_config .*asks for bfloat16",
    ),
    "another width": ({"c_fc__weight__values": lambda t: t[:, :-32].contiguous()}, "c_fc.weight.values' is"),
    "another width, let pass": ({"c_fc__weight__values": lambda t: t[:, :-32].contiguous()}, "c_fc.weight.values' is"),
    "two orders": ({"c_fc__weight__scales": lambda t: t.flatten()}, "c_fc.weight.scales' lie in different orders"),
    "not finite": ({"c_fc__weight__scales": lambda t: t * float("nan")}, "c_fc.weight.scales' holds nan"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_weights_are_refused(case, tmp_path):
    lively().quantize_("int4").save_pretrained(tmp_path)
    changes, message = DAMAGED[case]
    spoilt(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message):
        gptneo_fast.load(tmp_path, ignore_mismatched_sizes="let pass" in case)


FOREIGN = {
    "of another library": ({"quant_method": "bitsandbytes", "bits": 4}, "is of 'bitsandbytes', whose weights"),
    "no block": (4, "is of 4, whose weights"),
    "of a later version": ({"quant_method": "gptneo_fast", "version": 2, "bits": 8, "group_size": None}, "version 2, and this"),
    "of other bits": ({"quant_method": "gptneo_fast", "version": 1, "bits": 3, "group_size": 64}, "bits 3 and group_size 64"),
    "of other groups": ({"quant_method": "gptneo_fast", "version": 1, "bits": 4, "group_size": 7}, "bits 4 and group_size 7"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_what_others_or_later_versions_wrote_is_refused(case, tmp_path):
    lively().quantize_("int4").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "gptneo_fast", "version": 1, "bits": 4, "group_size": 64}
    block, message = FOREIGN[case]
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": block}))
    with pytest.raises(ConfigError, match=message):
        gptneo_fast.load(tmp_path)


def test_a_configuration_that_forgot_says_so(tmp_path):
    lively().quantize_("int8").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"in few bits, and config\.json has no quantization_config"):
        gptneo_fast.load(tmp_path)
