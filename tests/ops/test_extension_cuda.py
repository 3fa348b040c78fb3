"""The CUDA side of the extension: what nvcc makes of it here, and on a machine with a GPU what it does."""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from gptneo_fast import errors
from gptneo_fast.ops import extension, testing
from tests.support.append_calls import BITS, DTYPES, LAYOUTS, assert_like_reference, int32, noise, projected

SOURCE = Path(__file__).parents[2] / "csrc/kv_append.cu"
NVCC = shutil.which("nvcc")
VECTORS = {"uint4": ".128", "uint2": ".64", "j": "", "t": ".U16"}  # types of a granule as they are mangled: SASS suffixes
TOKENS = (1, 4)


def cuobjdump() -> str | None:
    """The CUDA toolkit's, or the one in the triton wheel."""
    spec = importlib.util.find_spec("triton")
    inside = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump" if spec and spec.origin else None
    return str(inside) if inside and inside.is_file() else shutil.which("cuobjdump")


@pytest.fixture(scope="module", params=["sm_80", "sm_90"])
def compiled(request, tmp_path_factory):
    """(the report of ptxas, the cubin) for one architecture."""
    if NVCC is None:
        pytest.skip("needs nvcc")
    cubin = tmp_path_factory.mktemp(request.param) / "kv_append.cubin"
    flags = ["-cubin", "-O3", "-std=c++17", f"-arch={request.param}", "-Xptxas", "-v", "-DGPTNEO_FAST_CUDA"]
    done = subprocess.run([NVCC, *flags, str(SOURCE), "-o", str(cubin)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr, cubin


def test_no_kernel_spills_and_all_leave_room_for_1024_threads(compiled):
    report, _ = compiled
    assert len(re.findall("Compiling entry function", report)) == len(VECTORS) * len(TOKENS)
    assert set(re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)) == {
        ("0",) * 3
    }
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", report)]
    assert len(registers) == len(VECTORS) * len(TOKENS) and max(registers) <= 64


def test_each_kernel_moves_its_whole_granule_at_once_and_loads_before_it_stores(compiled):
    dump = cuobjdump()
    if dump is None:
        pytest.skip("needs cuobjdump, of CUDA or of the triton wheel")
    sass = subprocess.run([dump, "-sass", str(compiled[1])], capture_output=True, text=True, check=True).stdout
    functions = dict(re.findall(r"Function : (\S+)\n(.*?)(?=Function :|\Z)", sass, re.S))
    seen = set()
    for name, body in functions.items():
        granule, tokens = re.search(r"append_kernelI(?:\d+)?(uint4|uint2|j|t)Li(\d)E", name).groups()
        seen.add((granule, int(tokens)))
        accesses = re.findall(r"\b(LDG|STG)\.E((?:\.EF)?(?:\.CONSTANT)?)(\.128|\.64|\.U16)?\b", body)
        assert not re.search(r"\b(LDL|STL|LD|ST)\.", body), f"{name} touches local or generic memory"
        vectors = [kind for kind, _, width in accesses if width == VECTORS[granule]]
        counts = [kind for kind, _, width in accesses if width != VECTORS[granule]]  # length and start
        if granule == "j":  # the counts are of the same width
            vectors, counts = vectors[2:], vectors[:2]
        assert vectors == ["LDG"] * int(tokens) + ["STG"] * int(tokens), (name, accesses)
        assert counts == ["LDG"] * 2, (name, accesses)
    assert seen == {(granule, tokens) for granule in VECTORS for tokens in TOKENS}


@pytest.fixture(scope="module")
def device():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    device = torch.device("cuda", torch.cuda.current_device())
    if reason := extension.why_not_on(device):
        pytest.skip(reason)
    return device


gpu = pytest.mark.gpu


@gpu
def test_samples_equal_the_reference_on_cuda(device):
    for sample in testing.SAMPLES["kv_append"]():
        for dtype in DTYPES:
            assert_like_reference(extension.kv_append, *(x.clone() for x in sample.to(dtype, device).args if x is not None))


@gpu
@pytest.mark.parametrize("R", [255, 256, 257, 384])
def test_every_position_around_the_rings_end_wraps_on_cuda(device, R):
    lengths = int32([max(0, turns * R + step) for turns in (0, 1, 7) for step in range(-5, 6)], device)
    B = len(lengths)
    for T in (1, 2, 3, 129, R - 1, R, R + 1, 2 * R + 3):
        caches = noise(B, 1, R, 4, device=device), noise(B, 1, R, 4, device=device)
        new = projected(B, 1, T, 4, device=device), projected(B, 1, T, 4, device=device)
        assert_like_reference(extension.kv_append, *caches, *new, lengths)
        assert_like_reference(extension.kv_append, *caches, *new, lengths, int32((i % (T + 2) for i in range(B)), device))


@gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [1, 4, 48, 128])
def test_every_layout_head_dim_and_dtype_on_cuda(device, layout, dtype, D):
    kind = dict(dtype=dtype, device=device)
    k, v = LAYOUTS[layout](2, 3, 11, D, **kind), projected(2, 3, 11, D, **kind)
    caches = noise(2, 3, 9, D, **kind), noise(2, 3, 9, D, **kind)
    assert_like_reference(extension.kv_append, *caches, k, v, int32([4, 30], device))
    assert_like_reference(extension.kv_append, *caches, v, k, int32([4, 30], device), int32([5, 0], device))


@gpu
@pytest.mark.parametrize(("B", "T", "R"), [(1, 2048, 384), (8, 2048, 2048), (33, 300, 384), (4, 513, 600)])
@pytest.mark.parametrize("D", [48, 64, 128])
def test_prompts_of_the_released_shapes_on_cuda(device, B, T, R, D):
    """Large enough for the kernel that copies several tokens a thread, and for its ragged last blocks."""
    kind = dict(dtype=torch.bfloat16, device=device)
    caches, lengths = [noise(B, 16, R, D, **kind) for _ in "kv"], int32((i * 37 % 100 for i in range(B)), device)
    new = [projected(B, 16, T, D, **kind) for _ in "kv"]
    assert_like_reference(extension.kv_append, *caches, *new, lengths)
    assert_like_reference(extension.kv_append, *caches, *new, lengths, int32((i * 91 % T for i in range(B)), device))


@gpu
def test_bytes_around_every_cache_row_stay_as_they_were_on_cuda(device):
    for dtype in DTYPES:
        for D, pad in ((4, 1), (48, 8), (128, 8)):
            wide = noise(2, 3, 2, 12, D + pad, dtype=dtype, device=device)
            before = wide.clone()
            new = [projected(3, 2, 7, D, dtype, device) for _ in "kv"]
            extension.kv_append(*wide[:, :, :, :10, :D], *new, int32([0, 5, 98], device))
            changed = wide.view(BITS[dtype]) != before.view(BITS[dtype])
            assert not changed[..., D:].any() and not changed[..., 10:, :].any() and changed.any()


@gpu
def test_a_row_out_of_range_is_left_alone_on_cuda(device):
    caches, new = [noise(3, 2, 6, 8, device=device) for _ in "kv"], [projected(3, 2, 4, 8, device=device) for _ in "kv"]
    before = [t.clone() for t in caches]
    extension.kv_append(*caches, *new, int32([-1, 3, 2**31 - 1], device), int32([0, 0, -5], device))
    for now, was in zip(caches, before, strict=True):
        same = (now.view(torch.int32) == was.view(torch.int32)).flatten(1).all(1)
        assert same.tolist() == [True, False, True]


@gpu
def test_it_runs_on_the_current_stream_and_waits_for_nothing(device):
    caches, lengths = [torch.zeros(2, 4, 64, 64, device=device) for _ in "kv"], int32([0, 60], device)
    k, fresh = torch.zeros(2, 4, 8, 64, device=device), torch.randn(2, 4, 8, 64, device=device)
    torch.cuda.synchronize(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(torch.cuda.Stream(device)) as _:
            torch.cuda._sleep(200_000_000)  # about 0.1 s: a launch on any other stream would read zeros
            k.copy_(fresh)
            extension.kv_append(*caches, k, k, lengths)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize(device)
    assert torch.equal(caches[0][0, :, :8], fresh[0])


@gpu
def test_a_captured_graph_reads_lengths_at_every_replay(device):
    caches, lengths = [torch.zeros(1, 2, 6, 8, device=device) for _ in "kv"], int32([0], device)
    k = torch.zeros(1, 2, 1, 8, device=device)
    extension.kv_append(*caches, k, k, lengths)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        extension.kv_append(*caches, k, k, lengths)
    for token in range(9):
        k.fill_(token + 1)
        lengths.fill_(token)
        graph.replay()
    torch.cuda.synchronize(device)
    assert caches[1][0, 0, :, 0].tolist() == [7, 8, 9, 4, 5, 6]


@gpu
def test_what_does_not_fit_is_refused_on_cuda(device):
    caches, k = [torch.zeros(2, 3, 5, 4, device=device) for _ in "kv"], torch.ones(2, 3, 2, 4, device=device)
    with pytest.raises(errors.InputError, match="lengths is on another device than k_cache"):
        extension.kv_append(*caches, k, k, int32([0, 1]))
    with pytest.raises(errors.InputError, match="v is on another device than k_cache"):
        extension.kv_append(*caches, k, k.cpu(), int32([0, 1], device))


@gpu
def test_tensors_of_a_device_that_is_not_current(device):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    other = torch.device("cuda", (device.index + 1) % torch.cuda.device_count())
    assert extension.why_not_on(other) is None
    caches, new = [noise(2, 3, 9, 64, device=other) for _ in "kv"], [projected(2, 3, 5, 64, device=other) for _ in "kv"]
    assert_like_reference(extension.kv_append, *caches, *new, int32([3, 8], other))
    assert torch.cuda.current_device() == device.index
