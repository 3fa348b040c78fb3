"""The C++ extension's kv_append is the reference's, bit for bit; what does not fit is refused; what cannot load is said."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st

from gptneo_fast import errors
from gptneo_fast.ops import extension, ops, reference, testing
from gptneo_fast.tools import info
from tests.support.append_calls import BITS, COMPILER, DTYPES, LAYOUTS, assert_like_reference, int32, noise, projected, setup_py

REPO = Path(__file__).parents[2]
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")


@pytest.fixture(scope="session")
def append(tmp_path_factory):
    """The extension's kv_append: the installed one where it was made of these sources, else one made for the occasion."""
    if given := os.environ.get("GPTNEO_FAST_TEST_LIBRARY"):  # tests/support/sanitize.sh
        extension.LIBRARY = Path(given)
        assert extension.why_not() is None
        return extension.kv_append
    setup = setup_py()
    keys = []
    for plan in (setup.plan_cuda, lambda *found: setup.plan_cpu(*found, "")):
        try:
            keys.append(plan(setup.find_torch(), setup.find_compiler()).key())
        except setup.CannotBuildError:
            continue
    if setup.read_report(extension.LIBRARY.parent).get("key") not in keys or extension.why_not() is not None:
        if COMPILER is None:
            pytest.skip("not built, and there is no C++ compiler")
        if hasattr(torch.ops.gptneo_fast_csrc, "kv_append"):  # a second library with the same names would abort the process
            pytest.fail("the installed extension is not of these sources; install again")
        folder = tmp_path_factory.mktemp("built")
        environment = os.environ | {"CUDA_HOME": "/nowhere", "GPTNEO_FAST_BUILD_EXT": ""}
        command = [sys.executable, "setup.py", "-q", "build_ext", "--force", "-b", str(folder), "-t", str(folder / "work")]
        done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, check=False)
        extension.LIBRARY = folder / "gptneo_fast" / extension.LIBRARY.name
        assert extension.LIBRARY.is_file(), done.stdout + done.stderr
        extension._load.cache_clear()
    assert extension.why_not() is None
    assert extension.why_not_on(torch.device("cpu")) is None
    return extension.kv_append


@pytest.mark.parametrize("R", [255, 256, 257, 384])
def test_every_position_around_the_rings_end_wraps_like_the_reference(append, R):
    near = [max(0, turns * R + step) for turns in (0, 1, 7) for step in range(-5, 6)]  # 33 rows
    for T in (1, 2, 3, 129, R - 1, R, R + 1, 2 * R + 3):
        lengths = int32(near)
        B = len(lengths)
        caches = noise(B, 1, R, 4), noise(B, 1, R, 4)
        assert_like_reference(append, *caches, projected(B, 1, T, 4), projected(B, 1, T, 4), lengths)
        starts = int32(i % (T + 2) for i in range(B))  # T and T + 1: nothing but padding
        assert_like_reference(append, *caches, projected(B, 1, T, 4), projected(B, 1, T, 4), lengths, starts)


@pytest.mark.parametrize("start", [0, 254, 255, 256, 257, 383, 384])
def test_a_ring_filled_token_by_token_is_the_one_that_was_filled_at_once(append, start):
    k, v = projected(2, 2, 20, 8), projected(2, 2, 20, 8)
    once = noise(2, 2, 384, 8), noise(2, 2, 384, 8)
    one_by_one = [t.clone() for t in once]
    append(*once, k, v, int32([start, start + 7]))
    for i in range(20):
        append(*one_by_one, k[:, :, i : i + 1], v[:, :, i : i + 1], int32([start + i, start + 7 + i]))
    for a, b in zip(once, one_by_one, strict=True):
        assert torch.equal(a.view(torch.int32), b.view(torch.int32))


@pytest.mark.parametrize("B", range(1, 34))
def test_every_batch_size(append, B):
    caches = noise(B, 3, 12, 8), noise(B, 3, 12, 8)
    lengths = int32(range(B))
    assert_like_reference(append, *caches, projected(B, 3, 5, 8), projected(B, 3, 5, 8), lengths)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [1, 4, 48, 128])
def test_every_layout_head_dim_and_dtype(append, layout, dtype, D):
    k, v = LAYOUTS[layout](2, 3, 11, D, dtype=dtype), projected(2, 3, 11, D, dtype)
    caches = noise(2, 3, 9, D, dtype=dtype), noise(2, 3, 9, D, dtype=dtype)
    assert_like_reference(append, *caches, k, v, int32([4, 30]))
    assert_like_reference(append, *caches, v, k, int32([4, 30]), int32([5, 0]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [4, 48, 128])
@pytest.mark.parametrize("pad", [1, 8])
def test_bytes_around_every_cache_row_stay_as_they_were(append, dtype, D, pad):
    B, H, R, T = 3, 2, 10, 7
    wide = noise(2, B, H, R + 2, D + pad, dtype=dtype)  # a sentinel after every row, two rows after every head
    before = wide.clone()
    k_cache, v_cache = wide[:, :, :, :R, :D]
    assert_like_reference(
        append, k_cache, v_cache, projected(B, H, T, D, dtype), projected(B, H, T, D, dtype), int32([0, 5, 98])
    )
    bits = BITS[dtype]
    changed = wide.view(bits) != before.view(bits)
    assert not changed[..., D:].any() and not changed[..., R:, :].any()
    assert changed[..., :R, :D].any()


def test_strided_counts_are_read_with_their_stride(append):
    caches = noise(3, 2, 6, 4), noise(3, 2, 6, 4)
    counts = int32([5, 99, 2, 99, 0, 99]).view(3, 2)
    starts = int32([1, -7, 0, -7, 2, -7]).view(3, 2)
    assert_like_reference(append, *caches, projected(3, 2, 3, 4), projected(3, 2, 3, 4), counts[:, 0], starts[:, 0])


def test_work_for_several_threads_is_done_once(append):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        caches = noise(4, 8, 384, 128), noise(4, 8, 384, 128)
        assert_like_reference(append, *caches, projected(4, 8, 300, 128), projected(4, 8, 300, 128), int32([0, 100, 200, 384]))
    finally:
        torch.set_num_threads(threads)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_call_equals_the_reference(append, data):
    B, H, D = (data.draw(st.integers(1, most)) for most in (5, 3, 20))
    T, R = data.draw(st.integers(0, 40)), data.draw(st.integers(1, 40))
    dtype = data.draw(st.sampled_from(DTYPES))
    lengths = data.draw(st.lists(st.integers(0, 2**31 - 1 - 40), min_size=B, max_size=B))
    starts = data.draw(st.none() | st.lists(st.integers(0, T + 1), min_size=B, max_size=B))
    layout = LAYOUTS[data.draw(st.sampled_from(list(LAYOUTS)))]
    caches = noise(B, H, R, D, dtype=dtype), noise(B, H, R, D, dtype=dtype)
    k, v = layout(B, H, T, D, dtype=dtype), projected(B, H, T, D, dtype)
    if T:
        assert_like_reference(append, *caches, k, v, int32(lengths), starts if starts is None else int32(starts))
    else:
        before = [t.clone() for t in caches]
        append(*caches, k, v, int32(lengths))
        assert all(torch.equal(a.view(BITS[dtype]), b.view(BITS[dtype])) for a, b in zip(caches, before, strict=True))


def test_threads_that_come_first_together_all_find_it(append):
    code = """
import threading
from gptneo_fast.ops import extension
extension.LIBRARY = extension.Path(%r)
answers, gate = [], threading.Barrier(8)
def ask():
    gate.wait()
    answers.append(extension.why_not())
threads = [threading.Thread(target=ask) for _ in range(8)]
[t.start() for t in threads], [t.join() for t in threads]
print(answers == [None] * 8)
"""
    command = [sys.executable, "-c", code % str(extension.LIBRARY)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "True\n", done.stderr


def call(**changes):
    arguments = {
        "k_cache": torch.zeros(2, 3, 5, 4),
        "v_cache": torch.zeros(2, 3, 5, 4),
        "k": torch.ones(2, 3, 2, 4),
        "v": torch.ones(2, 3, 2, 4),
        "lengths": int32([0, 1]),
        "starts": None,
    }
    return arguments | changes


REFUSED = {
    "k_cache of three axes": (call(k_cache=torch.zeros(2, 3, 4)), r"k_cache has shape \[2, 3, 4\], but must have four axes"),
    "k of three axes": (call(k=torch.zeros(2, 3, 4)), r"k has shape \[2, 3, 4\], but must have four axes"),
    "v of another head dim": (call(v=torch.ones(2, 3, 2, 5)), r"v has shape \[2, 3, 2, 5\], but axis 3 must be 4"),
    "v of fewer tokens": (call(v=torch.ones(2, 3, 1, 4)), "axis 2 must be 2"),
    "k of other heads": (call(k=torch.ones(2, 2, 2, 4)), "axis 1 must be 3"),
    "k of more rows": (call(k=torch.ones(3, 3, 2, 4)), "axis 0 must be 2"),
    "v_cache of fewer slots": (
        call(v_cache=torch.zeros(2, 3, 4, 4)),
        r"v_cache has shape \[2, 3, 4, 4\], but axis 2 must be 5",
    ),
    "k of another dtype": (call(k=torch.ones(2, 3, 2, 4).half()), "k is Half, but k_cache is Float; convert"),
    "a cache of integers": (call(k_cache=torch.zeros(2, 3, 5, 4, dtype=torch.int32)), "must be float16, bfloat16"),
    "a cache without slots": (call(k_cache=torch.zeros(2, 3, 0, 4), v_cache=torch.zeros(2, 3, 0, 4)), "has 0 slots"),
    "an expanded cache": (call(k_cache=torch.zeros(2, 1, 5, 4).expand(2, 3, 5, 4)), r"stride 0 of axis 1.*clone it"),
    "lengths in int64": (call(lengths=torch.tensor([0, 1])), r"lengths is Long, but must be int32; use .to\(torch.int32\)"),
    "lengths of another batch": (call(lengths=int32([0])), r"lengths has shape \[1\], but must be \[2\]"),
    "starts of another batch": (call(starts=int32([0, 0, 0])), r"starts has shape \[3\], but must be \[2\]"),
    "starts in int64": (call(starts=torch.tensor([0, 1])), "starts is Long, but must be int32"),
    "a negative length": (call(lengths=int32([0, -1])), r"lengths\[1\] is -1, but must be from 0 to 2147483645"),
    "a length past int32": (call(lengths=int32([2**31 - 2, 0])), r"lengths\[0\] is 2147483646"),
    "a negative start": (call(starts=int32([0, -3])), r"starts\[1\] is -3, but must be 0 or more"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_and_nothing_is_written(append, case):
    arguments, message = REFUSED[case]
    with pytest.raises(errors.InputError, match=message):
        append(**arguments)
    assert not arguments["k_cache"].any() and not arguments["v_cache"].any()
    append(**call())  # and the op goes on


def fresh_why_not(monkeypatch, library, report='{"line": "built for the CPU only: no nvcc"}'):
    library.with_suffix(".json").write_text(report)
    monkeypatch.setattr(extension, "LIBRARY", library)
    monkeypatch.setattr(extension, "REPORT", library.with_suffix(".json"))
    return extension._load.__wrapped__()


def test_a_library_that_was_not_built_says_what_the_install_said(monkeypatch, tmp_path):
    line = "not built: no C++ compiler (c++, g++) in PATH"
    assert fresh_why_not(monkeypatch, tmp_path / "x.so", json.dumps({"line": line})) == line
    for broken in ("", "[]", "{}", "not json"):
        assert "pip install ." in fresh_why_not(monkeypatch, tmp_path / "x.so", broken)


def test_a_file_that_is_no_library_is_a_reason_and_no_crash(monkeypatch, tmp_path):
    (tmp_path / "x.so").write_bytes(b"\x7fELF" + bytes(60))
    reason = fresh_why_not(monkeypatch, tmp_path / "x.so")
    assert "cannot be used with torch" in reason and "install gptneo_fast again" in reason


@needs_compiler
def test_a_library_for_another_torch_is_a_reason_that_names_the_symbol(monkeypatch, tmp_path):
    (tmp_path / "x.cpp").write_text('extern "C" int gone_from_torch(); extern "C" int use() { return gone_from_torch(); }')
    command = [COMPILER, "-shared", "-fPIC", "-Wl,-z,now", "x.cpp", "-o", "x.so"]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert "undefined symbol: gone_from_torch" in fresh_why_not(monkeypatch, tmp_path / "x.so")


SIDES = {"cpu": "csrc/kv_append_cpu.cpp", "cuda": "tests/support/cuda_on_host/kv_append_cpu.cpp"}


@needs_compiler
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("sanitizer", ["address", "undefined"])
def test_both_sides_store_every_byte_in_its_place_and_are_clean_under_sanitizers(sanitizer, side, tmp_path):
    """The CUDA side runs its threads one after the other on the CPU: its grid, its addresses, its alignment."""
    flags = ["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-DGPTNEO_FAST_CUDA"]
    flags += [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-Itests/support/cuda_on_host"]
    command = [COMPILER, *flags, "tests/support/append_driver.cpp", SIDES[side], "-o", str(tmp_path / "driver")]
    built = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    if "cannot find" in built.stderr and "san" in built.stderr:
        pytest.skip(f"this compiler has no {sanitizer} sanitizer")
    assert built.returncode == 0, built.stderr
    done = subprocess.run([tmp_path / "driver", "2000", "4"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "2000 calls\n", "")


def test_samples_equal_the_reference(append):
    for sample in testing.SAMPLES["kv_append"]():
        for dtype in DTYPES:
            case = sample.to(dtype)
            for got, want in zip(case.run(append), case.run(reference.kv_append), strict=True):
                assert torch.equal(got, want), sample.name


def test_info_says_what_was_built(append, monkeypatch):
    assert info.machine()["C++ extension"] == extension.status()
    monkeypatch.setattr(extension, "why_not", lambda: "not built: no C++ compiler (c++, g++) in PATH")
    text = "not built: no C++ compiler (c++, g++) in PATH; on CUDA the Triton kernel stores keys and values"
    assert extension.status() == text


def test_on_cuda_the_op_takes_the_extension_where_it_can_run_and_the_triton_kernel_elsewhere(monkeypatch):
    taken = []
    monkeypatch.setattr(extension, "kv_append", lambda *_, **__: taken.append("extension"))
    monkeypatch.setattr(ops, "_launcher", lambda name: lambda *_, **__: taken.append(f"kernels.{name}"))
    for reason in (None, "the extension was built without CUDA"):
        monkeypatch.setattr(extension, "why_not_on", lambda device, reason=reason: reason)
        ops._append(*call().values())
    assert taken == ["extension", "kernels.kv_append"]
