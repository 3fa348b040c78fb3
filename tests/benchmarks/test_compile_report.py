"""Ahead-of-time compilation: the report sees what the assembler did, and the kernels stay within their budgets."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("triton")
from benchmarks.static import aot, compile_samples, compile_summary
from benchmarks.static.compile_report import RESULTS, Row

REPO = Path(__file__).parents[2]
KERNELS = """
import json, sys, torch, triton, triton.language as tl
from torch._subclasses import FakeTensorMode
from benchmarks.gpu import card
from benchmarks.static import aot
from benchmarks.static.ptx import loads_by_argument

@triton.jit
def _copy(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, eviction_policy="evict_first"))

@triton.jit
def _square(x_ptr, y_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    x = tl.load(x_ptr + offs[:, None] * N + offs[None])
    tl.store(y_ptr + offs[:, None] * N + offs[None], tl.dot(x, x).to(tl.bfloat16))

@triton.jit
def _centre(x_ptr, y_ptr, N: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, N)).to(tl.float32)  # 128 numbers a thread, needed until the mean is known
    tl.store(y_ptr + tl.arange(0, N), (x - tl.sum(x) / N).to(tl.bfloat16))

@triton.jit
def _pick(w0_ptr, w1_ptr, bias_ptr, picks_ptr, y_ptr, N: tl.constexpr):
    w_ptr = w0_ptr
    if tl.program_id(0) == 1:
        w_ptr = w1_ptr
    start = tl.load(picks_ptr)  # what is loaded here makes no address of picks_ptr
    w = tl.load(w_ptr + start * N + tl.arange(0, N))
    tl.store(y_ptr + tl.arange(0, N), w + tl.load(bias_ptr + tl.program_id(0)))

@triton.jit
def _broken(x_ptr):
    tl.store(x_ptr, tl.load(x_ptr) & tl.arange(0, 3))

seen = {}
for sm in (80, 90):
    with aot.Launchpad(sm) as pad, FakeTensorMode():
        x, y = (torch.empty(1 << 20, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        copy = pad.during("copy", lambda a: _copy[lambda meta: (7, meta["BLOCK"])](a, y, 4096, BLOCK=1024))
        copy(x)
        copy(x[16:])
        copy(x[1:])
        _square[(1,)](x, y, N=64)
        _centre[(1,)](x, y, N=16384, maxnreg=40)
        _pick[(2,)](x, x, x, torch.empty(1, dtype=torch.int32, device="cuda"), y, N=4096)
        _broken[(2,)](x)
        card._read_kernel[(132,)](x.view(torch.int32), y, 2**19, 4096, BLOCK=2048, num_warps=8)
        card._tick_kernel[(1,)](y.view(torch.int32), PDL=sm == 90, num_warps=1, **({"launch_pdl": True} if sm == 90 else {}))
    *launches, broken, read, tick = pad.launches
    assert aot.vector_share(loads_by_argument(read.ptx, read.arguments)["x_ptr"]) == 1, read.ptx
    assert ("griddepcontrol.wait" in tick.ptx) == (sm == 90)
    assert broken.kernel == "_broken" and broken.grid == (2,) and "Error" in broken.fault, broken
    found = []
    for launch in launches:
        machine = aot.inspect(launch.binary)
        found.append({
            "op": launch.op, "kernel": launch.kernel, "grid": launch.grid, "tiles": launch.options, "spills": machine.spills,
            "share": aot.vector_share(machine.loads), "loads": machine.loads,
            "by argument": loads_by_argument(launch.ptx, launch.arguments),
            "cores": machine.tensor_cores, "name": aot.digest(launch.binary)})
    seen[sm] = found
print(json.dumps(seen))
"""

BROKEN = """
import sys, triton, triton.language as tl
from benchmarks.static import compile_samples
from gptneo_fast import kernels

@triton.jit
def broken(x_ptr, BLOCK: tl.constexpr):
    kept = tl.arange(0, 2 * BLOCK)
    if tl.load(x_ptr) > 0:
        kept = tl.arange(0, BLOCK)  # as the interpreter allows
    tl.store(x_ptr, tl.sum(kept))

kernels.layer_norm = lambda x, *_: broken[(1,)](x, BLOCK=16)
sys.exit(compile_samples.main(["--op", "layer_norm", "--dtype", "fp16", "--sm", "80"]))
"""


def run(*args, cwd=REPO):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(REPO)}
    return subprocess.run(
        [sys.executable, "-W", "ignore", *args], capture_output=True, text=True, timeout=600, check=False, cwd=cwd, env=env
    )


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    path = tmp_path_factory.mktemp("aot") / "kernels.py"
    path.write_text(KERNELS)
    done = run(str(path))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("sm", ["80", "90"])
def test_a_launch_is_compiled_as_the_launcher_asked(seen, sm):
    copy, aligned, shifted, small, spilling, _ = seen[sm]
    assert (copy["op"], copy["kernel"], copy["grid"]) == ("copy", "_copy", [7, 1024])
    assert copy["tiles"]["BLOCK"] == 1024
    assert aligned["name"] == copy["name"] != shifted["name"]  # 16-byte alignment is part of what is compiled
    assert (small["op"], small["kernel"], small["tiles"]["N"], spilling["tiles"]["N"]) == ("", "_square", 64, 16384)


@pytest.mark.parametrize("sm", ["80", "90"])
def test_an_unaligned_load_is_seen_to_be_narrow(seen, sm):
    copy, _, shifted, *_ = seen[sm]
    assert copy["share"] == 1.0
    assert shifted["share"] == 0.0


@pytest.mark.parametrize(("sm", "cores"), [("80", "HMMA"), ("90", "HGMMA")])
def test_tensor_cores_and_spills_are_seen(seen, sm, cores):
    copy, _, _, small, spilling, _ = seen[sm]
    assert (copy["cores"], small["cores"]) == ("", cores)
    assert copy["spills"] == small["spills"] == 0 < spilling["spills"]


@pytest.mark.parametrize("sm", ["80", "90"])
def test_loads_are_told_apart_by_argument(seen, sm):
    copy, _, shifted, small, spilling, pick = seen[sm]
    for launch in (copy, shifted, small, spilling, pick):
        total = Counter()
        for widths in launch["by argument"].values():
            total.update({int(k): v for k, v in widths.items()})
        assert total == {int(k): v for k, v in launch["loads"].items()}  # the text and what the assembler made of it
    assert list(copy["by argument"]) == ["x_ptr"]
    assert set(pick["by argument"]) == {"w0_ptr|w1_ptr", "bias_ptr", "picks_ptr"}
    assert set(pick["by argument"]["w0_ptr|w1_ptr"]) == {"128"}
    assert set(pick["by argument"]["bias_ptr"]) == {"16"}


def test_interpreted_kernels_are_refused():
    if not os.environ.get("TRITON_INTERPRET"):
        pytest.skip("kernels are compiled in this process")
    with pytest.raises(RuntimeError, match="without TRITON_INTERPRET"):
        aot.Launchpad(90).__enter__()


@pytest.mark.parametrize(
    ("capability", "registers", "warps", "shared", "expected"),
    [
        (90, 32, 4, 0, 64),  # all threads
        (90, 128, 4, 0, 16),  # 65536 / (128 * 32) warps
        (90, 33, 8, 0, 48),  # 33 registers take 5 lots of 256 a warp: 51 warps, in blocks of 8
        (90, 32, 4, 100 * 1024, 8),  # two blocks of 101 KB in 228 KB
        (80, 32, 4, 100 * 1024, 4),  # one in 164 KB
        (80, 32, 1, 0, 32),  # 32 blocks
    ],
)
def test_occupancy_is_what_registers_memory_and_blocks_leave(capability, registers, warps, shared, expected):
    assert aot.warps_per_sm(capability, registers, warps, shared) == expected


def row(**changes):
    values = dict(
        model="125m", dtype="bf16", sm=90, op="linear_add", kernel="_linear_add_kernel", tiles={},
        launches={"prefill 1x2048": ["1"]}, warps=4, registers=64, spills=0, stack=0, shared=1024, warps_per_sm=16,
        vector_share=1.0, weight_share=1.0, tensor_cores="HGMMA",
    )  # fmt: skip
    return Row(**(values | changes))


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({}, None),
        ({"spills": 2}, "spills: 2"),
        ({"fault": "CompilationError: at 7:12", "weight_share": 0.0}, "does not compile: CompilationError: at 7:12"),
        ({"stack": 8}, "8 bytes of stack"),
        ({"shared": 228 * 1024}, "does not fit"),
        ({"weight_share": 0.94}, "94% of the weight bytes"),
        ({"vector_share": 0.5}, None),
        ({"vector_share": 0.5, "weight_share": None}, None),
        ({"tensor_cores": "HMMA"}, "HGMMA is due"),
        ({"tensor_cores": "", "op": "attention"}, "HGMMA is due"),
        ({"tensor_cores": "HMMA", "sm": 80}, None),
        ({"tensor_cores": "", "launches": {"decode 1": ["1"]}}, None),
        ({"tensor_cores": "", "dtype": "fp32"}, None),
        ({"tensor_cores": "HMMA", "kernel": "skinny", "tiles": {"NB": 32}, "launches": {}}, "HMMA for 32 rows, HGMMA is due"),
        ({"tensor_cores": "HMMA", "kernel": "skinny", "tiles": {"NB": 64}, "launches": {}, "dtype": "fp16"}, "HGMMA is due"),
        ({"tensor_cores": "HMMA", "kernel": "skinny", "tiles": {"NB": 16}, "launches": {}}, None),
        ({"tensor_cores": "", "kernel": "skinny", "tiles": {"NB": 64}, "launches": {}, "dtype": "fp32"}, None),
    ],
)
def test_a_row_over_its_budget_says_why(changes, fault):
    found = row(**changes).faults()
    assert found == [] if fault is None else fault in found[0]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Exit code, what was printed, and the summary of a part of the report."""
    out = tmp_path_factory.mktemp("report")
    done = run("-m", "benchmarks.static.compile_report", "--model", "125m", "--dtype", "bf16", "--sm", "90", "--out", str(out))
    return done.returncode, done.stdout + done.stderr, compile_summary.path(out).read_text()


def test_the_kernels_of_125m_stay_within_their_budgets(report):
    from gptneo_fast import kernels
    from gptneo_fast.ops import ops

    code, printed, summary = report
    assert code == 0, printed[-6000:]
    assert "Every kernel is within its budget." in summary
    launched = {op for _, op, _, _ in compile_summary.cells(summary)}
    assert launched >= {name for name in ops.NAMES if hasattr(kernels, name)}, "an op of the model compiled no kernel"


def test_the_committed_summary_is_what_the_kernels_compile_to(report):
    committed = compile_summary.path(RESULTS)
    if not committed.exists():
        pytest.skip(f"no {committed.name} is committed: make compile-report")
    was = {key: cell for key, cell in compile_summary.cells(committed.read_text()).items() if key[0] == "125m"}
    now = compile_summary.cells(report[2])
    assert now == {key: cell for key, cell in was.items() if key[3] == "bf16_90" and cell != "-"}, "run make compile-report"


def test_a_summary_says_the_worst_of_each_kernel_and_is_read_again():
    found = [
        row(),
        row(registers=96, tensor_cores="HMMA"),
        row(sm=80, spills=8, weight_share=0.9, shared=1025),
        row(op="embed", kernel="_embed_kernel", registers=22, shared=0, tensor_cores="", weight_share=None),
        row(op="sample", kernel="sample_kernel", fault="CompilationError"),
    ]
    text = compile_summary.summary(found)
    linear, embed, sample = (("125m", *names) for names in (
        ("linear_add", "_linear_add_kernel"), ("embed", "_embed_kernel"), ("sample", "sample_kernel")
    ))  # fmt: skip
    assert compile_summary.cells(text) == {
        (*linear, "bf16_90"): "96/1 HGMMA+HMMA", (*linear, "bf16_80"): "64/2 8 local 10% narrow HGMMA",
        (*embed, "bf16_90"): "22/0", (*embed, "bf16_80"): "-",
        (*sample, "bf16_90"): "does not compile", (*sample, "bf16_80"): "-",
    }  # fmt: skip


@pytest.mark.slow  # a part of `make compile-samples`, which .ci/run calls
def test_sample_compiles_for_vocabularies_that_split_in_every_way():
    done = run("-m", "benchmarks.static.compile_samples", "--op", "sample", "--dtype", "fp32", "--sm", "90")
    assert done.returncode == 0 and "no faults" in done.stdout, done.stdout + done.stderr


def test_a_sample_that_does_not_compile_is_named(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text(BROKEN)
    done = run(str(path))
    assert done.returncode == 1, done.stdout + done.stderr
    first, last = (line for line in done.stdout.splitlines() if "fault" in line or "does not compile" in line)
    assert first.startswith("fp16 sm_80 layer_norm, width 8: broken") and "but the then block redefines it" in first
    assert "1 fault" in last


def test_a_launch_that_does_not_fit_is_a_fault():
    made = dict(op="", kernel="", grid=(1,), warps=4, binary=b"", ptx="", arguments=(), options={})
    large = aot.Launch(**made, shared=200 * 1024)
    assert compile_samples.fault(large, 90) == "" != compile_samples.fault(large, 80)
