"""The GPU run, which ends by itself: card, correctness, whole models, kernels, peers, profile; one table last.

    make gpu                                   # 9 minutes; gpu-quick: 3; gpu-full: all there is
    python -m benchmarks.gpu --mode quick --out /tmp/results

Each stage is a process of its own, so that a fault of the device ends that stage only. `results.json` is rewritten after
each. On a machine without CUDA the same code runs on tiny shapes with interpreted kernels; those figures mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_table import summary
from benchmarks.stage import Case, Setting, run_cases, write
from benchmarks.timing import Clock

REPO = Path(__file__).parent.parent
MINUTES = {"quick": 3.0, "normal": 9.0, "full": 90.0}
GROUPS: list[tuple[tuple[str, ...], float]] = [  # stages that run side by side, and their part of the time
    (("card",), 6),
    (("ops fp32", "ops fp16", "ops bf16"), 20),
    (("models",), 16),
    (("ours",), 16),
    (("kernels",), 20),
    (("peers",), 20),
    (("profile",), 4),
]
GRACE = 10.0  # seconds that a stage may exceed its time before it is ended


def cases_of(stage: str, setting: Setting) -> Iterable[Case]:
    """The cases of a stage by its name."""
    from benchmarks import card, correct, kernel_times, profiling, whole

    if stage.startswith("ops "):
        return correct.op_cases(setting, stage.removeprefix("ops "))
    return {
        "card": card.cases,
        "models": correct.model_cases,
        "ours": whole.our_cases,
        "kernels": kernel_times.cases,
        "peers": whole.peer_cases,
        "profile": profiling.cases,
    }[stage](setting)


def run_stage(stage: str, into: Path, seconds: float, mode: str, ceilings: dict[str, float]) -> int:
    """One stage in this process; its rows go to `into`. Returns 1 where a case failed."""
    torch.backends.cuda.matmul.allow_tf32 = False  # fp32 is compared with fp32
    torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    setting = Setting(mode, **ceilings)
    cases = cases_of(stage, setting)
    if setting.tiny:
        torch.set_num_threads(1)
        cases = (dataclasses.replace(case, seconds=1.0) for case in cases)
    return 1 if run_cases(cases, Clock(seconds), into)["failures"] else 0


def run_all(mode: str, out: Path, minutes: float) -> dict[str, Any]:
    """All stages within the time; returns what stands in results.json."""
    clock, cuda = Clock(minutes * 60), torch.cuda.is_available()
    results: dict[str, Any] = {"mode": mode, "dry_run": not cuda, "ceilings": {}, "stages": {}}
    for at, (stages, part) in enumerate(GROUPS):
        stages = stages if cuda else tuple(s for s in stages if s != "ops bf16")  # which the interpreter computes wrong
        seconds = (clock.left() - GRACE) * part / sum(p for _, p in GROUPS[at:])
        print(f"{', '.join(stages)}: {seconds:.0f} s", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            running = [
                _start(stage, Path(folder) / f"{stage}.json", seconds, mode, results["ceilings"], cuda) for stage in stages
            ]
            began, limit = clock.left(), Clock(min(seconds + GRACE, max(1.0, clock.left() - 2)))
            for stage, process in zip(stages, running, strict=True):
                found = _finish(stage, process, Path(folder) / f"{stage}.json", limit)
                results["stages"][stage] = {"seconds": round(began - clock.left(), 1)} | found
                write(out / "results.json", results)
        if stages == ("card",) and cuda:
            from benchmarks.card import ceilings

            results["ceilings"] = ceilings(results["stages"]["card"]["rows"])
    write(out / "results.json", results)
    return results


def _start(stage: str, into: Path, seconds: float, mode: str, ceilings: dict[str, float], cuda: bool) -> subprocess.Popen[str]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"HF_HUB_OFFLINE": "1"}
    if not cuda:
        env |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu", "--stage", stage, "--into", str(into), "--mode", mode]
    command += ["--seconds", f"{seconds:.0f}", "--ceilings", json.dumps(ceilings)]
    return subprocess.Popen(command, cwd=REPO, env=env, text=True, start_new_session=True)


def _finish(stage: str, process: subprocess.Popen[str], into: Path, limit: Clock) -> dict[str, Any]:
    """What a stage left; a process that ran out of time or died says so in `failures`."""
    why = None
    try:
        process.wait(timeout=max(0.1, limit.left()))
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # and what it started
        process.wait()
        why = "ended: it took longer than its time"
    found: dict[str, Any] = {"rows": [], "failures": {}, "left_out": {}}
    if into.exists():
        found = json.loads(into.read_text())
    if why is None and (process.returncode not in (0, 1) or not into.exists()):
        why = f"the process died with exit code {process.returncode}"
    if why:
        found["failures"]["the stage"] = why
        print(f"{stage}: {why}", flush=True)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run all stages, or one; returns 1 where something failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mode", choices=MINUTES, default="normal")
    parser.add_argument("--minutes", type=float, help="default: 9, quick 3, full 90")
    parser.add_argument("--out", type=Path, help="folder of results.json; default: $OUT, else benchmarks/results")
    parser.add_argument("--stage", help="run this one in this process")
    parser.add_argument("--into", type=Path, help="where --stage writes its rows")
    parser.add_argument("--seconds", type=float, default=3600.0, help="what --stage may take")
    parser.add_argument("--ceilings", type=json.loads, default={}, help="measured ones, as JSON, for --stage")
    args = parser.parse_args(argv)
    if args.stage:
        return run_stage(args.stage, args.into or Path(os.devnull), args.seconds, args.mode, args.ceilings)
    cuda = torch.cuda.is_available()
    if not cuda:
        from gptneo_fast.device import why_no_cuda

        print(f"No GPU: {why_no_cuda()}. A dry run on tiny shapes follows; its figures mean nothing.", flush=True)
    fallback = Path(os.environ.get("OUT") or (REPO / "benchmarks" / "results" if cuda else tempfile.mkdtemp()))
    out = args.out or fallback
    results = run_all(args.mode, out, args.minutes or MINUTES[args.mode])
    print(f"\n{summary(results)}\n\n{out / 'results.json'}")
    return 1 if any(stage["failures"] for stage in results["stages"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
