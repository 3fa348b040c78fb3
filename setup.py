"""Builds the C++ extension (csrc/) as far as the machine can; everything else is declared in pyproject.toml.

With nvcc the CUDA and the CPU side, with a C++ compiler alone the CPU side, without one or without torch's headers
nothing: the package works all the same. One line says what was built and why not more (`pip install -v` shows it); it is
kept beside the package, where `gptneo-fast info` finds it. torch is never imported and never asked for to build with.

Environment:
    GPTNEO_FAST_BUILD_EXT   1: fail where something that torch could use cannot be built; 0: build nothing
    TORCH_CUDA_ARCH_LIST    as for torch's own extensions, e.g. "8.0;9.0+PTX"
    CUDA_HOME, CXX          a CUDA toolkit instead of the one in PATH; a compiler other than c++ or g++
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import ExecError

ROOT = Path(__file__).resolve().parent
LIBRARY, REPORT = "_csrc.so", "_csrc.json"
OLDEST_TORCH = (2, 11)  # whose stable ABI is targeted: one binary serves every later one
TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"
ARCHITECTURES = "8.0 8.6 8.9 9.0+PTX"
CPU_SOURCES = (
    "binding.cpp",
    "decode_cpu.cpp",
    "decode_lanes.cpp",
    "draw_cpu.cpp",
    "kv_append_cpu.cpp",
    "large_pages.cpp",
    "layers_cpu.cpp",
)
CUDA_SOURCES = ("kv_append.cu",)
HEADERS = (
    *("attention.h", "decode.h", "draw.h", "draw_lanes.h", "integers.h", "kv_append.h", "lanes.h", "packed.h", "products.h"),
    *("reading.h", "running.h", "slots.h"),
)
LANES = {  # floats of a vector -> the instruction set that has it; decode_lanes.cpp is compiled once for each
    "4": [],
    "8": ["-mavx2", "-mfma", "-mf16c"],
    "16": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"],
}
LANES["16.vnni"] = [*LANES["16"], "-mavx512vnni"]


class CannotBuildError(Exception):
    """Why the extension, or one side of it, cannot be built here."""


class NoNvccError(CannotBuildError):
    """There is no CUDA compiler, which nobody misses whose torch has no CUDA."""


@dataclass(frozen=True)
class Torch:
    """An installed torch: its folder, its version, and the CUDA version that it was built for, or None."""

    folder: Path
    version: str
    cuda: str | None


def find_torch() -> Torch:
    """The torch that the package will run with, without importing it.

    Build isolation takes it out of sys.path, but not out of the environment that sysconfig describes.
    """
    spec = importlib.util.find_spec("torch")
    folders = [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
    folders += [Path(sysconfig.get_path(name)) / "torch" for name in ("platlib", "purelib")]
    for folder in folders:
        if not (folder / "version.py").is_file():
            continue
        text = (folder / "version.py").read_text()
        version = re.search(r"^__version__\s*=\s*['\"]([^'\"]+)", text, re.M)
        cuda = re.search(r"^cuda\b[^=]*=\s*['\"]([^'\"]+)", text, re.M)
        if version is None:
            continue
        numbers = tuple(int(n) for n in re.findall(r"\d+", version[1])[:2])
        if numbers < OLDEST_TORCH:
            raise CannotBuildError(f"torch {version[1]} in {folder} is older than 2.11")
        if not (folder / "include/torch/csrc/stable/library.h").is_file():
            raise CannotBuildError(f"torch {version[1]} in {folder} has no headers")
        return Torch(folder, version[1], cuda[1] if cuda else None)
    raise CannotBuildError(
        "torch is not installed where this was built; install torch, then this package from its sources again "
        "(pip install --force-reinstall --no-deps --no-cache-dir SOURCES)"
    )


def find_compiler() -> list[str]:
    """The C++ compiler as a command: CXX, or else c++ or g++ in PATH."""
    words = os.environ.get("CXX", "")
    try:
        asked = shlex.split(words)
    except ValueError as error:
        raise CannotBuildError(f"CXX is {words!r}, which is no command: {error}") from error
    if asked and shutil.which(asked[0]) is None:
        raise CannotBuildError(f"the C++ compiler that CXX names, {asked[0]}, is not there")
    found = asked or [name for name in ("c++", "g++") if shutil.which(name)][:1]
    if not found:
        raise CannotBuildError("no C++ compiler (c++, g++) in PATH")
    return found


def find_nvcc() -> str:
    """nvcc of CUDA_HOME where that is set, else of PATH or /usr/local/cuda; it finds its own toolkit, be it a link or not."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    for place in [f"{home}/bin/nvcc"] if home else ["nvcc", "/usr/local/cuda/bin/nvcc"]:
        if found := shutil.which(place):
            return found
    raise NoNvccError(f"no nvcc in CUDA_HOME={home}" if home else "no nvcc in PATH or /usr/local/cuda")


def answer(command: list[str]) -> str:
    """What a command prints, which has a minute for it."""
    code, out, errors = run(command, seconds=60)
    if code:
        raise CannotBuildError(f"{shlex.join(command)} failed: {last_line(errors)}")
    return out


def run(words: list[str], seconds: int) -> tuple[int, str, str]:
    """Exit status, output and errors of a command in the project's folder; it and what it began have so long.

    Raises:
        CannotBuildError: it is no program, or does not end.
    """
    how = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "start_new_session": True}
    try:
        process = subprocess.Popen(words, cwd=ROOT, encoding="utf-8", errors="replace", **how)
    except OSError as error:
        raise CannotBuildError(f"{words[0]} cannot be run: {error.strerror or error}") from error
    try:
        out, errors = process.communicate(timeout=seconds)
    except BaseException as error:  # an interrupt, too, which a session of its own does not get
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        raise CannotBuildError(f"{words[0]} did not end within {seconds} seconds") from error
    return process.returncode, out, errors


def last_line(text: str) -> str:
    """The line of a compiler's output that says most: its first error, or else its last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["no message"]
    return next((line for line in lines if "error" in line.lower()), lines[-1])[:300]


def architectures(nvcc: str) -> tuple[list[str], str]:
    """nvcc's flags for the GPUs to build for, and their names in words."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    known = set(re.findall(r"compute_(\d+)", answer([nvcc, "--list-gpu-arch"])))
    flags, names = [], []
    for entry in re.split(r"[\s;,]+", asked or ARCHITECTURES):
        parts = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if parts is None:
            raise CannotBuildError(f"TORCH_CUDA_ARCH_LIST has {entry!r}, which is not of the form 8.0 or 9.0+PTX")
        number = parts[1] + parts[2]
        if not asked and number not in known:
            continue
        arch = number + parts[3]
        flags += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
        flags += ["-gencode", f"arch=compute_{arch},code=compute_{arch}"] if parts[4] else []
        names.append(f"sm_{arch}" + (" + PTX" if parts[4] else ""))
    if not flags:
        raise CannotBuildError(f"{nvcc} knows none of the architectures {ARCHITECTURES}")
    return flags, ", ".join(names)


@dataclass(frozen=True)
class Plan:
    """One way to build: `compile` has a command for each object (without its name), `link` the last one."""

    kind: str
    line: str
    objects: dict[str, list[str]]
    link: list[str]
    torch: Torch

    def key(self) -> str:
        """The same for the same sources, commands and version of torch, wherever it lies."""
        commands = repr((self.objects, self.link)).replace(str(self.torch.folder), "torch")
        digest = hashlib.sha256((commands + self.torch.version).encode())
        for name in (*CPU_SOURCES, *CUDA_SOURCES, *HEADERS):
            digest.update((ROOT / "csrc" / name).read_bytes())
        return digest.hexdigest()[:16]


def plan_cpu(torch: Torch, compiler: list[str], why_not_cuda: str) -> Plan:
    """The CPU side alone."""
    level = [] if any(word.startswith("-O") for word in compiler) else ["-O3"]  # CXX may say another
    flags = ["-c", *level, "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wno-psabi", TARGET]
    flags += ["-isystem", str(torch.folder / "include")]
    objects = {name: [*compiler, *flags, f"csrc/{name}"] for name in CPU_SOURCES if name != "decode_lanes.cpp"}
    for lanes, sets in LANES.items() if platform.machine().lower() in ("x86_64", "amd64") else [("4", [])]:
        command = [*compiler, *flags, *sets, f"-DGPTNEO_FAST_LANES={lanes.partition('.')[0]}", "csrc/decode_lanes.cpp"]
        objects[f"decode_lanes.cpp.{lanes}"] = command
    line = f"built for the CPU only: {why_not_cuda}"
    return Plan("cpu", line, objects, [*compiler, "-shared", *libraries(torch, compiler)], torch)


def plan_cuda(torch: Torch, compiler: list[str]) -> Plan:
    """Both sides; nvcc links, with the CUDA runtime inside, so that the library loads where there is none."""
    nvcc = find_nvcc()
    release = re.search(r"release ([\d.]+)", answer([nvcc, "--version"]))
    flags, names = architectures(nvcc)
    host = ["-ccbin", compiler[0]] if os.environ.get("CXX") else []
    objects = {name: [*command, "-DGPTNEO_FAST_CUDA"] for name, command in plan_cpu(torch, compiler, "").objects.items()}
    common = [nvcc, *host, "-c", "-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden", "-DGPTNEO_FAST_CUDA"]
    objects |= {name: [*common, "--threads=0", *flags, f"csrc/{name}"] for name in CUDA_SOURCES}
    line = f"built for CUDA ({names}; nvcc {release[1] if release else 'of unknown version'}) and the CPU"
    return Plan("cuda", line, objects, [nvcc, *host, "-shared", "-cudart=static", *libraries(torch, compiler)], torch)


def libraries(torch: Torch, compiler: list[str]) -> list[str]:
    """What every torch has; libtorch_cuda is found when it is needed.

    A compiler that has libstdc++ as an archive only puts a second one into the library beside torch's; with its names open to
    all, the two mix, and a call on CUDA died of it. So torch's is named, and what comes out of archives stays inside.
    """
    found = [f"-L{torch.folder / 'lib'}", "-lc10", "-ltorch_cpu", "-Xlinker", "--exclude-libs=ALL"]
    shared = answer([*compiler, "-print-file-name=libstdc++.so.6"]).strip()
    return [*found, "-l:libstdc++.so.6"] if Path(shared).is_absolute() else found


class BuildExtension(build_ext):
    """Makes gptneo_fast/_csrc.so, or does not, and writes beside it what was done and why."""

    def run(self) -> None:
        asked = os.environ.get("GPTNEO_FAST_BUILD_EXT", "")
        if asked not in ("", "0", "1"):
            raise ExecError(f"GPTNEO_FAST_BUILD_EXT is {asked!r}; use 1 (must be built), 0 (must not) or leave it unset")
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # of compilers that speak more than it can write
        folder = self.folder()
        folder.mkdir(parents=True, exist_ok=True)
        try:
            report = {"built": "nothing", "line": "not built: GPTNEO_FAST_BUILD_EXT=0"} if asked == "0" else self.build(folder)
        except CannotBuildError as why:
            if asked == "1":
                raise ExecError(
                    f"the extension cannot be built in full, and GPTNEO_FAST_BUILD_EXT=1 asks for it: {why}"
                ) from why
            report = {"built": "nothing", "line": f"not built: {why}"}
        if report["built"] == "nothing":
            (folder / LIBRARY).unlink(missing_ok=True)  # of an earlier build
        (folder / REPORT).write_text(json.dumps(report, indent=1) + "\n")
        print(f"gptneo_fast C++ extension: {report['line']}", flush=True)

    def build(self, folder: Path) -> dict[str, str]:
        """Build what can be built; raises CannotBuildError for all of it, or in strict mode for any side."""
        torch, compiler = find_torch(), find_compiler()
        strict = os.environ.get("GPTNEO_FAST_BUILD_EXT") == "1"
        try:
            return self.make(plan_cuda(torch, compiler), folder)
        except CannotBuildError as why:
            if strict and (torch.cuda or not isinstance(why, NoNvccError)):
                raise
            return self.make(plan_cpu(torch, compiler, str(why)), folder)

    def make(self, plan: Plan, folder: Path) -> dict[str, str]:
        """Run a plan's commands, unless the library that is there came of the same ones."""
        report = {"built": plan.kind, "line": plan.line, "torch": plan.torch.version, "key": plan.key()}
        if not self.force and (folder / LIBRARY).is_file() and read_report(folder).get("key") == report["key"]:
            return report
        work = Path(self.build_temp).resolve()
        work.mkdir(parents=True, exist_ok=True)
        objects = [str(work / f"{name}.o") for name in plan.objects]  # the whole name: kv_append may be a .cpp and a .cu
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            commands = [[*words, "-o", made] for words, made in zip(plan.objects.values(), objects, strict=True)]
            running = [pool.submit(self.command, words) for words in commands]
        for command in running:  # the first that failed is told, once all have ended
            command.result()
        fresh = work / LIBRARY
        split = next(i for i, word in enumerate(plan.link) if word.startswith("-L"))
        self.command([*plan.link[:split], *objects, *plan.link[split:], "-o", str(fresh)])
        shutil.copyfile(fresh, folder / f"{LIBRARY}.new")
        os.replace(folder / f"{LIBRARY}.new", folder / LIBRARY)  # a process may have the old one mapped
        return report

    def command(self, words: list[str]) -> None:
        """Run one command, whose last word is the file that it makes."""
        print(shlex.join(words), flush=True)
        code, out, errors = run(words, seconds=1200)
        print(out + errors, end="", flush=True)
        if code:
            raise CannotBuildError(f"{Path(words[0]).name} failed: {last_line(errors or out)}")
        if not Path(words[-1]).is_file():
            raise CannotBuildError(f"{Path(words[0]).name} says that all went well, and made no {Path(words[-1]).name}")

    def folder(self) -> Path:
        """Where the package stands that is being built: the sources for an editable install."""
        return ROOT / "gptneo_fast" if self.inplace else Path(self.build_lib) / "gptneo_fast"

    def get_outputs(self) -> list[str]:
        return [str(path) for name in (LIBRARY, REPORT) if (path := self.folder() / name).is_file()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


def read_report(folder: Path) -> dict[str, str]:
    """What an earlier build left, or nothing."""
    try:
        return json.loads((folder / REPORT).read_text())
    except (OSError, ValueError):
        return {}


if __name__ == "__main__":
    setup(
        license="Apache-2.0",
        ext_modules=[
            Extension(
                "gptneo_fast._csrc",
                sources=[f"csrc/{name}" for name in (*CPU_SOURCES, *CUDA_SOURCES)],
                depends=[f"csrc/{name}" for name in HEADERS],
            )
        ],
        cmdclass={"build_ext": BuildExtension},
        options={"bdist_wheel": {"py_limited_api": "cp311"}},  # the library uses torch's interface alone, not Python's
    )
