"""Every kernel as it is launched at the true shapes, compiled ahead of time: registers, spills, loads, tensor cores.

    python -m benchmarks.compile_report                                       # all; writes benchmarks/results/
    python -m benchmarks.compile_report --model 125m --dtype bf16 --sm 90 --out /tmp/report

A model of two layers, one global and one local, runs its prefill and its decode steps on tensors that do not exist, so that
the launchers themselves say what is compiled (benchmarks/aot.py). No GPU is needed. Exit code 1: a row is over its budget.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch._subclasses import FakeTensorMode

import gptneo_fast
from benchmarks import aot
from benchmarks.costs import as_table
from benchmarks.counting import swapped
from benchmarks.models import DTYPES, SHAPES, config_of
from gptneo_fast import backends, ops
from gptneo_fast.cache import KVCache

RESULTS = Path(__file__).parent / "results"
PREFILL, CONTEXT, BATCHES = 2048, 2048, (1, 8, 64)
WEIGHT_OPS = ("norm_qkv", "norm_linear", "linear_add", "norm_qkv_append", "lm_head", "logprob")
MATMUL_OPS = ("norm_qkv", "norm_linear", "linear_add", "attention")  # of a prefill: these run on tensor cores
VECTOR_SHARE = 0.95


@dataclass
class Row:
    """One kernel as a model launches it. launches: its blocks, as "16x24", by phase."""

    model: str
    dtype: str
    sm: int
    op: str
    kernel: str
    tiles: dict[str, Any]
    launches: dict[str, list[str]]
    warps: int
    registers: int
    spills: int
    stack: int
    shared: int
    warps_per_sm: int
    vector_share: float | None
    tensor_cores: str

    def faults(self) -> list[str]:
        """What is over budget."""
        found = []
        if self.spills or self.stack:
            found.append(f"spills: {self.spills} accesses of local memory, {self.stack} bytes of stack")
        if self.shared > aot.CHIPS[self.sm].block_shared or self.warps_per_sm == 0:
            found.append(f"does not fit: {self.shared} bytes of shared memory, {self.registers} registers")
        if self.op in WEIGHT_OPS and self.vector_share is not None and self.vector_share < VECTOR_SHARE:
            found.append(
                f"{self.vector_share:.0%} of the weight bytes come 128 bits at a time, at least {VECTOR_SHARE:.0%} must"
            )
        on_tensor_cores = self.op in MATMUL_OPS and any("prefill" in phase for phase in self.launches) and self.tiles_a_dot()
        if on_tensor_cores and (self.sm, self.dtype) == (90, "bf16") and self.tensor_cores != "HGMMA":
            found.append(f"tensor cores: {self.tensor_cores or 'none'}, HGMMA is due")
        return found

    def tiles_a_dot(self) -> bool:
        """Whether this is the kernel of the op that multiplies, and not the norm before it."""
        return "norm_kernel" not in self.kernel or "linear" in self.kernel


def namespace(pad: aot.Launchpad) -> Any:
    """The launchers under the names of their ops, each saying which it is; an op without a kernel gives its fake."""
    from gptneo_fast import kernels

    def pick(name: str) -> Any:
        return pad.during(name, getattr(kernels, name, None) or getattr(ops, name))

    return SimpleNamespace(**{name: pick(name) for name in ops.NAMES})


def _every_call_takes(pad: aot.Launchpad) -> Any:
    choice = backends.Choice("triton", "compiled ahead of time", namespace(pad))
    return swapped(backends, "choose", lambda _: lambda *a, **k: choice)


def launches(shape: str, dtype: torch.dtype, sm: int) -> Iterator[tuple[str, aot.Launch]]:
    """(phase, launch) of a prefill and of decode steps of a released size, cut to its first two layers."""
    config = config_of(shape).replace(num_layers=2)
    with torch.device("meta"):
        model = gptneo_fast.GPTNeoForCausalLM(config, backend="reference").to(dtype).eval()
    with aot.Launchpad(sm) as pad, FakeTensorMode(), _every_call_takes(pad):
        for module in model.modules():
            for name, p in module.named_parameters(recurse=False):
                fake = torch.empty(p.shape, dtype=dtype, device="cuda")
                setattr(module, name, torch.nn.Parameter(fake, requires_grad=False))
        with torch.no_grad():
            for batch, tokens, past in ((1, PREFILL, 0), *((batch, 1, CONTEXT - 1) for batch in BATCHES)):
                phase = f"prefill {batch}x{tokens}" if past == 0 else f"decode {batch}"
                before = len(pad.launches)
                _step(model, batch, tokens, past, namespace(pad))
                yield from ((phase, launch) for launch in pad.launches[before:])


def _step(model: Any, batch: int, tokens: int, past: int, op: Any) -> None:
    """The trunk over new tokens after a past, then the logits of the last ones."""
    device, trunk = torch.device("cuda"), model.transformer
    cache = KVCache(model.config, batch, dtype=model.dtype, device=device, max_length=CONTEXT)
    cache.advance(past, None)
    ids = torch.zeros(batch, tokens, dtype=torch.int64, device=device)
    positions = torch.arange(past, past + tokens, device=device)[None]
    hidden = trunk.run(ids, positions, cache=cache)
    if hasattr(op, "lm_head"):
        op.lm_head(hidden.narrow(1, tokens - 1, 1), trunk.ln_f.weight, trunk.ln_f.bias, model.lm_head.weight, trunk.ln_f.eps)


def rows(shape: str, dtype: str, sm: int) -> list[Row]:
    """One row for each distinct kernel of an op."""
    found: dict[tuple[str, str], Row] = {}
    for phase, launch in launches(shape, DTYPES[dtype], sm):
        key = (launch.op, aot.digest(launch.binary))
        grid = "x".join(map(str, launch.grid))
        if key in found:
            grids = found[key].launches.setdefault(phase, [])
            grids += [] if grid in grids else [grid]
            continue
        machine = _inspected(launch.binary)
        held = aot.warps_per_sm(sm, machine.registers, launch.warps, launch.shared)
        found[key] = Row(
            shape,
            dtype,
            sm,
            launch.op,
            launch.kernel,
            launch.options,
            {phase: [grid]},
            launch.warps,
            machine.registers,
            machine.spills,
            machine.stack,
            launch.shared,
            held,
            machine.vector_share,
            machine.tensor_cores,
        )
    return list(found.values())


def _inspected(binary: bytes) -> aot.Machine:
    """What `aot.inspect` found, kept beside Triton's own cache of binaries."""
    import triton

    path = Path(triton.knobs.cache.dir) / "inspected" / f"{aot.digest(binary)}.json"
    if path.exists():
        values = json.loads(path.read_text())
        for name in ("loads", "marked_loads"):
            values[name] = {int(k): v for k, v in values[name].items()}
        return aot.Machine(**values)
    machine = aot.inspect(binary)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dataclasses.asdict(machine)))
    return machine


HEADER = "model dtype sm op kernel tiles warps registers spills shared warps/SM 128-bit tensor_cores blocks".split()


def table(found: Sequence[Row]) -> str:
    """The rows as Markdown."""

    def cells(row: Row) -> list[object]:
        tiles = " ".join(f"{k}={v}" for k, v in row.tiles.items())
        share = "-" if row.vector_share is None else f"{row.vector_share:.0%}"
        machine = [row.warps, row.registers, row.spills, row.shared, row.warps_per_sm, share, row.tensor_cores or "-"]
        blocks = "; ".join(f"{phase}: {', '.join(grids)}" for phase, grids in row.launches.items())
        return [row.model, row.dtype, row.sm, row.op, row.kernel, tiles, *machine, blocks]

    return as_table(HEADER, map(cells, found))


def versions() -> str:
    """What compiled the rows."""
    import triton

    return f"triton {triton.__version__}, torch {torch.__version__.partition('+')[0]}"


def main(argv: Sequence[str] | None = None) -> int:
    """Compile, print, write; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile_report", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--sm", nargs="+", type=int, choices=aot.CHIPS, default=list(aot.CHIPS))
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of compile_report.md and compile_report.json")
    args = parser.parse_args(argv)
    began, found = time.perf_counter(), []
    for shape in args.model:
        for dtype in args.dtype:
            for sm in args.sm:
                found += rows(shape, dtype, sm)
                print(f"{shape} {dtype} sm_{sm}: {len(found)} rows, {time.perf_counter() - began:.0f} s", file=sys.stderr)
    faults = [
        f"{r.model} {r.dtype} sm_{r.sm} {r.op} {r.kernel} ({', '.join(r.launches)}): {f}" for r in found for f in r.faults()
    ]
    args.out.mkdir(parents=True, exist_ok=True)
    values = {"versions": versions(), "faults": faults, "rows": [dataclasses.asdict(r) for r in found]}
    (args.out / "compile_report.json").write_text(json.dumps(values, indent=1) + "\n")
    verdict = "\n".join(f"- over budget: {f}" for f in faults) or "Every row is within its budget."
    title = f"# Compile report\n\n{versions()}. `python -m benchmarks.compile_report` writes this file."
    (args.out / "compile_report.md").write_text(f"{title}\n\n{verdict}\n\n{table(found)}\n")
    print(table(found), verdict, sep="\n\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
