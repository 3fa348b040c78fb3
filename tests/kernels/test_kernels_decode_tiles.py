"""What a decode step launches, compiled at the true shapes: no spills, wide loads, enough of them in flight, little tail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
import gptneo_fast
from gptneo_fast import errors, kernels
from gptneo_fast.kernels import gemv, launch
from gptneo_fast.ops import backends

REPO = Path(__file__).parents[2]
SMS = 132
IN_FLIGHT = 32 * 1024  # bytes an SM, or all there are


def compiled(sm, dtype, steps, models, *early):
    """Rows of decode_compiled.py."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(REPO)}
    command = [sys.executable, "-W", "ignore", "tests/support/decode_compiled.py", str(sm), dtype, steps, models, *early]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False, cwd=REPO, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def name(row):
    return "{model} {step} {op} {kernel}".format(**row)


def faults(row):
    """What a compiled kernel does that it should not."""
    found = []
    if row["spills"] or not row["blocks_per_sm"]:
        found.append(f"{name(row)}: {row['spills']} spills, {row['blocks_per_sm']} blocks fit an SM")
    if row["narrow_weight_loads"]:
        found.append(f"{name(row)}: {row['narrow_weight_loads']} loads of weights are not 128 bits wide")
    if row["kernel"] == "skinny" and row["norms"] and not row["prefetches"]:
        found.append(f"{name(row)}: loads activations before it asks for a weight")
    shared = row["kernel"] == "skinny" and row["rows"] > 16  # a tile, by four warps
    if shared and row["sm"] == 90 and row["dtype"] != "fp32" and row["tensor_cores"] != "HGMMA":
        found.append(f"{name(row)}: {row['tensor_cores'] or 'no tensor cores'} for {row['rows']} rows, HGMMA is due")
    if row["kernel"] == "gemv":
        each = -(-row["grid"] // SMS)
        waves = row["grid"] > row["blocks_per_sm"] * SMS  # one wave has no tail that a card has shown: all ask at one time
        if waves and each * SMS / row["grid"] - 1 > 0.05:
            found.append(f"{name(row)}: {row['grid']} blocks leave a tail of {each * SMS / row['grid'] - 1:.1%}")
        held = min(each, row["blocks_per_sm"]) * row["warps"] * 32 * row["in_flight"]
        if held < min(IN_FLIGHT, row["weights"] / SMS):
            found.append(f"{name(row)}: {held} bytes of weights in flight an SM, of {row['weights'] / SMS:.0f}")
    return found


def early_faults(row):
    """What a kernel that starts before the one before it has ended does too soon."""
    found = []
    if not row["waits"] or row["others_before_wait"] or row["early_in_ptx"] is not False:
        found.append(f"{name(row)} does not wait before it touches activations")
    if row["kernel"] == "gemv" and (not row["before_wait"] or row["used_before_activations"]):
        found.append(f"{name(row)} loads no weights before it waits, or uses them before it asks for its row")
    if row["kernel"] == "skinny" and not row["prefetches"]:
        found.append(f"{name(row)} asks for no weights before it waits")
    return found


@pytest.fixture(scope="module")
def plain():
    return compiled(90, "bf16", "1x1", "125m,1.3B,2.7B")


def test_batch_1_keeps_the_memory_busy(plain):
    assert {row["kernel"] for row in plain} == {"gemv", "attend"} and len(plain) == 3 * 7
    assert [fault for row in plain for fault in faults(row)] == []
    assert not any(row["waits"] for row in plain)


def test_the_checks_see_what_is_wrong(plain):
    good = next(row for row in plain if row["op"] == "norm_linear")
    for change, words in [
        (dict(spills=4), "4 spills"),
        (dict(narrow_weight_loads=1), "not 128 bits"),
        (dict(grid=133, blocks_per_sm=1), "tail of"),
        (dict(in_flight=16), "in flight"),
    ]:
        assert words in faults(good | change)[0]
    skinny = dict(kernel="skinny", rows=16, tensor_cores="HMMA", norms=True, prefetches=1)
    assert faults(good | skinny) == faults(good | skinny | dict(rows=64, tensor_cores="HGMMA", norms=False, prefetches=0)) == []
    assert "before it asks for a weight" in faults(good | skinny | dict(prefetches=0))[0]
    assert "HMMA for 17 rows" in faults(good | skinny | dict(rows=17))[0]
    assert "does not wait" in early_faults(good)[0]  # it was not launched early
    early = good | dict(waits=True, early_in_ptx=False, before_wait=64)
    assert early_faults(early) == []
    for change in (
        dict(others_before_wait=1),
        dict(early_in_ptx=True),
        dict(before_wait=0),
        dict(used_before_activations=True),
    ):
        assert early_faults(early | change)


def test_kernels_that_start_early_wait_before_they_touch_activations():
    rows = compiled(90, "bf16", "1x1", "125m,1.3B,2.7B", "early") + compiled(90, "bf16", "8x1", "1.3B", "early")
    assert {row["kernel"] for row in rows} == {"gemv", "attend", "skinny"}
    assert [fault for row in rows for fault in faults(row) + early_faults(row)] == []


def test_few_rows_ask_for_their_weights_first_and_many_share_a_tile():
    rows = [row for row in compiled(90, "bf16", "16x1,17x1", "1.3B") if row["kernel"] == "skinny"]
    assert {(row["rows"], row["norms"]) for row in rows} == {(16, True), (16, False), (32, False)}
    assert [fault for row in rows for fault in faults(row)] == []


@pytest.mark.slow
@pytest.mark.parametrize("sm", [80, 90])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_every_step_compiles_within_its_budget(sm, dtype):
    rows = compiled(sm, dtype, "1x1,8x1,16x1,17x1,64x1,1x16,4x16", "125m,1.3B,2.7B")
    found = [fault for row in rows for fault in faults(row)]
    assert [fault for fault in found if (sm == 90 and dtype != "fp32") or "spills" in fault or "128 bits" in fault] == []


def test_one_row_is_launched_early_on_a_gpu_that_can(monkeypatch):
    choice = SimpleNamespace(name="triton")

    def on(capability, rows=1, name="triton", cuda=True):
        backends._starts_early.cache_clear()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        ids = SimpleNamespace(is_cuda=cuda, numel=lambda: rows, device=torch.device("cuda", 0))
        choice.name = name
        return backends.gains_by_early_launches(choice, ids)

    assert on((9, 0)) and on((10, 0))
    assert not any((on((8, 9)), on((9, 0), rows=8), on((9, 0), name="reference"), on((9, 0), cuda=False)))
    backends._starts_early.cache_clear()


def test_steps_beside_somebody_else_s_modules_are_not_launched_early_by_themselves(monkeypatch):
    config = gptneo_fast.GPTNeoConfig(
        vocab_size=17, hidden_size=16, num_layers=2, num_heads=1, attention_types=[[["global"], 2]], max_position_embeddings=8
    )
    model, asked = gptneo_fast.GPTNeoForCausalLM(config).eval(), []
    monkeypatch.setattr(backends, "gains_by_early_launches", lambda choice, ids: asked.append(ids.shape) and False)
    model.generate(torch.tensor([[1]]), max_new_tokens=3, eos_token_id=None, return_dict_in_generate=True)
    assert asked
    asked.clear()
    model.transformer.h[1].mlp.register_forward_hook(lambda module, args, out: out)  # which might write to a weight
    model.generate(torch.tensor([[1]]), max_new_tokens=3, eos_token_id=None, return_dict_in_generate=True)
    assert not asked


def test_an_early_launch_is_refused_where_it_cannot_be():
    config = gptneo_fast.GPTNeoConfig(
        vocab_size=17, hidden_size=16, num_layers=1, num_heads=1, attention_types=[[["global"], 1]], max_position_embeddings=8
    )
    ids = torch.tensor([[1, 2, 3]])
    model = gptneo_fast.GPTNeoForCausalLM(config, backend="reference", early_launch=True)
    with pytest.raises(errors.SetupError, match="early_launch=True is a way to launch kernels and reference: asked for"):
        model.generate(ids, max_new_tokens=2)
    model.early_launch = False
    assert model.generate(ids, max_new_tokens=2, eos_token_id=None).shape == (1, 5)
    if launch.INTERPRETED:
        x = torch.randn(1, 1, 16)
        with launch.early_launches(), pytest.raises(errors.SetupError, match="not possible in the interpreter; leave it off"):
            kernels.lm_head(x, x[0, 0], x[0, 0], torch.randn(17, 16), 1e-5)
        kernels.lm_head(x, x[0, 0], x[0, 0], torch.randn(17, 16), 1e-5)


@pytest.mark.parametrize("K", [8, 48, 64, 96, 768, 1000, 1536, 4096, 16384])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_widths_without_a_row_of_their_own_get_a_tile_that_covers_them(K, itemsize):
    tile = gemv.tile("linear_add", K, itemsize)
    assert tile.rows >= 1 and tile.BK & (tile.BK - 1) == 0 and tile.ahead <= tile.granules
    assert K % tile.BK == 0 or min(K, 1024) <= tile.BK
