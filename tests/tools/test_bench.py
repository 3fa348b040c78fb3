"""`gptneo-fast bench`: speeds only beside passed checks, beside the peer and the floor."""

import json

import pytest
import torch

import gptneo_fast
from gptneo_fast.demo import FOLDER
from gptneo_fast.errors import InputError
from gptneo_fast.tools import bench as speed
from gptneo_fast.tools.cli import main

SMALL = dict(batches=[1, 2], contexts=[20, 10000], new_tokens=120)


@pytest.fixture(scope="module")
def model():
    return gptneo_fast.load(FOLDER, device="cpu")


def test_every_speed_stands_beside_its_check_its_peer_and_its_floor(model, tmp_path):
    seen = []
    results = speed.measure(model, **SMALL, report=seen.append)
    assert seen == results and [(r.runner, r.batch) for r in results] == [
        ("gptneo_fast", 1), ("transformers eager", 1), ("gptneo_fast", 2), ("transformers eager", 2),
    ]  # fmt: skip
    for r in results:
        assert r.check == "equal" and r.context == 20
        assert r.tokens_per_second == pytest.approx(1e3 * r.batch / r.step_ms)
        assert r.floor_ms > 0 and r.step_ms > 0  # a model that fits into a cache of the CPU may be faster than memory
    text = speed.table(results)
    assert len(text.splitlines()) == 5 and "transformers eager" in text
    pytest.importorskip("matplotlib")
    speed.plot(results, str(tmp_path / "speed.svg"))
    drawn = (tmp_path / "speed.svg").read_text()
    assert drawn.count("<svg") == 1 and len(drawn) > 5000
    with pytest.raises(InputError, match=r"\.svg or \.png"):
        speed.plot(results, "speed.pdf")


def test_the_bytes_of_a_step_are_the_weights_and_the_keys_in_sight():
    config = gptneo_fast.GPTNeoConfig(hidden_size=32, num_heads=2, num_layers=2, window_size=8, vocab_size=100,
                                      max_position_embeddings=64, attention_layers=["global", "local"])  # fmt: skip
    model = gptneo_fast.GPTNeoForCausalLM(config)
    weights = sum(p.numel() for name, p in model.named_parameters() if "wpe" not in name)
    keys = 2 * 3 * (20 + 8) * 32
    assert speed.step_bytes(config, torch.bfloat16, 3, 20) == 2 * (weights + keys)


def test_a_failed_check_has_no_speed(model, monkeypatch):
    step = type(model).step
    monkeypatch.setattr(model, "step", lambda *args, **how: step(model, *args, **how).roll(1, -1), raising=False)
    (result,) = speed.measure(model, batches=[1], contexts=[20], new_tokens=6, peer=False)
    assert "differs at token 0" in result.check and result.tokens_per_second is None
    assert speed.table([result]).count(" - ") >= 3


def test_nothing_to_measure_is_an_error(model):
    with pytest.raises(InputError, match="512 positions"):
        speed.measure(model, contexts=[600])


def test_the_command_prints_a_table_or_json(capsys):
    args = ["bench", "--batch", "1", "--context", "16", "-n", "4", "--no-peer"]
    assert main(args) == 0
    assert "gptneo_fast" in capsys.readouterr().out
    assert main([*args, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["results"][0]["check"] == "equal" and facts["torch"] == torch.__version__
