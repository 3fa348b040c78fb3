"""The README's Python runs, with the embedded model in the place of those of the hub."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from gptneo_fast.demo import FOLDER

README = Path(__file__).resolve().parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
OF_JAX = [block for block in BLOCKS if "import jax" in block]


def run(blocks):
    code = "\n".join(blocks)
    names = re.sub(r'"EleutherAI/[\w.-]+"', repr(str(FOLDER)), code)
    exec(compile(names, str(README), "exec"), {})


def test_the_blocks_for_torch_run_one_after_another(capsys):
    run(block for block in BLOCKS if block not in OF_JAX)
    assert "Once upon a time" not in capsys.readouterr().err


@pytest.mark.skipif(find_spec("flax") is None, reason="jax and flax are an extra")
def test_the_block_for_jax_runs():
    run(OF_JAX)
