"""The compile report in a few kilobytes, to be committed for each version of Triton and compared with what it gives today."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.static import aot
from benchmarks.static.costs import as_table

if TYPE_CHECKING:
    from benchmarks.static.compile_report import Row

LEGEND = (
    "The most registers of a thread, a stroke, the most KB of shared memory of a block; then, where there are any, accesses of "
    "local memory, the share of a kernel's weight bytes that do not come 128 bits at a time, instructions of tensor cores."
)


def path(folder: Path, packed: bool = False) -> Path:
    """Where the summary for the installed Triton stands in a folder; that of weights in few bits in a file of its own."""
    import triton

    return folder / f"compile_{'packed_' * packed}triton-{triton.__version__}.md"


def write(found: Sequence[Row], verdict: str, to: Path) -> None:
    """The summary as a file."""
    how = " --quantize int8 int4" * ("packed" in to.name)
    title = f"# Compile report\n\n{aot.versions()}. `python -m benchmarks.static.compile_report{how}` writes this file."
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text(f"{title}\n\n{verdict}\n\n{LEGEND}\n\n{summary(found)}\n")


def summary(found: Sequence[Row]) -> str:
    """A line for each kernel of an op of a model, a cell for each dtype and capability, as `LEGEND` says. Markdown."""
    columns = list(dict.fromkeys((row.dtype, row.sm) for row in found))
    lines: dict[tuple[str, str, str], dict[tuple[str, int], list[Row]]] = {}
    for row in found:
        lines.setdefault((row.model, row.op, row.kernel), {}).setdefault((row.dtype, row.sm), []).append(row)
    head = ["model", "op", "kernel", *(f"{dtype}_{sm}" for dtype, sm in columns)]
    body = ([*line, *(_cell(rows_of.get(column, [])) for column in columns)] for line, rows_of in lines.items())
    return re.sub("-{4,}", "---", re.sub(" +", " ", as_table(head, body)))


def _cell(variants: Sequence[Row]) -> str:
    """The worst of what one kernel of an op was compiled to, for its batches and phases."""
    if not variants:
        return "-"
    if any(row.fault for row in variants):
        return "does not compile"
    shared = -(-max(row.shared for row in variants) // 1024)
    shares = [row.weight_share for row in variants if row.weight_share is not None and row.weight_share < 1]
    spills = max(row.spills for row in variants)
    cores = "+".join(sorted({row.tensor_cores for row in variants} - {""}))
    said = [f"{spills} local" if spills else "", f"{1 - min(shares):.0%} narrow" if shares else "", cores]
    return " ".join([f"{max(row.registers for row in variants)}/{shared}", *filter(None, said)])


def cells(text: str) -> dict[tuple[str, ...], str]:
    """A summary read again: (model, op, kernel, column) to its cell."""
    head, _, *lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    return {(*line[:3], column): cell for line in lines for column, cell in zip(head[3:], line[3:], strict=True)}
