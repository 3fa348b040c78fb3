"""The GPU run, which ends by itself: is it right, how fast is it, what would be faster; one table last.

    make gpu                                   # 8 minutes; gpu-quick: 3; gpu-full: all there is
    python -m benchmarks.gpu.run --mode quick --out /tmp/results

Each stage is a process of its own, so that a fault of the device ends that stage only. `results.json` is rewritten after
each. On a machine without CUDA the same code runs on tiny shapes with interpreted kernels; those figures mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.stage import Case, Setting, run_cases, write
from benchmarks.gpu.table import summary
from benchmarks.gpu.timing import Clock
from gptneo_fast.errors import GPTNeoFastWarning

REPO = Path(__file__).parents[2]
MINUTES = {"quick": 3.0, "normal": 8.0, "full": 90.0}  # installation included
GRACE = 10.0  # seconds that a stage may exceed its time before it is ended
COMPILERS = max(1, min(8, (os.cpu_count() or 1) // 2))


@dataclass(frozen=True)
class Part:
    """Stages that run side by side, and their seconds by mode, imports and compiling included; 0 where they do not run.

    What a part does not need goes to those after it, and what the installation takes comes from all: seconds are shares.
    """

    stages: tuple[str, ...]
    quick: int
    normal: int
    full: int


PLAN = [  # in the order of what a first run must yield; the installation takes 30 to 50 seconds
    Part(("exact", "paths", "models", "ops fp32", "ops fp16", "ops bf16"), 38, 75, 900),
    Part(("card",), 8, 15, 40),
    Part(("decode",), 16, 25, 300),
    Part(("kernels",), 18, 30, 300),
    Part(("ours",), 20, 55, 400),
    Part(("peers",), 35, 60, 600),
    Part(("few bits",), 0, 40, 200),
    Part(("other peers",), 0, 25, 700),
    Part(("other kernels",), 0, 20, 400),
    Part(("profile",), 0, 15, 60),
    Part(tuple(f"tiles {i + 1}/{COMPILERS}" for i in range(COMPILERS)), 0, 25, 400),
    Part(("sweeps",), 0, 50, 500),
    Part(("sanitizers",), 0, 0, 550),
]


def cases_of(stage: str, setting: Setting) -> Iterable[Case]:
    """The cases of a stage by its name."""
    from benchmarks.gpu import card, correct, kernel_times, paths, profiling, sweeps, whole

    first, others = setting.shapes[:1], setting.shapes[1:]
    name, _, what = stage.partition(" ")
    if name == "ops":
        return correct.op_cases(setting, what)
    if name == "tiles":
        part, _, parts = what.partition("/")
        return sweeps.compile_cases(setting, int(part) - 1, int(parts))
    return {
        "exact": lambda: kernel_times.exact_cases(setting),
        "paths": lambda: paths.cases(setting),
        "models": lambda: correct.model_cases(setting),
        "card": lambda: card.cases(setting),
        "decode": lambda: whole.decode_cases(setting),
        "peers": lambda: whole.peer_cases(setting, first),
        "kernels": lambda: kernel_times.time_cases(setting, first),
        "few bits": lambda: itertools.chain(paths.few_bits_cases(setting), whole.few_bits_cases(setting)),
        "ours": lambda: whole.our_cases(setting),
        "other peers": lambda: whole.peer_cases(setting, others),
        "other kernels": lambda: kernel_times.time_cases(setting, others),
        "profile": lambda: profiling.cases(setting),
        "sweeps": lambda: sweeps.cases(setting),
        "sanitizers": lambda: correct.sanitizer_cases(setting),
    }[stage]()


def run_stage(stage: str, into: Path | None, seconds: float, mode: str, ceilings: dict[str, float]) -> int:
    """One stage in this process; its rows go to `into`, if anywhere. Returns 1 where a case failed."""
    warnings.simplefilter("error", GPTNeoFastWarning)  # what runs otherwise than asked for fails its case
    torch.backends.cuda.matmul.allow_tf32 = False  # fp32 is compared with fp32
    torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    setting = Setting(mode, **ceilings)
    cases = cases_of(stage, setting)
    with contextlib.ExitStack() as dry:
        if setting.tiny:
            from benchmarks.gpu.interpreted import quick_calls

            torch.set_num_threads(1)
            dry.enter_context(quick_calls())
            cases = (dataclasses.replace(case, seconds=0.0) for case in cases)
        return 1 if run_cases(cases, Clock(seconds), into)["failures"] else 0


def run_all(mode: str, out: Path, clock: Clock) -> dict[str, Any]:
    """All stages within the time; returns what stands in results.json."""
    cuda = torch.cuda.is_available()
    results: dict[str, Any] = {"mode": mode, "dry_run": not cuda, "ceilings": {}, "stages": {}}
    write(out / "results.json", results)
    plan = [(part.stages, seconds) for part in PLAN if (seconds := getattr(part, mode))]
    if not cuda:  # nothing is timed, and one model stands for all: as many stages at a time as there are cores
        names, cores = [s for stages, _ in plan for s in stages if not s.startswith("other")], os.cpu_count() or 1
        plan = [(tuple(names[i : i + cores]), 1) for i in range(0, len(names), cores)]
    for at, (stages, share) in enumerate(plan):
        seconds = (clock.left() - GRACE) * share / sum(s for _, s in plan[at:])
        print(f"{', '.join(stages)}: {seconds:.0f} s", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            into = {stage: Path(folder) / f"{stage.replace('/', ' of ')}.json" for stage in stages}
            running = {stage: _start(stage, into[stage], seconds, mode, results["ceilings"], cuda) for stage in stages}
            began, limit = clock.left(), Clock(min(seconds + GRACE, max(1.0, clock.left() - 2)))
            for stage, process in running.items():
                found = _finish(stage, process, into[stage], limit)
                results["stages"][stage] = {"seconds": round(began - clock.left(), 1)} | found
                write(out / "results.json", results)
        if stages == ("card",) and cuda:
            from benchmarks.gpu.card import ceilings

            results["ceilings"] = ceilings(results["stages"]["card"]["rows"])
            write(out / "results.json", results)
    return results


def _start(stage: str, into: Path, seconds: float, mode: str, ceilings: dict[str, float], cuda: bool) -> subprocess.Popen[str]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"HF_HUB_OFFLINE": "1"}
    if not cuda:
        env |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.gpu.run", "--stage", stage, "--into", str(into), "--mode", mode]
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
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.run", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mode", choices=MINUTES, default="normal")
    parser.add_argument("--minutes", type=float, help="default: 8, quick 3, full 90")
    parser.add_argument("--since", type=float, help="seconds since the epoch that the minutes count from; default: now")
    parser.add_argument("--out", type=Path, help="folder of results.json; default: $OUT, else benchmarks/results")
    parser.add_argument("--stage", help="run this one in this process")
    parser.add_argument("--into", type=Path, help="where --stage writes its rows; without it they are kept nowhere")
    parser.add_argument("--seconds", type=float, default=3600.0, help="what --stage may take")
    parser.add_argument("--ceilings", type=json.loads, default={}, help="measured ones, as JSON, for --stage")
    args = parser.parse_args(argv)
    if args.stage:
        return run_stage(args.stage, args.into, args.seconds, args.mode, args.ceilings)
    cuda = torch.cuda.is_available()
    if not cuda:
        from gptneo_fast.device import why_no_cuda

        print(f"No GPU: {why_no_cuda()}. A dry run on tiny shapes follows; its figures mean nothing.", flush=True)
    fallback = Path(os.environ.get("OUT") or (REPO / "benchmarks" / "results" if cuda else tempfile.mkdtemp()))
    out, taken = args.out or fallback, time.time() - (args.since or time.time())
    results = run_all(args.mode, out, Clock((args.minutes or MINUTES[args.mode]) * 60 - taken))
    print(f"\n{summary(results)}\n\n{out / 'results.json'}")
    return 1 if any(stage["failures"] for stage in results["stages"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
