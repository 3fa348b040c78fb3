"""`make sanitize` with stand-ins for the compiler and for Python: both halves run, and either may fail it."""

import os
import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
PYTHON = """#!/usr/bin/env bash
case "$*" in
  *setup.py*) echo built for the CPU only ;;
  *pytest*) if [ -n "${GPTNEO_FAST_TEST_LIBRARY:-}" ]; then exit $CUDA; else exit $CPU; fi ;;
esac
"""
COMPILER = """#!/usr/bin/env bash
case "$*" in *threads.cpp*) ln -s /bin/true threads 2> /dev/null ;; esac
exit 0
"""


@pytest.mark.skipif(not (REPO / ".git").exists(), reason="the script asks git for the sources")
@pytest.mark.parametrize(("cpu", "cuda", "code"), [(0, 0, 0), (1, 0, 1), (0, 2, 2), (3, 2, 3)])
def test_both_halves_run_whatever_becomes_of_the_first(cpu, cuda, code, tmp_path):
    python, compiler = tmp_path / "python", tmp_path / "g++"
    python.write_text(PYTHON), compiler.write_text(COMPILER)
    python.chmod(0o755), compiler.chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CPU": str(cpu), "CUDA": str(cuda)}
    done = subprocess.run(
        ["bash", REPO / "tests/support/sanitize.sh", python], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    assert f"the CPU side exited with {cpu}, the CUDA side on the CPU with {cuda}" in done.stdout
