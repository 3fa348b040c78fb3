"""What stands in examples/ runs, is short, and says what it should; those that need more libraries: tests/integrations."""

import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SAID = {
    "generate": r"Once upon a time.*\n- The fox was",
    "score_file": r"a token, +\d+% of them the likeliest: Once upon a time there",
    "drop_in": r"Once upon a time.*\nloss: \d",
    "activation_patching": r"layer 0: \d+% .*\nlayer 3: 100%",
}
ELSEWHERE = {"flax_generate", "lora", "ray_batch"}  # tests/flax, tests/integrations


def test_every_example_is_run_somewhere_and_short():
    found = {path.stem: len(path.read_text().splitlines()) for path in EXAMPLES.glob("*.py")}
    assert set(found) == set(SAID) | ELSEWHERE and max(found.values()) < 40


@pytest.mark.parametrize("name", SAID)
def test_an_example_says_what_it_should(name, capsys, monkeypatch):
    said = run(name, capsys, monkeypatch)
    assert re.search(SAID[name], said, re.DOTALL), said


def run(name, capsys, monkeypatch):
    """What it prints."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out
