"""`make gpu`: its code runs where there is no GPU, keeps its deadline, survives stages that fail, writes where it may."""

import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.gpu import correct, run as gpu, stage, table as gpu_table
from benchmarks.gpu.stage import Case, LeftOut, Setting, run_cases
from benchmarks.gpu.timing import Clock
from gptneo_fast import errors

REPO = Path(__file__).parents[2]
EMPTY = {"rows": [], "failures": {}, "left_out": {}}
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine runs the real thing")


@needs_no_gpu
def test_without_a_gpu_every_case_of_every_stage_is_entered(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu.run", "--minutes", "20", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False, cwd=REPO)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.startswith("No GPU: ") and "GPTNeoFastWarning" not in done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["dry_run"] and results["ceilings"] == {}
    stages = [name for part in gpu.PLAN if part.normal for name in part.stages]
    assert list(results["stages"]) == [name for name in stages if not name.startswith("other")]
    for name, found in results["stages"].items():
        assert not found["failures"], name
        assert [*found["left_out"], *(row["case"] for row in found["rows"])], name
        cases = {case.name for case in gpu.cases_of(name, Setting())}
        assert cases == {*found["left_out"], *(row["case"] for row in found["rows"])}, name
        assert all("GPU" in why for why in found["left_out"].values()), name
    rows = {row["case"]: row for found in results["stages"].values() for row in found["rows"]}
    step = rows["tiny decode batch 1, context 128 gptneo_fast"]
    assert (step["backend"], step["path"]) == ("triton", "launched") and step["floor ms"] > 0
    assert rows["tiny prefill gptneo_fast"]["device ms"] > 0
    assert 0 < rows["tiny norm_linear, c_fc 64x1"]["error over budget"] <= 1
    sweep = rows["tiny gemv.TILES: norm_qkv_append, 1x1"]
    assert len(sweep["tried us"]) == 2 and not sweep["failed"]
    table = done.stdout[done.stdout.index("| stage") :]
    assert "| tiny  | prefill " in table and "mean nothing" in table and "| tiny gemm.TILES: " in table


def test_a_case_that_fails_stops_no_other_and_rows_are_on_disk_at_once(tmp_path):
    path = tmp_path / "rows.json"

    def on_disk():
        return {"rows before": len(json.loads(path.read_text())["rows"])}

    def fails():
        raise ZeroDivisionError("by nothing")

    def cannot():
        raise LeftOut("no such thing here")

    cases = [Case("a", lambda: None), Case("b", fails), Case("c", on_disk), Case("d", cannot), Case("long", on_disk, 1e9)]
    found = run_cases(cases, Clock(60), path)
    assert found["rows"] == [{"case": "a"}, {"case": "c", "rows before": 1}]
    assert found["failures"] == {"b": "ZeroDivisionError: by nothing"}
    assert found["left_out"]["d"] == "no such thing here"
    assert "it takes about 1000000000" in found["left_out"]["long"]
    assert json.loads(path.read_text()) == found


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import time; time.sleep(60)", "longer than its time"),
        ("import os; os.kill(os.getpid(), 11)", "exit code -11"),
        ("import sys; sys.exit(3)", "exit code 3"),
        ("", "exit code 0"),  # and it wrote nothing
    ],
)
def test_a_stage_that_hangs_or_dies_says_so_and_keeps_its_rows(code, words, tmp_path):
    rows = tmp_path / "rows.json"
    if code:
        stage.write(rows, {"rows": [{"case": "first"}], "failures": {}, "left_out": {}})
    process = subprocess.Popen([sys.executable, "-c", code], text=True, start_new_session=True)
    began = time.monotonic()
    found = gpu._finish("s", process, rows, Clock(2))
    assert words in found["failures"]["the stage"]
    assert len(found["rows"]) == bool(code)
    assert time.monotonic() - began < 30 and process.poll() is not None


def test_the_time_of_the_stages_is_the_time_of_the_run(monkeypatch, tmp_path):
    given = {}

    def start(name, into, seconds, *rest):
        given[name] = seconds
        stage.write(into, EMPTY)
        return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.1)"], text=True, start_new_session=True)

    monkeypatch.setattr(gpu, "_start", start)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    gpu.run_all("normal", tmp_path, Clock(480))
    parts = [part for part in gpu.PLAN if part.normal]
    first = [given[part.stages[0]] for part in parts]
    assert first[0] == pytest.approx((480 - gpu.GRACE) * parts[0].normal / sum(p.normal for p in parts), abs=1)
    assert first[-1] == pytest.approx(480 - gpu.GRACE, abs=20)  # what the others left is the last one's
    assert "sanitizers" not in given and parts[-1].stages == ("sweeps",)
    assert (tmp_path / "results.json").exists()


@pytest.mark.parametrize("mode", gpu.MINUTES)
def test_the_plan_fits_into_the_minutes_beside_the_installation(mode):
    assert sum(getattr(part, mode) for part in gpu.PLAN) + 45 <= gpu.MINUTES[mode] * 60


def test_what_the_installation_took_is_gone(monkeypatch, tmp_path, capsys):
    left = []
    monkeypatch.setattr(gpu, "run_all", lambda mode, out, clock: left.append(clock.left()) or {"stages": {}, "dry_run": True})
    assert gpu.main(["--mode", "quick", "--out", str(tmp_path), "--since", str(time.time() - 100)]) == 0
    assert gpu.main(["--mode", "quick", "--out", str(tmp_path)]) == 0
    assert left == [pytest.approx(80, abs=2), pytest.approx(180, abs=2)]


@pytest.fixture
def one_case(monkeypatch):
    """A stage of one case, in this process."""
    monkeypatch.setattr(gpu, "cases_of", lambda name, setting: [Case("only", lambda: {"value": 1})])
    with warnings.catch_warnings():
        yield


def test_a_stage_without_a_path_writes_nothing(one_case, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    before = os.stat(os.devnull)
    assert gpu.main(["--stage", "x"]) == 0
    assert os.listdir(tmp_path) == [] and os.stat(os.devnull).st_ino == before.st_ino
    assert gpu.main(["--stage", "x", "--into", "rows.json"]) == 0
    assert json.loads((tmp_path / "rows.json").read_text())["rows"] == [{"case": "only", "value": 1}]


def test_nothing_but_a_regular_file_is_replaced(one_case, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(ValueError, match="is no regular file"):
            gpu.main(["--stage", "x", "--into", str(path)])
    assert os.listdir(tmp_path) == ["pipe"] and (tmp_path / "pipe").is_fifo()


def test_sanitizers_run_a_stage_that_writes_nothing(monkeypatch):
    commands = []

    def run(command, **how):
        commands.append(command)
        return SimpleNamespace(returncode=0, stdout="ERROR SUMMARY: 0 errors\n", stderr="")

    monkeypatch.setattr(correct.shutil, "which", lambda name: name)
    monkeypatch.setattr(correct.subprocess, "run", run)
    found = run_cases(correct.sanitizer_cases(Setting(device=torch.device("meta"))), Clock(1000))
    assert len(found["rows"]) == 5 and all(row["said"] == "ERROR SUMMARY: 0 errors" for row in found["rows"])
    assert not any("--into" in command or os.devnull in command for command in commands)
    assert {command[2] for command in commands} == {"memcheck", "initcheck", "racecheck"}
    found = run_cases(correct.sanitizer_cases(Setting(device=torch.device("cpu"))), Clock(1000))
    assert set(found["left_out"].values()) == {"there is no GPU"}


def test_a_warning_of_ours_fails_every_case_that_gives_it(monkeypatch, tmp_path):
    cases = [Case(name, lambda: errors.warn_once("the step cannot be captured")) for name in "ab"]
    monkeypatch.setattr(gpu, "cases_of", lambda name, setting: cases)
    with warnings.catch_warnings():
        assert gpu.run_stage("x", tmp_path / "rows", 60, "normal", {}) == 1
    failures = json.loads((tmp_path / "rows").read_text())["failures"]
    assert failures == dict.fromkeys("ab", "GPTNeoFastWarning: the step cannot be captured")


def test_memory_that_is_not_there_leaves_a_case_out_and_a_broken_device_ends_the_stage(monkeypatch):
    def no_room():
        raise torch.OutOfMemoryError("CUDA out of memory")

    def broken():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    waits = iter([None, broken])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: (next(waits) or (lambda: None))())
    found = run_cases([Case("a", no_room), Case("b", broken), Case("c", lambda: None)], Clock(60))
    assert found["left_out"] == {"a": "out of memory: CUDA out of memory"}
    assert list(found["failures"]) == ["b", "device"] and found["rows"] == []


def test_the_table_says_what_failed_how_much_faster_ours_is_and_which_rows_to_paste():
    def row(runner, ms, **more):
        what = {"model": "125m", "work": "decode", "batch": 1, "context": 128}
        return what | {"runner": runner, "ms": ms, "tokens/s": 1e3 / ms} | more

    swept = {"case": "gemv.TILES: c_fc", "now us": 14.0, "best us": 12.0, "row": "('qkv', 2048): Tile(2),", "changes": True}
    kernel = {"case": "1.3B c_fc", "us": 14.0, "floor us": 11.2, "predicted us": 13.2, "bound": "memory"}
    stages = {
        "ops fp32": EMPTY
        | {"failures": {"attention fp32": "AssertionError: over"}, "left_out": {"x": "3 s were left, it takes"}},
        "decode": EMPTY | {"rows": [row("gptneo_fast", 2.0, path="captured"), row("gptneo_fast", 1.5, early_launch=True)]},
        "peers": EMPTY | {"rows": [row("transformers eager", 9.0)]},
        "kernels": EMPTY | {"rows": [kernel]},
        "sweeps": EMPTY | {"rows": [swept]},
    }
    text = gpu_table.summary({"stages": stages, "dry_run": False})
    assert "- FAILED: ops fp32, attention fp32: AssertionError: over" in text
    assert "- left out: ops fp32, 1 (x ...): no time was left" in text
    assert "| 4.50 " in next(line for line in text.splitlines() if "transformers eager" in line)
    assert "gptneo_fast, early launches" in text and "| captured |" in text
    cells = [cell.strip() for cell in next(line for line in text.splitlines() if "1.3B c_fc" in line).split("|")]
    assert cells[2:5] == ["14", "11.2", "13.2"]
    assert "('qkv', 2048): Tile(2),  # gemv.TILES: c_fc: 14 -> 12 us" in text.splitlines()


def test_ceilings_that_were_measured_replace_the_defaults():
    from benchmarks.gpu.card import ceilings

    rows = [{"case": "read bandwidth", "bytes/s": 4.0e12}, {"case": "matmul rate", "FLOP/s": 7e14}, {"case": "machine"}]
    setting = Setting(**ceilings(rows))
    assert (setting.bandwidth, setting.rate, setting.copy) == (4.0e12, 7e14, stage.BANDWIDTH)


def test_make_gpu_installs_without_a_network_and_hands_on_the_folder():
    alone = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}  # not of `make test`
    listed = subprocess.run(
        ["make", "-n", "gpu-quick", "OUT=/x"], capture_output=True, text=True, check=True, cwd=REPO, env=alone
    ).stdout
    install, run = listed.replace("\\\n", "").split("-e . &&")
    assert install.startswith("since=$(date +%s) && ") and install.endswith("--no-deps --no-index --no-build-isolation ")
    assert "-m benchmarks.gpu.run --mode quick --since $since" in run and "/x" in run
    assert "OUT" not in os.environ
