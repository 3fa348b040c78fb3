"""`make gpu`: its code runs where there is no GPU, keeps its deadline, survives stages that fail; its peers are right."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import peers

from benchmarks import gpu, gpu_table, stage, timing
from benchmarks.peers import Compiled, Transformers
from benchmarks.stage import Case, LeftOut, Setting, run_cases
from benchmarks.timing import Clock
from benchmarks.whole import Ours

REPO = Path(__file__).parent.parent
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine runs the real thing")


@needs_no_gpu
def test_without_a_gpu_it_says_so_runs_everything_tiny_and_exits_0(tmp_path):
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "benchmarks.gpu",
        "--mode",
        "quick",
        "--minutes",
        "5",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False, cwd=REPO)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.startswith("No GPU: ")
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["dry_run"] and results["ceilings"] == {}
    expected = [name for names, _ in gpu.GROUPS for name in names if name != "ops bf16"]
    assert list(results["stages"]) == expected
    for name, found in results["stages"].items():
        assert found["rows"] and not found["failures"], name
    table = done.stdout[done.stdout.index("| stage") :]
    assert "| tiny  | prefill " in table and "mean nothing" in table


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
        stage.write(into, {"rows": [], "failures": {}, "left_out": {}})
        return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.2)"], text=True, start_new_session=True)

    monkeypatch.setattr(gpu, "_start", start)
    gpu.run_all("normal", tmp_path, minutes=9.0)
    first = [given[names[0]] for names, _ in gpu.GROUPS]
    parts = [part for _, part in gpu.GROUPS]
    assert first[0] == pytest.approx((540 - gpu.GRACE) * parts[0] / sum(parts), abs=1)
    assert first[-1] == pytest.approx(540 - gpu.GRACE, abs=20)  # what the others left is the last one's
    assert (tmp_path / "results.json").exists()


def test_the_table_says_what_failed_and_how_much_faster_ours_is():
    def row(runner, ms):
        return {"model": "125m", "runner": runner, "ms": ms, "tokens/s": 1e3 / ms, "work": "decode", "batch": 1, "context": 128}

    empty = {"rows": [], "failures": {}, "left_out": {}}
    stages = {
        "ops fp32": empty
        | {"failures": {"attention fp32": "AssertionError: over"}, "left_out": {"x": "3 s were left, it takes"}},
        "ours": empty | {"rows": [row("gptneo_fast", 2.0)]},
        "peers": empty | {"rows": [row("transformers eager", 9.0)]},
    }
    text = gpu_table.summary({"stages": stages, "dry_run": False})
    assert "- FAILED: ops fp32, attention fp32: AssertionError: over" in text
    assert "- left out: ops fp32, 1 (x ...): no time was left" in text
    assert "| 4.50 " in next(line for line in text.splitlines() if "transformers eager" in line)


def test_the_compiled_peer_computes_what_transformers_computes_past_the_window():
    theirs, ours = peers(num_layers=3)
    ids = torch.randint(0, 97, (2, 25))
    peer = Compiled(theirs, ours.config, compile_layers=False)
    peer.allocate(2, 25)
    with torch.no_grad():
        expected = theirs(ids).logits
        got = [peer.forward(ids[:, :10], torch.arange(10))]
        got += [peer.forward(ids[:, i : i + 1], torch.tensor([i])) for i in range(10, 25)]
    torch.testing.assert_close(torch.cat(got, 1), expected[:, 9:], rtol=1e-4, atol=1e-4)


def test_decoders_step_on_to_the_context_that_was_asked_for():
    setting = Setting(device=torch.device("cpu"))
    theirs = Transformers(setting.config("tiny"), torch.float32, setting.device)
    lengths = []
    theirs.model.transformer.h[0].register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["layer_past"].get_seq_length()), with_kwargs=True
    )
    with torch.no_grad():
        step = theirs.decoder(3, context=20, steps=4)
        for _ in range(4):
            assert step().shape == (3, 1)
    assert lengths == [16, 17, 18, 19]


def test_rotating_sets_exceed_the_caches():
    assert len(timing.rotating(object, 1e6)) == 200
    assert len(timing.rotating(object, 1e9)) == 2
    assert len(timing.rotating(object, 10)) == timing.MOST_SETS


def test_ceilings_that_were_measured_replace_the_defaults():
    from benchmarks.card import ceilings

    rows = [{"case": "read bandwidth", "bytes/s": 4.0e12}, {"case": "matmul rate", "FLOP/s": 7e14}, {"case": "machine"}]
    setting = Setting(**ceilings(rows))
    assert (setting.bandwidth, setting.rate, setting.copy) == (4.0e12, 7e14, stage.BANDWIDTH)


def test_make_gpu_installs_without_a_network_and_hands_on_the_folder():
    alone = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}  # not of `make test`
    listed = subprocess.run(
        ["make", "-n", "gpu-quick", "OUT=/x"], capture_output=True, text=True, check=True, cwd=REPO, env=alone
    ).stdout
    first, second = [line for line in listed.splitlines() if line.strip()]
    assert first.endswith("pip install --no-deps --no-index --no-build-isolation -e .")
    assert "-m benchmarks.gpu --mode quick" in second and "/x" in second
    assert "OUT" not in os.environ


def test_our_decoder_is_the_engines_step_and_ends_at_the_context():
    setting = Setting(device=torch.device("cpu"))
    ours = Ours(setting.config("tiny"), torch.float32, setting.device)
    step = ours.decoder(2, context=20, steps=4)
    tokens = torch.stack([step().clone() for _ in range(4)])
    assert ours.runner.lengths.tolist() == [20, 20]
    assert torch.equal(ours.runner.out[:4], tokens)
