"""Results to tables: `python -m benchmarks.tables` reduces a run of `pytest benchmarks` and writes the README's tables.

python -m benchmarks.tables [--cpu RAW.json]   # RAW.json: of --benchmark-json; without it the README is made anew
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.gpu import table as gpu_table
from gptneo_fast.tools.bench import bars

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
BEGIN, END = "<!-- measured: made by `make tables` -->", "<!-- end of measured -->"
OURS, PEER = "gptneo_fast", "transformers eager"


def reduce(raw: dict[str, Any]) -> dict[str, Any]:
    """What of pytest-benchmark's JSON is worth keeping: the machine, the versions, a row for each measurement."""
    from importlib.metadata import version

    cpu = raw["machine_info"].get("cpu", {})
    return {
        "when": raw["datetime"][:10],
        "commit": raw["commit_info"].get("id", "unknown")[:10] + ("-dirty" if raw["commit_info"].get("dirty") else ""),
        "cpu": cpu.get("brand_raw", "unknown"),
        "cores": cpu.get("count"),
        **{name: version(name) for name in ("torch", "transformers")},
        "python": raw["machine_info"]["python_version"],
        "rows": [row | {"rounds": b["stats"]["rounds"]} for b in raw["benchmarks"] for row in b["extra_info"].get("rows", [])],
    }


def cpu_table(results: dict[str, Any]) -> str:
    """Ours beside transformers, in Markdown."""
    rows = {(r["work"], r["dtype"], r["threads"], r["runner"]): r for r in results["rows"]}
    lines = [
        f"Random weights, {results['cores']} cores ({results['cpu']}), torch {results['torch']}, transformers "
        f"{results['transformers']}; commit {results['commit']}, {results['when']}. Medians of rounds in turn; tokens and "
        "logits checked first. Ratios differ between machines.",
        "",
        "| CPU | dtype | threads | transformers eager, tokens/s | gptneo_fast, tokens/s | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for (work, dtype, threads, runner), ours in rows.items():
        theirs = rows.get((work, dtype, threads, PEER))
        if runner == OURS and "host cost" not in work:  # that is no user's business: benchmarks/NOTES.md has it
            speed = ours["tokens_per_second"]
            beside = "-" if theirs is None else f"{theirs['tokens_per_second']:.1f}"
            ratio = "-" if theirs is None else f"{speed / theirs['tokens_per_second']:.2f}"
            lines.append(f"| {work} | {dtype} | {threads} | {beside} | {speed:.1f} | {ratio} |")
    return "\n".join(lines)


def cpu_plot(results: dict[str, Any], path: Path) -> None:
    """Bars of ours and transformers' tokens per second, each work as a share of transformers'."""
    rows = {(r["work"], r["dtype"], r["threads"], r["runner"]): r["tokens_per_second"] for r in results["rows"]}
    works = [key[:3] for key in rows if key[3] == OURS and (*key[:3], PEER) in rows]
    bars(
        path,
        [f"{work}\n{dtype}, {n} threads" for work, dtype, n in works],
        {PEER: [1.0] * len(works), OURS: [rows[*work, OURS] / rows[*work, PEER] for work in works]},
        ylabel="tokens/s, transformers eager = 1",
        labels={OURS: [f"{rows[*work, OURS]:.0f}/s" for work in works]},
    )


def measured() -> str:
    """The README's section, from the files in benchmarks/results."""
    parts = []
    cpu = RESULTS / "cpu.json"
    if cpu.is_file():
        parts += [cpu_table(json.loads(cpu.read_text())), "![CPU speeds](benchmarks/results/cpu.svg)"]
    else:
        parts.append("Speed on the CPU: not measured.")
    runs = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    gpu = [run for run in runs if isinstance(run, dict) and "stages" in run and not run["dry_run"]]  # of `make gpu`
    parts += [gpu_table.summary(run) for run in gpu]
    if not gpu:
        parts.append("Speed on a GPU: not measured. `make gpu` measures it, with the floors and goals beside it.")
    return "\n\n".join(parts)


def readme(text: str) -> str:
    """The README with its tables made anew."""
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{measured()}\n{END}{tail}"


def main() -> None:
    """Reduce a raw file if there is one, then write the README."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cpu", type=Path, help="pytest-benchmark's JSON, becomes benchmarks/results/cpu.json")
    args = parser.parse_args()
    if args.cpu:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "cpu.json").write_text(json.dumps(reduce(json.loads(args.cpu.read_text())), indent=1) + "\n")
    if (RESULTS / "cpu.json").is_file():
        cpu_plot(json.loads((RESULTS / "cpu.json").read_text()), RESULTS / "cpu.svg")
    README.write_text(readme(README.read_text()))


if __name__ == "__main__":
    main()
