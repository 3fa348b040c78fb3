"""Results to tables: `python -m benchmarks.tables` reduces a run of `pytest benchmarks` and writes tables and plots of pages.

python -m benchmarks.tables [--cpu RAW.json ...] [--peers RAW.json ...]   # of --benchmark-json; else the pages are made anew
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.gpu import table as gpu_table
from gptneo_fast.tools.bench import bars

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README, PERFORMANCE = ROOT / "README.md", ROOT / "docs" / "performance.md"
PLOTS = ROOT / "docs" / "plots"
BEGIN, END = "<!-- measured: made by `make tables` -->", "<!-- end of measured -->"
OURS, PEER = "gptneo_fast", "transformers eager"
RUNTIMES = ("onnxruntime", "openvino", "ctranslate2", "llama-cpp-python", "nncf")  # distributions, where they are installed
BESIDE_RUNTIMES = "bench_peers.py"
OPEN = "Tokens are transformers', but for choices that rounding leaves open (llama.cpp's GELU is a table of float16)"


def instructions() -> str:
    """What torch's products on this CPU are made of: a kind of CPU, which has results of its own."""
    import torch

    from gptneo_fast.ops import widened

    return torch.backends.cpu.get_cpu_capability() + ("" if torch.bfloat16 in widened.DTYPES else " with bfloat16")


def merge(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Reduced runs of one kind of CPU as one: of what several have measured the last; each row says its commit."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for run in runs:
        for row in run["rows"]:
            rows[row["work"], row["dtype"], row["threads"], row["runner"]] = row | {"commit": run["commit"]}
    commits = list(dict.fromkeys(row["commit"] for row in rows.values()))
    return runs[-1] | {"rows": list(rows.values()), "commit": ", ".join(commits)}


def reduce(raw: dict[str, Any], peers: bool = False) -> dict[str, Any]:
    """What of pytest-benchmark's JSON is worth keeping: the machine, the versions, a row for each measurement.

    peers: those beside other runtimes, which have a file of their own; else all but those.
    """
    from importlib.metadata import distributions, version

    cpu = raw["machine_info"].get("cpu", {})
    found = [b for b in raw["benchmarks"] if (BESIDE_RUNTIMES in b["fullname"]) == peers]
    installed = {d.metadata["Name"].replace("_", "-"): d.version for d in distributions()} if peers else {}
    missing = {(m["runner"], m["dtype"]): m for b in found for m in b["extra_info"].get("missing", [])}
    return {
        "when": raw["datetime"][:10],
        "commit": raw["commit_info"].get("id", "unknown")[:10] + ("-dirty" if raw["commit_info"].get("dirty") else ""),
        "cpu": f"{cpu.get('brand_raw', 'unknown')}, {instructions()}",
        "cores": cpu.get("count"),
        **{name: version(name) for name in ("torch", "transformers")},
        **{name: installed[name] for name in RUNTIMES if name in installed},
        "python": raw["machine_info"]["python_version"],
        "rows": [row | {"rounds": b["stats"]["rounds"]} for b in found for row in b["extra_info"].get("rows", [])],
    } | ({"missing": list(missing.values())} if peers else {})


def cpu_table(results: dict[str, Any]) -> str:
    """Ours beside transformers, in Markdown."""
    rows = {(r["work"], r["dtype"], r["threads"], r["runner"]): r for r in results["rows"] if "tokens_per_second" in r}
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
    return "\n".join([*lines, *_whole(results), *_floors(results), *_starts(results)])


def _floors(results: dict[str, Any]) -> list[str]:
    """Of decode steps: the time that reading takes beside the time that was measured."""
    rows = [r for r in results["rows"] if "floor_ms" in r and r["runner"] == OURS]
    rates = {n: statistics.median(r["read_gb_per_s"] for r in rows if r["threads"] == n) for n in {r["threads"] for r in rows}}
    if not rows:
        return []
    return [
        "",
        "A step reads every weight and all keys and values in sight; its floor is their bytes over that run's read bandwidth, "
        + ", ".join(f"{rate:.1f} GB/s on {n} threads" for n, rate in sorted(rates.items()))
        + ". What fits the caches may be faster than that.",
        "",
        "| A step of gptneo_fast on the CPU | dtype | threads | floor, ms | measured, ms | share |",
        "|---|---|---|---|---|---|",
        *(
            f"| {r['work']} | {r['dtype']} | {r['threads']} | {r['floor_ms']:.2f} | {r['step_ms']:.2f} | "
            f"{r['share_of_floor']:.0%} |"
            for r in rows
        ),
    ]


def _whole(results: dict[str, Any]) -> list[str]:
    """Of works that are long enough for one round: which they are, other runtimes, memory above the weights."""
    works = dict.fromkeys(r["work"] for r in results["rows"] if r.get("rounds") == 1)
    others = [r for r in results["rows"] if "tokens_per_second" in r and r["runner"] not in (OURS, PEER)]
    scores = [r for r in results["rows"] if "extra_mb" in r]
    lines = [f"Of one round, which is hundreds of calls: {'; '.join(works)}."] if works else []
    for r in others:
        lines.append(f"{r['runner']}, {r['work']}, {r['threads']} threads: {r['tokens_per_second']:.1f} tokens/s.")
    if scores:
        said = (f"{r['extra_mb']:.0f} MB ({r['runner']}, {r['threads']} threads)" for r in scores)
        lines.append(f"Memory above the weights, {scores[0]['work']}: {', '.join(said)}.")
    return [line for text in lines for line in ("", text)]


def _starts(results: dict[str, Any]) -> list[str]:
    """Of processes from nothing to the first token."""
    rows = [r for r in results["rows"] if "peak_mb" in r]
    if not rows:
        return []
    return [
        "",
        "| A process on the CPU | runner | seconds | peak memory, MB | weights, MB |",
        "|---|---|---|---|---|",
        *(
            f"| {r['work']}, {r['dtype']} | {r['runner']} | {r['ms'] / 1e3:.2f} | {r['peak_mb']:.0f} | {r['weights_mb']:.0f} |"
            for r in rows
        ),
    ]


def peers_table(results: dict[str, Any]) -> str:
    """Every runtime's tokens per second and share of the floor, in Markdown: a line for each work and dtype."""
    rows = {(r["work"], r["dtype"], r["runner"]): r for r in results["rows"]}
    runners = list(dict.fromkeys([*(r["runner"] for r in results["rows"]), *(m["runner"] for m in results["missing"])]))
    rates = [r["read_gb_per_s"] for r in results["rows"]]
    threads = sorted({r["threads"] for r in results["rows"]})
    versions = ", ".join(f"{name} {results[name]}" for name in ("torch", "transformers", *RUNTIMES) if name in results)
    lines = [
        f"Other runtimes with the same weights on {', '.join(map(str, threads))} thread, {results['cores']} cores "
        f"({results['cpu']}); {versions}; commit {results['commit']}, {results['when']}. Tokens/s of whole greedy calls, "
        "medians of rounds in turn, and in brackets which share of a step is its floor: bytes that it must read over that "
        f'run\'s read bandwidth, {min(rates):.1f} to {max(rates):.1f} GB/s. "As GPT-2": the runtime knows no GPT-Neo; GPT-2 '
        "computes the same as long as a text fits the window, and errs past it.",
        "",
        f"| CPU | dtype | {' | '.join(runners)} |",
        "|---|---|" + "---|" * len(runners),
    ]
    for work, dtype in dict.fromkeys((r["work"], r["dtype"]) for r in results["rows"]):
        found = [rows.get((work, dtype, runner)) for runner in runners]
        cells = ["-" if r is None else f"{r['tokens_per_second']:.1f} ({r['share_of_floor']:.0%})" for r in found]
        lines.append(f"| {work} | {dtype} | {' | '.join(cells)} |")
    whys = [f"{m['runner']}, {m['dtype']}: {m['why']}." for m in results["missing"]]
    exact = [r for r in results["rows"] if not r["dtype"].startswith("int")]
    left = [f"{r['runner']}, {r['work']}, {r['dtype']}: {r['tokens']}." for r in exact if r["tokens"] != "equal"]
    said = f"{OPEN}: {' '.join(left)}" if left else "All tokens are transformers'."
    if len(exact) < len(results["rows"]):
        said += " In int8 and int4 each runtime rounds weights in its own way, some activations too; tokens are likely ones."
        wild = [r for r in results["rows"] if r.get("off", 0) > 2]
        said += "".join(
            f" {r['runner']}, {r['work']}, {r['dtype']}: unlikely ones, as if logits erred {r['off'] / 2:.0f} times as ours do."
            for r in wild
        )
    return "\n".join([*lines, "", *(["Not measured: " + " ".join(whys)] if whys else []), said])


def few_bits_table(results: dict[str, Any]) -> str:
    """Weights in 8 and 4 bits: quality, then speed, in Markdown."""
    errors = {row["way"]: row["error"] for row in results["errors"]}
    lines = [
        f"Weights in 8 and 4 bits (CPU with {results['cpu']}, torch {results['torch']}; commit {results['commit']}, "
        f"{results['when']}): perplexity of the embedded model on stories that its training held out, and the error of logits "
        "of random weights of the shape of 125m as a share of their spread.",
        "",
        "| weights | perplexity | above float32 | error of random weights |",
        "|---|---|---|---|",
    ]
    for row in results["quality"]:
        error = f"{errors[row['way']]:.1%}" if row["way"] in errors else "-"
        lines.append(f"| {row['way']} | {row['perplexity']:.4f} | {row['share']:+.3%} | {error} |")
    lines += [
        "",
        f"Greedy steps after a prompt of 128, and the prompt, on one thread, models otherwise in bfloat16; medians of "
        f"{results['rounds']} rounds in turn, logits held first to those of what the weights stand for:",
        "",
        "| shape | weights | MB | steps/s | of bfloat16's | prompt, ms | of bfloat16's |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in results["speed"]:
        lines.append(
            f"| {row['shape']} | {row['way']} | {row['mb']:.0f} | {row['steps_per_second']:.1f} | {row['ratio']:.2f} x | "
            f"{row['prompt_ms']:.0f} | {row['prompt_ratio']:.2f} x |"
        )
    return "\n".join(lines)


def cpu_plot(results: dict[str, Any], path: Path) -> None:
    """Bars of ours and transformers' tokens per second, each work as a share of transformers'."""
    timed = [r for r in results["rows"] if "tokens_per_second" in r]
    rows = {(r["work"], r["dtype"], r["threads"], r["runner"]): r["tokens_per_second"] for r in timed}
    works = [key[:3] for key in rows if key[3] == OURS and (*key[:3], PEER) in rows]
    bars(
        path,
        [f"{work}\n{dtype}, {n} threads" for work, dtype, n in works],
        {PEER: [1.0] * len(works), OURS: [rows[*work, OURS] / rows[*work, PEER] for work in works]},
        ylabel="tokens/s, transformers eager = 1",
        labels={OURS: [f"{rows[*work, OURS]:.0f}/s" for work in works]},
    )


def of_kinds(name: str) -> list[Path]:
    """The results of every kind of CPU that was met."""
    return sorted(RESULTS.glob(f"{name}_*.json"))


def gpu_runs() -> list[dict[str, Any]]:
    """The results of `make gpu` on cards."""
    runs = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    return [run for run in runs if isinstance(run, dict) and "stages" in run and not run["dry_run"]]


def headline() -> str:
    """The README's section: decoding beside the peers in one table, and the plot of the last kind of CPU."""
    lines = ["| tokens/s | transformers eager | the best other | gptneo_fast |", "|---|---|---|---|"]
    newest = max((json.loads(path.read_text()) for path in of_kinds("peers")), key=lambda run: run["when"])
    speeds: dict[tuple[str, str], dict[str, float]] = {}
    for r in newest["rows"]:
        speeds.setdefault((r["work"].partition(",")[0], r["dtype"]), {})[r["runner"]] = r["tokens_per_second"]
    for (shape, dtype), found in speeds.items():
        best = max(set(found) - {OURS, PEER}, key=lambda runner: found[runner])
        cells = f"{found[PEER]:.0f}" if PEER in found else "-", f"{found[best]:.0f} ({best})", f"{found[OURS]:.0f}"
        lines.append(f"| {shape}, {dtype}, one CPU core ({newest['cpu']}) | {' | '.join(cells)} |")
    lines += [line for run in gpu_runs() for line in gpu_table.headline(run)]
    plot = max(of_kinds("cpu"), key=lambda path: json.loads(path.read_text())["when"]).stem
    note = "Greedy decoding of whole calls on the CPU (128 tokens, 64 new ones), of steps on the GPU, in bfloat16 there; "
    note += "medians, tokens checked. Ratios differ between machines."
    return "\n".join([*lines, "", note, "", f"![speed on a CPU, transformers = 1](docs/plots/{plot}.svg)"])


def measured() -> str:
    """The section of the page on performance, from the files in benchmarks/results."""
    parts = []
    for path in of_kinds("cpu"):
        parts += [cpu_table(json.loads(path.read_text())), f"![CPU speeds](plots/{path.stem}.svg)"]
    if not parts:
        parts.append("Speed on the CPU: not measured.")
    parts += [few_bits_table(json.loads(path.read_text())) for path in of_kinds("few_bits")]
    parts += [peers_table(json.loads(path.read_text())) for path in of_kinds("peers")]
    gpu = gpu_runs()
    parts += [gpu_table.models(run) for run in gpu]
    if not gpu:
        parts.append("Speed on a GPU: not measured. `make gpu` measures it, with the floors and goals beside it.")
    return "\n\n".join(parts)


def renewed(text: str, tables: str) -> str:
    """A page with its tables made anew."""
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{tables}\n{END}{tail}"


def main() -> None:
    """Reduce a raw file if there is one, then write the README's and the performance page's tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    becomes = "becomes benchmarks/results/{}_<kind>.json; of several runs the last that has a measurement"
    parser.add_argument("--cpu", type=Path, nargs="+", help="pytest-benchmark's JSON, " + becomes.format("cpu"))
    parser.add_argument("--peers", type=Path, nargs="+", help="the same of bench_peers.py, " + becomes.format("peers"))
    args = parser.parse_args()
    for name, raws in (("cpu", args.cpu), ("peers", args.peers)):
        if raws:
            kept = merge([reduce(json.loads(raw.read_text()), peers=name == "peers") for raw in raws])
            kind = instructions().lower().replace(" with ", "_")
            (RESULTS / f"{name}_{kind}.json").write_text(json.dumps(kept, indent=1) + "\n")
    for path in of_kinds("cpu"):
        cpu_plot(json.loads(path.read_text()), PLOTS / f"{path.stem}.svg")
    README.write_text(renewed(README.read_text(), headline()))
    PERFORMANCE.write_text(renewed(PERFORMANCE.read_text(), measured()))


if __name__ == "__main__":
    main()
