"""The table at the end of a GPU run."""

from __future__ import annotations

from typing import Any

from benchmarks.static.costs import as_table

OURS = "gptneo_fast"
_MEASURED = {"ms": ".3g", "device ms": ".3g", "floor ms": ".3g", "predicted ms": ".3g", "tokens/s": ",.0f"}
_MEASURED |= {"share of floor": ".3g", "peak GB": ".3g"}
_KERNEL = ("us", "floor us", "predicted us", "GB/s", "TFLOP/s", "bound", "share of floor", "error over budget", "torch us")


def summary(results: dict[str, Any]) -> str:
    """Everything that was measured and everything that failed, as Markdown."""
    stages = results["stages"]
    parts = [_verdicts(stages)]
    card = {row["case"]: row for row in stages.get("card", {}).get("rows", [])}
    if "machine" in card:
        parts.append("; ".join(f"{k} {v}" for k, v in card["machine"].items() if k != "case" and v is not None))
    rows = [[name, value, unit] for name, row in card.items() if name != "machine" for value, unit in [_measure(row)]]
    parts.append(as_table(["ceiling", "measured", "unit"], rows))
    parts.append(_models(_rows(stages, *_WHOLE)))
    parts.append(_kernels(_rows(stages, "kernels", "other kernels")))
    parts.append(_profiles(_rows(stages, "profile")))
    parts.append(_sweeps(_rows(stages, "sweeps")))
    if results["dry_run"]:
        parts.append("Dry run on tiny shapes without a GPU: these figures mean nothing.")
    return "\n\n".join(part for part in parts if part)


def models(results: dict[str, Any]) -> str:
    """Whole models alone, under the card, its ceilings and what failed."""
    stages = results["stages"]
    card = {row["case"]: row for row in _rows(stages, "card")}
    machine = card.pop("machine", {})
    said = ", ".join(f"{name} {' '.join(_measure(row))}" for name, row in card.items())
    names = ("torch", "triton", "transformers", "commit")
    lines = [f"{machine.get('card')}: {said}. " + ", ".join(f"{name} {machine.get(name)}" for name in names) + "."]
    lines += [f"Failed: {case}: {why}." for stage in stages.values() for case, why in stage["failures"].items()]
    return "\n".join([*lines, "", _models(_rows(stages, *_WHOLE))])


def headline(results: dict[str, Any]) -> list[str]:
    """Rows of tokens/s of decoding: transformers, the best other, ours; its best way where it has two."""
    card = next((row["card"] for row in _rows(results["stages"], "card") if row["case"] == "machine"), "a GPU")
    found: dict[tuple[str, int, int], dict[str, float]] = {}
    for r in _rows(results["stages"], *_WHOLE):
        if r.get("work") == "decode":
            speeds = found.setdefault((r["model"], r["batch"], r["context"]), {})
            speeds[r["runner"]] = max(r["tokens/s"], speeds.get(r["runner"], 0.0))
    lines = []
    for (model, batch, context), speeds in found.items():
        others = {runner: s for runner, s in speeds.items() if not runner.startswith(OURS)}
        eager = others.pop("transformers eager", None)
        if eager is None or OURS not in speeds:
            continue
        best = max(others, key=lambda runner: others[runner], default=None)
        other = "-" if best is None else f"{others[best]:,.0f} ({best})"
        lines.append(f"| {model}, {batch} x {context}, {card} | {eager:,.0f} | {other} | {speeds[OURS]:,.0f} |")
    return lines


_WHOLE = ("decode", "ours", "few bits", "peers", "other peers")  # stages of whole models


def _rows(stages: dict[str, Any], *names: str) -> list[dict[str, Any]]:
    return [row for name in names for row in stages.get(name, {}).get("rows", [])]


def _measure(row: dict[str, Any]) -> tuple[str, str]:
    for unit, scale, shown in (("bytes/s", 1e12, "TB/s"), ("FLOP/s", 1e12, "TFLOP/s"), ("seconds", 1e-6, "us")):
        if unit in row:
            return f"{row[unit] / scale:.3g}", shown
    return "-", ""


def _verdicts(stages: dict[str, Any]) -> str:
    rows = [[n, s.get("seconds"), len(s["rows"]), len(s["failures"]), len(s["left_out"])] for n, s in stages.items()]
    lines = [as_table(["stage", "seconds", "done", "failed", "left out"], rows)]
    for name, stage in stages.items():
        lines += [f"- FAILED: {name}, {case}: {why}" for case, why in stage["failures"].items()]
    for name, stage in stages.items():
        by_reason: dict[str, list[str]] = {}
        for case, why in stage["left_out"].items():
            by_reason.setdefault((why.partition(" s were left")[2] and "no time was left") or why, []).append(case)
        lines += [f"- left out: {name}, {len(cases)} ({cases[0]} ...): {why}" for why, cases in by_reason.items()]
    return "\n".join(lines)


def _number(row: dict[str, Any], key: str, form: str = ".3g") -> str:
    return format(row[key], form) if isinstance(row.get(key), (int, float)) else "-"


def _kernels(rows: list[dict[str, Any]]) -> str:
    cells = [[r["case"], *(_number(r, k) if k != "bound" else r[k] for k in _KERNEL), _number(r, "times torch")] for r in rows]
    return as_table(["kernel", *_KERNEL, "times torch"], cells) if cells else ""


def _models(rows: list[dict[str, Any]]) -> str:
    """Whole models; behind ours, its ratio to each peer at the same work."""
    rows = [r for r in rows if "runner" in r]
    plain = {_work(r): r["ms"] for r in rows if r["runner"] == OURS and not r.get("early_launch")}
    header = ["model", "work", "runner", *_MEASURED, "ours is faster by", "note"]
    cells = []
    for r in sorted(rows, key=lambda r: list(plain).index(_work(r)) if _work(r) in plain else len(plain)):
        work, name = _work(r), r["runner"] + (", early launches" if r.get("early_launch") else "")
        ratio = f"{r['ms'] / plain[work]:.2f}" if work in plain and name != OURS else "-"
        measured = (_number(r, key, form) for key, form in _MEASURED.items())
        note = "; ".join(str(r[k]) for k in ("path", "wrong") if r.get(k))
        cells.append([r["model"], work[1], name, *measured, ratio, note])
    return as_table(header, cells) if cells else ""


def _sweeps(rows: list[dict[str, Any]]) -> str:
    """Present tile and best, cuBLAS where there is a choice, then the winners as rows to paste."""
    if not rows:
        return ""
    header = ["tile", "now us", "best us", "cuBLAS us", "faster"]
    times = ("now us", "best us", "library us")
    cells = [[r["case"], *(_number(r, key) for key in times), r.get("faster", "-")] for r in rows]
    winners = [f"{r['row']}  # {r['case']}: {r['now us']:.3g} -> {r['best us']:.3g} us" for r in rows if r["changes"]]
    pasted = "\n".join(["```python", *winners, "```"]) if winners else "No tile is worth a change."
    return f"{as_table(header, cells)}\n\n{pasted}"


def _work(row: dict[str, Any]) -> tuple[str, str]:
    where = f" {row['batch']}, ctx {row['context']}" if "batch" in row else ""
    return row["model"], row["work"] + where


def _profiles(rows: list[dict[str, Any]]) -> str:
    cells = []
    for r in rows:
        cells.append(
            [r["case"], f"{r['launches a token']:.0f} launches", f"{r['us a token']:.0f}", f"{r['busy share']:.0%} busy"]
        )
        cells += [["", k["kernel"], f"{k['us']:.1f}", f"{k['share']:.0%} of the busy time"] for k in r["slowest"]]
    return as_table(["profile", "kernel", "us", "share"], cells) if cells else ""
