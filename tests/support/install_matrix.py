"""Installs the package the ways that people do, in clean environments, and says what each one built.

    python tests/support/install_matrix.py                        # every case below, from a wheel and editable
    python tests/support/install_matrix.py "no compiler" nvcc     # cases whose names contain a word
    python tests/support/install_matrix.py --torch torch==2.11.0  # with this torch, downloaded, instead of the running one

An environment is a fresh venv into which the packages of the running one are linked; tools are hidden by a PATH of links
without them. pip may reach no index: only setuptools is at hand, so an install that wanted torch to build would fail.
Not covered without a GPU: that the CUDA side runs (tests/ops/test_extension_cuda.py does that where there is one).
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
PROJECT = re.compile(r"gptneo|__editable__|.*\.pth$|_virtualenv|distutils-precedence|__pycache__|pip\b|pip-")
COMPILERS = re.compile(r"(.*-)?(c\+\+|g\+\+|gcc|cc|clang|clang\+\+)(-[\d.]+)?$")
NO_NVCC = r"no nvcc in (PATH or /usr/local/cuda|CUDA_HOME=/nowhere)"


@dataclass(frozen=True)
class Case:
    """One way to install.

    line: the one line that must be said, as a regular expression.
    built: whether the library must be there.
    torch: what version.py of the linked torch says: the running one's own words, (version, cuda) instead, or no torch.
    compiler, nvcc: whether they are in PATH; "broken" for one that fails.
    strict: GPTNEO_FAST_BUILD_EXT. fails: whether pip must fail.
    """

    name: str
    line: str
    built: bool = True
    torch: bool | tuple[str, str | None] = True
    compiler: bool | str = True
    nvcc: bool | str = False
    strict: str = ""
    fails: bool = False


CASES = [
    Case("no torch yet", r"not built: torch is not installed where this was built", built=False, torch=False),
    Case("CPU torch, g++, no nvcc", rf"built for the CPU only: {NO_NVCC}"),
    Case("nvcc and g++", r"built for CUDA \(sm_80, sm_86, sm_89, sm_90 \+ PTX; nvcc [\d.]+\) and the CPU", nvcc=True),
    Case("no compiler", r"not built: no C\+\+ compiler \(c\+\+, g\+\+\) in PATH", built=False, compiler=False),
    Case("CUDA torch, no nvcc", rf"built for the CPU only: {NO_NVCC}", torch=("2.13.0+cu130", "13.0")),
    Case("a compiler that fails", r"not built: c\+\+ failed: error: out of order", built=False, compiler="broken"),
    Case("an nvcc that fails", r"built for the CPU only: nvcc failed: error: out of order", nvcc="broken"),
    Case("torch too old", r"not built: torch 2\.10\.0 in \S+ is older than 2\.11", built=False, torch=("2.10.0", None)),
    Case("told not to", r"not built: GPTNEO_FAST_BUILD_EXT=0", built=False, strict="0"),
    Case("strict, no compiler", r"cannot be built in full.*: no C\+\+ compiler", compiler=False, strict="1", fails=True),
    Case("strict, CUDA torch, no nvcc", rf"in full.*: {NO_NVCC}", torch=("2.13.0+cu130", "13.0"), strict="1", fails=True),
    Case("strict, CPU torch, no nvcc", rf"built for the CPU only: {NO_NVCC}", strict="1"),
]

CHECK = """
import sys, torch, gptneo_fast
from gptneo_fast.ops import extension, reference
from gptneo_fast.demo import FOLDER
import gptneo_fast.kernels
assert extension.LIBRARY.is_file() == (sys.argv[1] == "True"), extension.LIBRARY
if extension.LIBRARY.is_file():
    assert extension.why_not() is None, extension.why_not()
    caches = torch.zeros(4, 2, 3, 384, 64).bfloat16()
    k, v = torch.randn(2, 2, 50, 3, 64).bfloat16().transpose(2, 3)
    lengths = torch.tensor([0, 370], dtype=torch.int32)
    extension.kv_append(caches[0], caches[1], k, v, lengths)
    reference.kv_append(caches[2], caches[3], k, v, lengths)
    assert torch.equal(caches[:2], caches[2:]) and caches.any()
else:
    assert extension.why_not() == extension.built()
text = gptneo_fast.load(FOLDER, device="cpu").generate_text("Once upon a time", max_new_tokens=20)
assert len(text) > 20, text
print(gptneo_fast.__file__)
"""


def run(command: list[str | Path], **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(word) for word in command], text=True, capture_output=True, check=False, **options)


def must(command: list[str | Path], **options) -> str:
    done = run(command, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def tools(folder: Path, case: Case) -> str:
    """A PATH of links to every tool but those that the case hides; broken ones print an error and fail."""
    folder.mkdir()
    for place in os.environ["PATH"].split(os.pathsep):
        for tool in Path(place).iterdir() if Path(place).is_dir() else ():
            hidden = tool.name == "nvcc" if case.nvcc is not True else False
            hidden = hidden or (case.compiler is not True and COMPILERS.match(tool.name) is not None)
            if not hidden and not (folder / tool.name).exists() and os.access(tool, os.X_OK):
                (folder / tool.name).symlink_to(tool)
    for name, state in (("c++", case.compiler), ("nvcc", case.nvcc)):
        if state == "broken":
            knows = "case $1 in --version) echo release 13.0; exit;; --list-gpu-arch) echo compute_90; exit;; esac"
            (folder / name).write_text(f"#!/bin/sh\n{knows}\necho 'error: out of order' >&2\nexit 1\n")
            (folder / name).chmod(0o755)
    return str(folder)


def environment(folder: Path, case: Case, packages: Path) -> Path:
    """A venv with links to the packages, and a torch that says what the case wants; returns its Python."""
    must([sys.executable, "-m", "venv", "--without-pip", folder])
    python = folder / "bin/python"
    site = Path(must([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip())
    for package in packages.iterdir() if case.torch else ():
        if not PROJECT.match(package.name):
            (site / package.name).symlink_to(package)
    if isinstance(case.torch, tuple):  # a real folder of links, but for version.py
        (site / "torch").unlink()
        (site / "torch").mkdir()
        for part in (packages / "torch").iterdir():
            if part.name != "version.py":
                (site / "torch" / part.name).symlink_to(part)
        text = (packages / "torch/version.py").read_text()
        version, cuda = case.torch
        text = re.sub(r"^__version__ = .*$", f"__version__ = {version!r}", text, flags=re.M)
        (site / "torch/version.py").write_text(re.sub(r"^cuda\b.*$", f"cuda = {cuda!r}", text, flags=re.M))
    return python


def install(case: Case, editable: bool, packages: Path, wheels: Path, work: Path) -> str:
    """Install in one way; returns the line that was said."""
    source = work / "source"
    files = must(["git", "ls-files", "-co", "--exclude-standard"], cwd=REPO).splitlines()
    for name in files:
        if (REPO / name).is_file():  # not one that was just removed
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPO / name, source / name)
    python = environment(work / "env", case, packages)
    own = {name: os.environ[name] for name in ("HOME", "LANG", "TMPDIR") if name in os.environ}
    own |= {"PATH": tools(work / "bin", case), "GPTNEO_FAST_BUILD_EXT": case.strict, "PYTHONNOUSERSITE": "1"}
    if case.nvcc is not True and case.nvcc != "broken" and Path("/usr/local/cuda/bin/nvcc").exists():
        own["CUDA_HOME"] = "/nowhere"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "-v", "--no-deps", "--no-index", "--find-links", wheels]
    done = run([*pip, *(["-e"] if editable else []), source], env=own, cwd=work)
    said = re.findall(r"gptneo_fast C\+\+ extension: (.*)|error: (the extension cannot be built.*)", done.stdout + done.stderr)
    lines = [line or error for line, error in said]
    assert len(lines) == 1 and re.search(case.line, lines[0]), f"{lines}\n{done.stdout}{done.stderr}"
    assert (done.returncode != 0) == case.fails, done.stdout + done.stderr
    if case.fails:
        assert run([python, "-c", "import gptneo_fast"], cwd=work).returncode != 0
        return lines[0]
    command = python.parent / "gptneo-fast"
    info = run([command, "info"], cwd=work)
    if case.torch:
        assert lines[0] in info.stdout, info.stdout + info.stderr
        place = must([python, "-c", CHECK, str(case.built)], cwd=work).strip().splitlines()[-1]
        assert Path(place).is_relative_to(source if editable else work / "env"), place
    else:
        assert info.returncode == 1 and "torch is not installed" in info.stderr, info.stdout + info.stderr
        must([command, "--version"], cwd=work)
    return lines[0]


def main() -> int:
    parser = argparse.ArgumentParser(description="install in clean environments, one way after the other")
    parser.add_argument("words", nargs="*", metavar="WORD", help="cases whose names contain one of these; default: all")
    parser.add_argument("--torch", metavar="REQUIREMENT", help="a torch to download instead of the one that is here")
    args = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory(prefix="install-matrix-") as folder:
        root = Path(folder)
        must([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "setuptools>=77", "-d", root / "wheels"])
        packages = Path(importlib.util.find_spec("torch").origin).parent.parent
        if args.torch:
            must([sys.executable, "-m", "venv", root / "torch"])
            needs = [args.torch, "numpy", "safetensors", "tokenizers", "huggingface_hub"]
            must([root / "torch/bin/python", "-m", "pip", "install", "-q", *needs])
            packages = next((root / "torch/lib").glob("python*/site-packages"))
        for case in CASES:
            if args.words and not any(word in case.name for word in args.words):
                continue
            if case.nvcc is True and shutil.which("nvcc") is None:
                print(f"skipped  {case.name}: there is no nvcc here")
                continue
            for editable in (False, True):
                work, began = root / f"{case.name}-{editable}".replace(" ", "-"), time.monotonic()
                work.mkdir()
                try:
                    outcome, line = "ok", install(case, editable, packages, root / "wheels", work)
                except AssertionError as error:
                    outcome, line = "FAILED", str(error)
                    failed += 1
                way = "pip install -e ." if editable else "pip install ."
                print(f"{outcome:<6} {case.name:<28} {way:<16} {time.monotonic() - began:4.0f} s  {line}", flush=True)
                shutil.rmtree(work)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
