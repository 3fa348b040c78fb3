"""Every op sample compiled ahead of time, as a GPU would be asked for it: the interpreter checks no types and fits no memory.

    python -m benchmarks.static.compile_samples                                     # every dtype for sm_90, bf16 for sm_80
    python -m benchmarks.static.compile_samples --op sample --dtype fp32 --sm 90

The samples are those of `gptneo_fast.testing`, with `sample` at vocabularies that split in all ways besides. No GPU is needed.
Exit code 1: a kernel does not compile, or does not fit.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from benchmarks.models import DTYPES
from benchmarks.static import aot
from gptneo_fast.ops import testing
from gptneo_fast.ops.constants import LOGITS_ALIGN
from gptneo_fast.ops.testing import Sample

EVERY = tuple((dtype, sm) for sm, dtypes in ((90, DTYPES), (80, ("bf16",))) for dtype in dtypes)
VOCABULARIES = (1240, 2500, 32768, 32769, 50257, 65536, 65537)  # 1 slice to 33, on both sides of powers of two
BATCHES = (1, 64)


def samples(op: str, dtype: torch.dtype) -> Iterator[Sample]:
    """The samples of an op in a dtype."""
    for sample in testing.SAMPLES[op]():
        yield sample.to(dtype)
    if (op, dtype) == ("sample", torch.float32):  # as the head's logits are
        for V in VOCABULARIES:
            for B in BATCHES:
                for method in range(4):
                    yield _drawing(B, V, method)


def _drawing(B: int, V: int, method: int) -> Sample:
    """Arguments of `sample` as a runner gives them: rows of logits that are padded, tokens in columns."""
    logits = torch.empty(B, V + -V % LOGITS_ALIGN)[:, :V]
    rates, counts, flags = torch.empty(4), torch.empty(3).int(), torch.empty(V).byte()
    state, out = torch.empty(5, B).long(), torch.empty(2048, B).int().t()
    args = (logits, rates, counts, flags, torch.empty(B).long(), None, state, out, torch.empty(B).int(), method)
    return Sample(f"{B} rows of {V}, method {method}", args)


def launches(op: str, dtype: str, sm: int) -> list[aot.Launch]:
    """What the samples of an op launch; on sm_90 in bf16 also as kernels that start before the one before them has ended."""
    from gptneo_fast import kernels
    from gptneo_fast.kernels.launch import early_launches

    real = list(samples(op, DTYPES[dtype]))
    with aot.Launchpad(sm) as pad, FakeTensorMode():
        for early in (contextlib.nullcontext, early_launches)[: 2 if (dtype, sm) == ("bf16", 90) else 1]:
            for sample in real:
                with early():
                    pad.during(f"{op}, {sample.name}", getattr(kernels, op))(*map(_on_cuda, sample.args))
    return pad.launches


def _on_cuda(value: Any) -> Any:
    """A tensor of that shape, those strides and that dtype which does not exist; other arguments as they are."""
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")


def fault(launch: aot.Launch, sm: int) -> str:
    """Why a launch would fail, or nothing."""
    if launch.fault:
        return f"does not compile: {launch.fault}"
    if launch.shared > aot.CHIPS[sm].block_shared:
        return f"takes {launch.shared} bytes of shared memory, sm_{sm} has {aot.CHIPS[sm].block_shared}"
    return ""


def main(argv: Sequence[str] | None = None) -> int:
    """Compile, print; returns the exit code."""
    from gptneo_fast import kernels

    ops = [op for op in testing.SAMPLES if hasattr(kernels, op)]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.static.compile_samples", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--op", nargs="+", choices=ops, default=ops)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES)
    parser.add_argument("--sm", nargs="+", type=int, choices=aot.CHIPS)
    args = parser.parse_args(argv)
    pairs = EVERY
    if args.dtype or args.sm:
        pairs = tuple((dtype, sm) for sm in args.sm or aot.CHIPS for dtype in args.dtype or DTYPES)
    began, faults = time.perf_counter(), 0
    for dtype, sm in pairs:
        binaries = set()
        for op in args.op:
            found = launches(op, dtype, sm)
            binaries |= {aot.digest(launch.binary) for launch in found if launch.binary}
            wrong = {(x.kernel, fault(x, sm)): x for x in reversed(found) if fault(x, sm)}  # the first of each
            faults += len(wrong)
            for (kernel, why), launch in wrong.items():
                print(f"{dtype} sm_{sm} {launch.op}: {kernel} {launch.options} {why}")
        print(f"{dtype} sm_{sm}: {len(binaries)} kernels, {time.perf_counter() - began:.0f} s", flush=True)
    print(f"{aot.versions()}: {faults or 'no'} fault{'s' if faults != 1 else ''}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
