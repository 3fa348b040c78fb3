"""Examples that need more libraries."""

import pytest

from tests.test_examples import run


def test_an_adapter_learns_and_can_be_left_out(capsys, monkeypatch):
    pytest.importorskip("peft")
    said = run("lora", capsys, monkeypatch)
    first, last = (float(x) for x in said.split("loss ")[1].split("\n")[0].split(" -> "))
    assert last < 0.3 * first
    assert "Tom the robot lived on the moon." in said and "without:" in said


def test_a_cluster_scores_embeds_and_continues(capsys, monkeypatch):
    ray = pytest.importorskip("ray")
    said = run("ray_batch", capsys, monkeypatch)
    ray.shutdown()
    assert said.count("Once upon a time there was a") == 4 and "256 numbers" in said
