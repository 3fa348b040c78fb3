"""The README's Python runs, with the embedded model in the place of those of the hub."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from gptneo_fast.demo import FOLDER

README = Path(__file__).resolve().parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
OF_JAX = [block for block in BLOCKS if "import jax" in block]
OF_EXTRAS = [block for block in BLOCKS if "import ray" in block or "onnx" in block]  # tests/integrations runs them


def run(block, names):
    """Run a block with names of one before it; all names after it."""
    code = re.sub(r'"EleutherAI/[\w.-]+"', repr(str(FOLDER)), block)
    names = dict(names)
    exec(compile(code, str(README), "exec"), names)
    return names


def test_each_block_for_torch_runs_after_the_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some write files
    first, *others = [block for block in BLOCKS if block not in OF_JAX + OF_EXTRAS]
    names = run(first, {})
    assert len(others) >= 4
    for block in others:
        run(block, names)


@pytest.mark.skipif(find_spec("flax") is None, reason="jax and flax are an extra")
def test_the_block_for_jax_runs():
    run(OF_JAX[0], {})
