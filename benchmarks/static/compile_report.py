"""Every kernel as it is launched at the true shapes, compiled ahead of time: registers, spills, loads, tensor cores.

    python -m benchmarks.static.compile_report              # all; its summary goes to benchmarks/results/
    python -m benchmarks.static.compile_report --model 125m --dtype bf16 --sm 90 --out /tmp/report
    python -m benchmarks.static.compile_report --model 125m --dtype bf16 --quantize int8 int4     # weights in few bits

A model of two layers, one global and one local, runs its prefill and its decode steps on tensors that do not exist, so that
the launchers themselves say what is compiled (aot.py). No GPU is needed. Exit code 1: a row is over its budget.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch._subclasses import FakeTensorMode

import gptneo_fast
from benchmarks.models import DTYPES, SHAPES, config_of
from benchmarks.static import aot, compile_summary
from benchmarks.static.costs import as_table
from benchmarks.static.counting import swapped
from benchmarks.static.ptx import loads_by_argument
from gptneo_fast.generation.captured.runner import StepCache
from gptneo_fast.models import quantizing
from gptneo_fast.network.cache import KVCache
from gptneo_fast.ops import backends, ops
from gptneo_fast.ops.quantized import Format

RESULTS = Path(__file__).parents[1] / "results"
PREFILL, CONTEXT, BATCHES = 2048, 2048, (1, 8, 64)
PACKED_PREFILL = 256  # beside it where weights are in few bits: `gemm` unpacks them itself
MATMUL_OPS = ("norm_qkv", "norm_linear", "linear_add", "attention")  # of a prefill: these run on tensor cores
VECTOR_SHARE = 0.95
_INSPECTION = "3"  # of what aot.inspect looks for; older findings on disk are not read
_WEIGHT = re.compile(r"w_ptrs\.\d|weight_ptr")  # arguments that are weights, in every kernel


@dataclass
class Row:
    """One kernel as a model launches it.

    launches: its blocks, as "16x24", by phase. vector_share, weight_share: of the bytes of all loads, and of loads of
    weights, those that come 128 bits at a time; None where there are none. fault: of the compiler.
    """

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
    weight_share: float | None
    tensor_cores: str
    fault: str = ""

    def faults(self) -> list[str]:
        """What is over budget."""
        if self.fault:
            return [f"does not compile: {self.fault}"]
        found = []
        if self.spills or self.stack:
            found.append(f"spills: {self.spills} accesses of local memory, {self.stack} bytes of stack")
        if self.shared > aot.CHIPS[self.sm].block_shared or self.warps_per_sm == 0:
            found.append(f"does not fit: {self.shared} bytes of shared memory, {self.registers} registers")
        if self.weight_share is not None and self.weight_share < VECTOR_SHARE:
            found.append(
                f"{self.weight_share:.0%} of the weight bytes come 128 bits at a time, at least {VECTOR_SHARE:.0%} must"
            )
        on_tensor_cores = self.op in MATMUL_OPS and any("prefill" in phase for phase in self.launches) and self.tiles_a_dot()
        if on_tensor_cores and (self.sm, self.dtype) == (90, "bf16") and self.tensor_cores != "HGMMA":
            found.append(f"tensor cores: {self.tensor_cores or 'none'}, HGMMA is due")
        shared = self.kernel == "skinny" and self.tiles.get("NB", 0) > 16  # by four warps
        if shared and self.sm == 90 and self.dtype != "fp32" and self.tensor_cores != "HGMMA":
            found.append(f"tensor cores: {self.tensor_cores or 'none'} for {self.tiles['NB']} rows, HGMMA is due")
        return found

    def tiles_a_dot(self) -> bool:
        """Whether this is the kernel of the op that multiplies, and not the norm or the unpacking of weights before it."""
        return self.kernel != "_unpack" and ("norm_kernel" not in self.kernel or "linear" in self.kernel)


def namespace(pad: aot.Launchpad) -> Any:
    """The launchers under the names of their ops, each saying which it is; an op without a kernel gives its fake."""
    from gptneo_fast import kernels

    def pick(name: str) -> Any:
        return pad.during(name, getattr(kernels, name, None) or getattr(ops, name))

    return SimpleNamespace(**{name: pick(name) for name in ops.NAMES})


def _every_call_takes(pad: aot.Launchpad) -> Any:
    choice = backends.Choice("triton", "compiled ahead of time", namespace(pad))
    return swapped(backends, "choose", lambda _: lambda *a, **k: choice)


def launches(shape: str, dtype: torch.dtype, sm: int, how: Format | None = None) -> Iterator[tuple[str, aot.Launch]]:
    """(phase, launch) of a prefill and of decode steps of a released size, cut to its first two layers; how: of its weights."""
    config = config_of(shape).replace(num_layers=2)
    with torch.device("meta"):
        model = gptneo_fast.GPTNeoForCausalLM(config, backend="reference").to(dtype).eval()
    with aot.Launchpad(sm) as pad, FakeTensorMode(), _every_call_takes(pad):
        for module in model.modules():
            for name, p in module.named_parameters(recurse=False):
                fake = torch.empty(p.shape, dtype=dtype, device="cuda")
                setattr(module, name, torch.nn.Parameter(fake, requires_grad=False))
        if how is not None:
            quantizing.prepare(model, how, device="cuda")
        with torch.no_grad():
            prompts = [PREFILL] if how is None else [PREFILL, PACKED_PREFILL]
            for batch, tokens, past in (*((1, T, 0) for T in prompts), *((batch, 1, CONTEXT - 1) for batch in BATCHES)):
                phase = f"prefill {batch}x{tokens}" if past == 0 else f"decode {batch}"
                before = len(pad.launches)
                _step(model, batch, tokens, past, namespace(pad))
                yield from ((phase, launch) for launch in pad.launches[before:])


def _step(model: Any, batch: int, tokens: int, past: int, op: Any) -> None:
    """A prompt, or a captured step of generation; then a token of each row's last logits, drawn in every way there is."""
    device = torch.device("cuda")
    cache: Any = KVCache(model.config, batch, dtype=model.dtype, device=device, max_length=CONTEXT)
    if past:
        cache = StepCache(cache, torch.empty(batch, dtype=torch.int32, device=device))
    ids = torch.empty(batch, tokens, dtype=torch.int64, device=device)
    logits = model.step(ids, torch.arange(tokens, device=device)[None], None, cache).squeeze(1)
    if not past:  # `forward` and `score`, which want every position, norm them all
        norm = model.transformer.ln_f
        hidden = torch.empty(batch, tokens, model.config.hidden_size, dtype=model.dtype, device=device)
        op.logprob(op.layer_norm(hidden, norm.weight, norm.bias, norm.eps)[0], model.lm_head.weight, ids[0])
    V = model.config.vocab_size
    rates, counts = torch.empty(4, device=device), torch.empty(3, dtype=torch.int32, device=device)
    seeds, flags = (torch.empty(n, dtype=kind, device=device) for n, kind in ((batch, torch.int64), (V, torch.uint8)))
    state = torch.empty(5, batch, dtype=torch.int64, device=device)
    out, lengths = (torch.empty(*n, dtype=torch.int32, device=device) for n in ((CONTEXT, batch), (batch,)))
    for method in range(4):
        op.sample(logits, rates, counts, flags, seeds, None, state, out.t(), lengths, method)


def rows(shape: str, dtype: str, sm: int, quantize: str | None = None) -> list[Row]:
    """One row for each distinct kernel of an op. quantize: "int8" or "int4" for weights in few bits."""
    found: dict[tuple[str, str], Row] = {}
    how = None if quantize is None else Format.of(quantize)
    for phase, launch in launches(shape, DTYPES[dtype], sm, how):
        key = (launch.op, aot.digest(launch.binary) if launch.binary else f"{launch.kernel} {launch.options}")
        grid = "x".join(map(str, launch.grid))
        if key in found:
            grids = found[key].launches.setdefault(phase, [])
            grids += [] if grid in grids else [grid]
            continue
        machine = _inspected(launch) if launch.binary else aot.Machine(0, 0, 0, {}, "")
        held = aot.warps_per_sm(sm, machine.registers, launch.warps, launch.shared) if launch.binary else 0
        found[key] = Row(
            f"{shape} {quantize}" if quantize else shape,
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
            aot.vector_share(machine.loads),
            _weight_share(launch),
            machine.tensor_cores,
            launch.fault,
        )
    return list(found.values())


def _weight_share(launch: aot.Launch) -> float | None:
    loads: Counter[int] = Counter()
    for names, found in loads_by_argument(launch.ptx, launch.arguments).items():
        if all(map(_WEIGHT.fullmatch, names.split("|"))):
            loads += found
    return aot.vector_share(loads)


def _inspected(launch: aot.Launch) -> aot.Machine:
    """What `aot.inspect` found, kept beside Triton's own cache of binaries."""
    import triton

    path = Path(triton.knobs.cache.dir) / "inspected" / f"{_INSPECTION}-{aot.digest(launch.binary)}.json"
    if path.exists():
        values = json.loads(path.read_text())
        return aot.Machine(**values | {"loads": {int(k): v for k, v in values["loads"].items()}})
    machine = aot.inspect(launch.binary)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dataclasses.asdict(machine)))
    return machine


HEADER = (
    "model dtype sm op kernel tiles warps registers spills shared warps/SM 128-bit weights_128-bit tensor_cores blocks".split()
)


def table(found: Sequence[Row]) -> str:
    """The rows as Markdown."""

    def cells(row: Row) -> list[object]:
        tiles = " ".join(f"{k}={v}" for k, v in row.tiles.items())
        shares = ["-" if share is None else f"{share:.0%}" for share in (row.vector_share, row.weight_share)]
        machine = [row.warps, row.registers, row.spills, row.shared, row.warps_per_sm, *shares, row.tensor_cores or "-"]
        blocks = "; ".join(f"{phase}: {', '.join(grids)}" for phase, grids in row.launches.items())
        return [row.model, row.dtype, row.sm, row.op, row.kernel, tiles, *machine, blocks]

    return as_table(HEADER, map(cells, found))


def main(argv: Sequence[str] | None = None) -> int:
    """Compile, print, write; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.static.compile_report", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--model", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--sm", nargs="+", type=int, choices=aot.CHIPS, default=list(aot.CHIPS))
    parser.add_argument("--quantize", nargs="+", choices=("int8", "int4"), help="weights in few bits, and only these")
    parser.add_argument("--out", type=Path, help="folder of the summary; without it a part of the report is only printed")
    args = parser.parse_args(argv)
    began, found = time.perf_counter(), []
    for shape in args.model:
        for dtype in args.dtype:
            for sm in args.sm:
                for quantize in args.quantize or [None]:
                    found += rows(shape, dtype, sm, quantize)
                print(f"{shape} {dtype} sm_{sm}: {len(found)} rows, {time.perf_counter() - began:.0f} s", file=sys.stderr)
    faults = [
        f"{r.model} {r.dtype} sm_{r.sm} {r.op} {r.kernel} ({', '.join(r.launches)}): {f}" for r in found for f in r.faults()
    ]
    verdict = "\n".join(f"- over budget: {f}" for f in faults) or "Every kernel is within its budget."
    formats = args.quantize in (None, ["int8", "int4"])
    every = formats and (args.model, args.dtype, args.sm) == (list(SHAPES), list(DTYPES), list(aot.CHIPS))
    if out := args.out or (RESULTS if every else None):
        compile_summary.write(found, verdict, compile_summary.path(out, packed=bool(args.quantize)))
    print(table(found), verdict, sep="\n\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
