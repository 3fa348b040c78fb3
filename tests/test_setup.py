"""setup.py finds torch, compilers and architectures, keeps no library of an earlier build, and rebuilds what has changed."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from setuptools import Distribution

from gptneo_fast.ops import extension
from tests.support.append_calls import COMPILER, setup_py

REPO = Path(__file__).parent.parent


@pytest.fixture
def setup():
    return setup_py()


def fake_torch(folder, version="2.12.1+cu130", cuda="'13.0'", headers=True):
    (folder / "torch/include/torch/csrc/stable").mkdir(parents=True)
    if headers:
        (folder / "torch/include/torch/csrc/stable/library.h").touch()
    lines = ["from typing import Optional", f"__version__ = '{version}'", f"cuda: Optional[str] = {cuda}", "hip = None"]
    (folder / "torch/version.py").write_text("\n".join(lines))


@pytest.fixture
def isolated(setup, monkeypatch, tmp_path):
    """As in a build environment: nothing to import, an environment that sysconfig describes."""
    monkeypatch.setattr(setup.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(setup.sysconfig, "get_path", lambda name: str(tmp_path))
    return tmp_path


def test_torch_is_found_without_being_importable(setup, isolated):
    fake_torch(isolated)
    assert setup.find_torch() == setup.Torch(isolated / "torch", "2.12.1+cu130", "13.0")


def test_a_torch_for_the_cpu_has_no_cuda_version(setup, isolated):
    fake_torch(isolated, version="2.13.0+cpu", cuda="None")
    assert setup.find_torch().cuda is None


def test_the_torch_of_an_isolated_build_is_not_imported(setup):
    code = "import sys, importlib.util as u; s = u.spec_from_file_location('s', 'setup.py'); m = u.module_from_spec(s)\n"
    code += "sys.modules['s'] = m; s.loader.exec_module(m); m.find_torch(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "torch is not installed where this was built; install torch, then this"),
        (lambda folder: fake_torch(folder, version="2.10.0"), r"torch 2\.10\.0 in .* is older than 2\.11"),
        (lambda folder: fake_torch(folder, version="1.13.1"), r"torch 1\.13\.1 in .* is older"),
        (lambda folder: fake_torch(folder, headers=False), "has no headers"),
        (lambda folder: (folder / "torch").mkdir(), "torch is not installed"),  # a folder of that name is no torch
    ],
)
def test_a_torch_that_cannot_be_built_for_is_named(setup, isolated, make, message):
    make(isolated)
    with pytest.raises(setup.CannotBuildError, match=message):
        setup.find_torch()


def tool(folder, name, says=""):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\nprintf '{says}'\n")
    (folder / name).chmod(0o755)
    return str(folder / name)


def test_cuda_home_is_taken_instead_of_the_path(setup, monkeypatch, tmp_path):
    in_path, in_home = tool(tmp_path / "path", "nvcc"), tool(tmp_path / "home/bin", "nvcc")
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    assert setup.find_nvcc() == in_path
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert setup.find_nvcc() == in_home
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    with pytest.raises(setup.NoNvccError, match="no nvcc in CUDA_HOME=/nowhere"):
        setup.find_nvcc()


def test_cxx_is_taken_with_its_words_and_named_where_it_is_missing(setup, monkeypatch, tmp_path):
    tool(tmp_path, "g++"), tool(tmp_path, "ccache")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert setup.find_compiler() == ["g++"]
    monkeypatch.setenv("CXX", "ccache g++")
    assert setup.find_compiler() == ["ccache", "g++"]
    monkeypatch.setenv("CXX", "icpx")
    with pytest.raises(setup.CannotBuildError, match="CXX names, icpx, is not there"):
        setup.find_compiler()


def test_a_cxx_that_no_shell_reads_is_named(setup, monkeypatch):
    monkeypatch.setenv("CXX", "g++ 'x")
    with pytest.raises(setup.CannotBuildError, match=r"CXX is .* which is no command: No closing quotation"):
        setup.find_compiler()


def test_a_tool_that_is_no_program_is_named(setup, tmp_path):
    text, folder = tmp_path / "nvcc", tmp_path / "folder"
    text.write_bytes(b"\x00\x01 no program")
    text.chmod(0o755)
    folder.mkdir()
    for place in (text, folder, tmp_path / "missing"):
        with pytest.raises(setup.CannotBuildError, match=rf"{place} cannot be run: \w"):
            setup.answer([str(place), "--version"])


def test_what_a_tool_prints_need_not_be_text(setup, tmp_path):
    assert "release 13.1" in setup.answer([tool(tmp_path, "nvcc", r"\377\376 release 13.1")])


def test_a_tool_that_never_ends_is_ended_with_all_that_it_began(setup, tmp_path):
    script = tmp_path / "nvcc"
    script.write_text(f"#!/bin/sh\nsleep 977 &\necho $! > {tmp_path}/child\nsleep 978\n")
    script.chmod(0o755)
    with pytest.raises(setup.CannotBuildError, match="did not end within 1 seconds"):
        setup.run([str(script)], seconds=1)
    child = Path("/proc", (tmp_path / "child").read_text().strip(), "stat")
    for _ in range(100):  # whoever adopted it may take a moment to bury it
        if not child.exists() or child.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("what the tool began goes on")


def test_a_compiler_that_makes_nothing_is_named(setup, tmp_path):
    build = setup.BuildExtension(Distribution())
    with pytest.raises(setup.CannotBuildError, match=r"g\+\+ says that all went well, and made no a\.o"):
        build.command([tool(tmp_path, "g++"), "-o", str(tmp_path / "a.o")])


@pytest.mark.parametrize(
    ("asked", "names", "flags"),
    [
        ("", "sm_80, sm_90 + PTX", ["80,code=sm_80", "90,code=sm_90", "90,code=compute_90"]),  # this nvcc knows no more
        ("8.6;9.0a", "sm_86, sm_90a", ["86,code=sm_86", "90a,code=sm_90a"]),
        ("7.5 8.0+PTX", "sm_75, sm_80 + PTX", ["75,code=sm_75", "80,code=sm_80", "80,code=compute_80"]),
        ("12.0f", "sm_120f", ["120f,code=sm_120f"]),
    ],
)
def test_architectures_are_the_asked_ones_or_those_of_ours_that_nvcc_knows(setup, monkeypatch, tmp_path, asked, names, flags):
    nvcc = tool(tmp_path, "nvcc", r"compute_75\ncompute_80\ncompute_90\n")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    got = setup.architectures(nvcc)
    assert got == ([word for flag in flags for word in ("-gencode", f"arch=compute_{flag}")], names)


def test_architectures_that_cannot_be_read_or_are_unknown_are_named(setup, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;Hopper")
    with pytest.raises(setup.CannotBuildError, match="TORCH_CUDA_ARCH_LIST has 'Hopper'"):
        setup.architectures(tool(tmp_path, "nvcc", "compute_80"))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "")
    with pytest.raises(setup.CannotBuildError, match=r"knows none of the architectures 8\.0 8\.6"):
        setup.architectures(tool(tmp_path, "nvcc", "compute_50"))


def test_the_line_of_a_compiler_that_says_most(setup):
    assert setup.last_line("a.cpp: In function f:\na.cpp:3: error: no such thing\n  3 | x\n") == "a.cpp:3: error: no such thing"
    assert setup.last_line("one\ntwo\n") == "two"
    assert setup.last_line("") == "no message"


@pytest.mark.skipif(COMPILER is None or shutil.which("nm") is None, reason="needs a C++ compiler and binutils")
def test_the_c_plus_plus_library_is_torch_s_where_the_compiler_would_take_an_archive_of_it(setup, tmp_path):
    compiler = tmp_path / "g++"  # as one in an image for CUDA was
    compiler.write_text(f'#!/bin/sh\nexec {COMPILER} -static-libstdc++ "$@"\n')
    compiler.chmod(0o755)
    source = tmp_path / "words.cpp"
    source.write_text(
        '#include <sstream>\nextern "C" int words(int n) { std::ostringstream s; s << n; return s.str().size(); }\n'
    )

    def opened(*libraries):
        library = tmp_path / "words.so"
        subprocess.run([str(compiler), "-shared", "-fPIC", str(source), *libraries, "-o", str(library)], check=True)
        names = subprocess.run(["nm", "-DC", "--defined-only", str(library)], capture_output=True, text=True, check=True).stdout
        return {line.split(maxsplit=2)[2] for line in names.splitlines()}

    assert any(name.startswith("std::locale::") for name in opened())
    found = opened(*setup.libraries(setup.find_torch(), [str(compiler)]))
    assert "words" in found and not any(name.startswith("std::locale::") for name in found)


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
def test_a_build_is_kept_while_nothing_changes_and_leaves_nothing_behind_when_it_cannot_be_made(tmp_path):
    for name in ("setup.py", "csrc"):
        (shutil.copytree if (REPO / name).is_dir() else shutil.copy)(REPO / name, tmp_path / name)
    library, report = (tmp_path / "out/gptneo_fast" / path.name for path in (extension.LIBRARY, extension.REPORT))

    def build(**changes):
        command = [sys.executable, "setup.py", "-q", "build_ext", "-b", "out", "-t", "work"]
        environment = os.environ | {"CXX": f"{COMPILER} -O0", "CUDA_HOME": "/nowhere"} | changes  # -O3 takes four times as long
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert f"gptneo_fast C++ extension: {json.loads(report.read_text())['line']}\n" in done.stdout
        return library.stat().st_mtime_ns if library.exists() else None

    first = build()
    assert first is not None and json.loads(report.read_text())["built"] == "cpu"
    assert build() == first
    with (tmp_path / "csrc/slots.h").open("a") as f:
        f.write("// changed\n")
    assert build() not in (first, None)
    assert build(CXX="gone-compiler") is None  # not the library of the sources before
    assert json.loads(report.read_text())["built"] == "nothing"


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """(an sdist, names of the tracked files), made where builds, tests and an editor left files behind."""
    if not (REPO / ".git").exists():
        pytest.skip("what belongs in an sdist is told by git, and this is no clone")
    names = subprocess.run(["git", "ls-files", "-z"], cwd=REPO, capture_output=True, text=True, check=True).stdout.split("\0")
    tracked = {name for name in names if name and (REPO / name).is_file()}
    folder = tmp_path_factory.mktemp("sources")
    left = [
        "gptneo_fast/_csrc.so",
        "gptneo_fast/_csrc.json",
        "tests/__pycache__/x.cpython-311.pyc",
        "kernels/x.pyc",
        "notes.txt",
    ]
    for name in [*tracked, *left]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(REPO / name, folder / name) if name in tracked else (folder / name).touch()
    environment = os.environ | {"GPTNEO_FAST_BUILD_EXT": "0"}
    subprocess.run([sys.executable, "setup.py", "-q", "sdist"], cwd=folder, env=environment, capture_output=True, check=True)
    return next((folder / "dist").glob("*.tar.gz")), tracked


def test_an_sdist_is_the_repository_without_what_builds_leave_behind(sdist):
    with tarfile.open(sdist[0]) as archive:
        held = {member.name.partition("/")[2] for member in archive if member.isfile()}
    made = {name for name in held if name in ("PKG-INFO", "setup.cfg") or name.startswith("gptneo_fast.egg-info/")}
    assert held - made == sdist[1]


def test_a_wheel_of_the_sdist_is_whole(sdist, tmp_path):
    with tarfile.open(sdist[0]) as archive:
        archive.extractall(tmp_path, filter="data")
    source = next(path for path in tmp_path.iterdir() if path.is_dir())
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-build-isolation"]
    environment = os.environ | {"GPTNEO_FAST_BUILD_EXT": "0"}
    subprocess.run(
        [*command, "--target", str(tmp_path / "site"), str(source)], env=environment, check=True, capture_output=True
    )
    code = "import gptneo_fast.kernels, gptneo_fast as g; from gptneo_fast.demo import FOLDER; print(g.__file__)\n"
    code += "print(g.load(FOLDER).generate_text('Once', max_new_tokens=2, do_sample=False))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path / "site"))
    packages = {path.relative_to(REPO).parent for path in (REPO / "gptneo_fast").rglob("*.py")}
    for package in packages:  # each that is there is listed in pyproject.toml
        installed = {path.name for path in (tmp_path / "site" / package).glob("*.py")}
        assert installed == {path.name for path in (REPO / package).glob("*.py")}, package
