"""Which card this is, and the ceilings that every ratio is taken against."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl

from benchmarks.gpu.stage import Case, Setting
from benchmarks.gpu.timing import per_call

REPO = Path(__file__).parents[2]


def cases(setting: Setting) -> Iterator[Case]:
    """What the machine is, then bandwidths, the matrix rate, and what lies between two nodes of a graph."""
    yield Case("machine", lambda: machine(setting))
    yield Case("read bandwidth", lambda: read_bandwidth(setting))
    yield Case("copy bandwidth", lambda: copy_bandwidth(setting))
    yield Case("matmul rate", lambda: matmul_rate(setting))
    yield Case("gap between graph nodes", lambda: node_gap(setting, pdl=False))
    yield Case("gap between graph nodes, programmatic dependent launch", lambda: node_gap(setting, pdl=True))


def machine(setting: Setting) -> dict[str, Any]:
    """Names and versions."""
    found = {
        "card": torch.cuda.get_device_name(setting.device) if setting.device.type == "cuda" else "none",
        "nvidia-smi": _said("nvidia-smi", "--query-gpu=name,driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"),
        "nvcc": (_said("nvcc", "--version") or "").rpartition("release ")[2].partition(",")[0] or None,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "CUDA of torch": torch.version.cuda,
        "commit": _said("git", "-C", str(REPO), "describe", "--always", "--dirty"),
    }
    for package in ("torch", "triton", "transformers", "gptneo-fast", "flash-attn"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _said(*command: str) -> str | None:
    """What a program prints, or None where there is none."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    return done.stdout.strip() or None


@triton.jit
def _read_kernel(x_ptr, out_ptr, n, step, BLOCK: tl.constexpr):
    """Sum what a program reads: `step` elements on from program to program, four blocks in flight."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.int32)
    for start in tl.range(0, n, step * 4):
        for part in tl.static_range(4):
            at = start + part * step + offs
            total += tl.load(x_ptr + at, mask=at < n, other=0, eviction_policy="evict_first")
    tl.store(out_ptr + tl.program_id(0), tl.sum(total, 0))


def read_bandwidth(setting: Setting) -> dict[str, Any]:
    """Bytes/s that a kernel reads which writes next to nothing: what a decode step is held to."""
    n = 4096 if setting.tiny else 2**28  # int32
    x = torch.randint(-9, 9, (n,), dtype=torch.int32, device=setting.device)
    sms = 2 if setting.tiny else torch.cuda.get_device_properties(setting.device).multi_processor_count
    best = 0.0
    for waves, block in ((4, 2048), (8, 1024), (8, 2048), (16, 1024)):
        programs = sms * waves
        out = torch.empty(programs, dtype=torch.int32, device=setting.device)

        def call(programs: int = programs, block: int = block, out: torch.Tensor = out) -> None:
            _read_kernel[(programs,)](x, out, n, programs * block, BLOCK=block, num_warps=8 if block == 2048 else 4)

        seconds = per_call([call] * 3, setting.device).seconds
        if int(out.sum(dtype=torch.int64)) != int(x.sum(dtype=torch.int64)):
            raise RuntimeError("the reading kernel did not read everything once")
        best = max(best, n * 4 / seconds)
    return {"bytes/s": best}


def copy_bandwidth(setting: Setting) -> dict[str, Any]:
    """Bytes/s of torch's copy, read and written counted together."""
    n = 4096 if setting.tiny else 2**28
    x = torch.randn(n, device=setting.device).to(torch.bfloat16)
    y = torch.empty_like(x)
    seconds = per_call(
        [lambda: y.copy_(x)] * 3, setting.device, graph=False
    ).seconds  # as a graph's node it is another engine's
    return {"bytes/s": 2 * n * 2 / seconds}


def matmul_rate(setting: Setting) -> dict[str, Any]:
    """FLOP/s of torch's bfloat16 matmul of 8192^3."""
    n = 32 if setting.tiny else 8192
    a, b = (torch.randn(n, n, device=setting.device).to(torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    return {"FLOP/s": 2 * n**3 / per_call([lambda: torch.mm(a, b, out=out)] * 5, setting.device).seconds}


@triton.jit
def _tick_kernel(x_ptr, PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    tl.store(x_ptr, tl.load(x_ptr) + 1)


def node_gap(setting: Setting, pdl: bool) -> dict[str, Any]:
    """Seconds from one node of a captured graph to the next, for kernels of one program that depend on each other."""
    x = torch.zeros(1, dtype=torch.int32, device=setting.device)
    if pdl:
        setting.need_early_launch()
    options = {"launch_pdl": True} if pdl else {}
    count = 10 if setting.tiny else 500

    def call() -> None:
        _tick_kernel[(1,)](x, PDL=pdl, num_warps=1, **options)

    timing = per_call([call] * count, setting.device)
    return {"seconds": timing.seconds, "how": timing.how}


def ceilings(rows: list[dict[str, Any]]) -> dict[str, float]:
    """What a Setting takes of this stage's rows; what failed keeps its default."""
    names = {
        "read bandwidth": ("bandwidth", "bytes/s"),
        "copy bandwidth": ("copy", "bytes/s"),
        "matmul rate": ("rate", "FLOP/s"),
    }
    found = {}
    for row in rows:
        if row["case"] in names:
            name, unit = names[row["case"]]
            found[name] = row[unit]
    return found
