"""Examples that need more libraries."""

import pytest

import gptneo_fast
from gptneo_fast.demo import FOLDER
from tests import test_readme
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


def test_the_readme_s_block_of_a_cluster_runs(tmp_path):
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=4, log_to_driver=False)
    try:
        ray.data.from_items([{"text": "Once upon a time", "id": i} for i in range(6)]).write_parquet(str(tmp_path / "texts"))
        [block] = [block for block in test_readme.OF_EXTRAS if "import ray" in block]
        block = block.replace("s3://bucket", str(tmp_path)).replace("num_gpus=1", "num_cpus=0.2")
        names = test_readme.run(block, {})
        found = ray.data.read_parquet(str(tmp_path / "scores")).take_all()
    finally:
        ray.shutdown()
    assert "Scorer" in names and sorted(row["id"] for row in found) == list(range(6)) and found[0]["total"] < 0


@pytest.mark.filterwarnings("ignore")
def test_the_readme_s_block_of_a_graph_runs(tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    monkeypatch.chdir(tmp_path)
    [block] = [block for block in test_readme.OF_EXTRAS if "onnx" in block]
    test_readme.run(block, {"model": gptneo_fast.load(FOLDER, dtype="float32")})
    assert (tmp_path / "model.onnx").stat().st_size > 1000
