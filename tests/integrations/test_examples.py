"""Examples that need more libraries."""

import pytest

from tests import test_docs
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


def test_the_pages_blocks_of_a_cluster_run(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.chdir(tmp_path)
    ray.init(num_cpus=4, log_to_driver=False)
    try:
        for column in ("text", "prompt"):
            rows = ray.data.from_items([{"text": "Once upon a time", "id": i} for i in range(6)])
            rows.write_parquet(str(tmp_path / f"{column}s"))
        scoring, generating = (
            block.replace("num_gpus=1", "num_cpus=0.2").replace("s3://bucket", str(tmp_path)).replace("128", "8")
            for block in test_docs.OF_EXTRAS
            if "import ray" in block
        )
        assert "Scorer" in test_docs.run(scoring, {}) and "Generator" in test_docs.run(generating, {})
        scores, texts = (ray.data.read_parquet(str(tmp_path / name)).take_all() for name in ("scores", "continuations"))
    finally:
        ray.shutdown()
    assert sorted(row["id"] for row in scores) == list(range(6)) and scores[0]["total"] < 0
    assert sorted(row["id"] for row in texts) == list(range(6))


@pytest.mark.filterwarnings("ignore")
def test_the_page_s_block_of_a_graph_runs(tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    monkeypatch.chdir(tmp_path)
    [block] = [block for block in test_docs.OF_EXTRAS if "onnx" in block]
    test_docs.run(block, {})
    assert (tmp_path / "model.onnx").stat().st_size > 1000
