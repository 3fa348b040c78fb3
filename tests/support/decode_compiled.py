"""Compiles what a decode step launches at the true shapes and prints, as JSON, what the assembler made of it.

Usage: decode_compiled.py SM DTYPE BATCHxTOKENS[,...] MODEL[,...] [early]. Needs a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path

import torch
from torch._subclasses import FakeTensorMode

from benchmarks.models import DTYPES, config_of
from benchmarks.static import aot
from gptneo_fast import kernels
from gptneo_fast.kernels import launch as launching

_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(@!?\w+ )?([A-Z][A-Z0-9_.]*)([^;]*);")
_REGISTER = re.compile(r"(?<![A-Z])R(\d+)\b")


def calls(shape, dtype, B, T):
    """(op, arguments) of a step: a global and a local layer's attention, the rest once."""
    config = config_of(shape)
    C, F, V, H, D = config.hidden_size, config.ffn_size, config.vocab_size, config.num_heads, config.head_dim

    def new(*sizes, dtype=dtype):
        return torch.empty(*sizes, dtype=dtype, device="cuda")

    x, gamma, lengths = new(B, T, C), new(C), new(B, dtype=torch.int32)
    for slots, window in ((2048, 0), (384, 256)):
        cache = new(B, H, slots, D), new(B, H, slots, D)
        if not window:
            yield "norm_qkv_append", (x, gamma, gamma, *(new(C, C) for _ in range(3)), 1e-5, *cache, lengths), 3 * C * C
        q = new(B, T, C).unflatten(-1, (H, D)).transpose(1, 2)
        yield "decode_attention", (q, *cache, lengths, window), 0
    yield "linear_add", (x, new(C, C), gamma, x), C * C
    yield "norm_linear", (x, gamma, gamma, new(F, C), new(F), 1e-5, True), F * C
    yield "linear_add", (new(B, T, F), new(C, F), gamma, x), F * C
    yield "lm_head", (new(B, 1, C), gamma, gamma, new(V, C), 1e-5), V * C


def instructions(binary):
    """(name, operands) of a cubin, in order."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary)
        return [(name, rest) for _, name, rest in _INSTRUCTION.findall(aot.tool("nvdisasm", "-c", str(path)))]


def opening(code):
    """The order in which a kernel begins.

    in_flight: bytes of marked (weight) loads a thread before any of them is used. before_wait: the same before it waits for
    the kernel before it; others_before_wait: other accesses of global memory there. used_before_activations: whether a
    loaded weight is touched before the first load that is none. prefetches: how often weights are asked for before anything is
    loaded or waited for.
    """
    wait = next((i for i, (name, _) in enumerate(code) if name.startswith("ACQBULK")), None)
    pending, in_flight, before_wait, others, activations, used = set(), 0, 0, 0, None, None
    load = next((i for i, (name, _) in enumerate(code) if name.partition(".")[0] in ("LDG", "LDGSTS")), len(code))
    marked = [aot.width(name.split(".")) for name, _ in code if name.startswith("LDG.") and ".EF" in name]
    for i, (name, operands) in enumerate(code):
        parts = name.split(".")
        registers = {int(r) for r in _REGISTER.findall(operands)}
        if parts[0] == "LDG" and "EF" in parts and used is None:
            size = aot.width(parts) // 8
            first = int(_REGISTER.findall(operands)[0])
            pending |= set(range(first, first + size // 4))
            in_flight += size
            before_wait += size if wait is not None and i < wait else 0
            continue
        if used is None and registers & pending:
            used = i
        if parts[0] in ("LDG", "STG", "LDGSTS", "ATOMG", "RED", "ATOM"):
            others += wait is not None and i < wait
            if parts[0] == "LDG" and activations is None:
                activations = i
    return {
        "narrow_weight_loads": sum(bits < 128 for bits in marked),
        "waits": wait is not None,
        "in_flight": in_flight,
        "before_wait": before_wait,
        "others_before_wait": others,
        "prefetches": sum(name.startswith("CCTL") for name, _ in code[: load if wait is None else min(load, wait)]),
        "used_before_activations": used is not None and (activations is None or used < activations),
    }


def reads_activations_before_wait(ptx):
    """Whether the text has another access than a weight's before its wait; None where it does not wait."""
    before, waits, _ = ptx.partition("griddepcontrol.wait")
    accesses = re.findall(r"^.*?\b(?:ld|st|atom|red|cp\.async)\S*global\S*", before, re.M)
    return any("evict_first" not in line for line in accesses) if waits else None


def main(sm, dtype, steps, models, early=""):
    for shape in models.split(","):
        for step in steps.split(","):
            B, T = map(int, step.split("x"))
            with aot.Launchpad(int(sm)) as pad, FakeTensorMode(), launching.early_launches() if early else nullcontext():
                for op, args, weights in calls(shape, DTYPES[dtype], B, T):
                    before = len(pad.launches)
                    pad.during(op, getattr(kernels, op))(*args)
                    for launch in pad.launches[before:]:
                        machine, code = aot.inspect(launch.binary), instructions(launch.binary)
                        held = aot.warps_per_sm(int(sm), machine.registers, launch.warps, launch.shared) // launch.warps
                        row = {
                            "model": shape, "step": step, "op": op, "kernel": launch.kernel, "grid": launch.grid[0],
                            "sm": int(sm), "dtype": dtype, "rows": launch.options.get("NB", 1),
                            "norms": "norm.0" in launch.arguments, "tensor_cores": machine.tensor_cores,
                            "warps": launch.warps, "registers": machine.registers, "shared": launch.shared,
                            "spills": machine.spills + machine.stack,
                            "blocks_per_sm": held, "weights": weights * DTYPES[dtype].itemsize, **opening(code),
                            "early_in_ptx": reads_activations_before_wait(launch.ptx),
                        }  # fmt: skip
                        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
