"""The house: imports point one way, names load lazily, files stay small."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import gptneo_fast

ROOT = Path(gptneo_fast.__file__).parent
REPO = ROOT.parent

# From the ground up; a module may import from floors below its own, and from its own room.
FLOORS = [
    ["errors", "kinship", "forks", "demo"],
    ["files", "device", "progress", "kernels"],
    ["config"],
    ["ops", "tokenizer"],
    ["network"],
    ["checkpoint"],
    ["generation", "scoring"],
    ["engine"],
    ["models"],
    ["flax", "integrations"],
    ["tools"],
]
FLOOR_OF = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}


def module(path: Path) -> list[str]:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return parts[:-1] if parts[-1] == "__init__" else parts


def imported_rooms(path: Path):
    """(line, room) of every import of the package in a file, whether at the top or inside a function."""
    here = module(path) if path.name != "__init__.py" else [*module(path), "__init__"]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = here[: len(here) - node.level]
            names = [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]
            yield from ((node.lineno, [*base, name][0]) for name in names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gptneo_fast."):
            yield node.lineno, node.module.split(".")[1]


SOURCES = sorted(ROOT.rglob("*.py"))


@pytest.mark.parametrize("path", [p for p in SOURCES if p != ROOT / "__init__.py"], ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    room = module(path)[0]
    assert room in FLOOR_OF, f"{room} has no floor; give it one here and in CONTRIBUTING.md"
    for line, other in imported_rooms(path):
        if other in ("__version__", room):
            continue
        assert FLOOR_OF[other] < FLOOR_OF[room], f"{path.name}:{line} imports {other}, which is not below {room}"


def test_the_layering_test_sees_an_arrow_that_runs_back(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "network").mkdir()
    bad = tmp_path / "network" / "cache.py"
    bad.write_text("from ..config import x\ndef f():\n    from .. import models\n    from gptneo_fast.tools.cli import y\n")
    assert list(imported_rooms(bad)) == [(1, "config"), (3, "models"), (4, "tools")]


KERNELS = sorted((REPO / "kernels").glob("*.py"))
SHARED = {"gptneo_fast.errors", "gptneo_fast.ops.constants", "gptneo_fast.ops.vocabulary"}  # of the package above kernels


@pytest.mark.parametrize("path", KERNELS, ids=lambda p: p.name)
def test_kernels_know_nothing_of_the_model(path):
    """They import torch, triton, the standard library, each other, errors, and numbers and a product that they share."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and not node.level:
            room = node.module or ""
            known = room.split(".")[0] in ("torch", "triton", *sys.stdlib_module_names)
            names = {f"{room}.{alias.name}" for alias in node.names}
            shared = room in SHARED or names <= SHARED
            assert known or shared, f"{path.name}:{node.lineno}"
        elif isinstance(node, ast.Import):
            rooms = {alias.name.split(".")[0] for alias in node.names}
            assert rooms <= {"torch", "triton", *sys.stdlib_module_names}, f"{path.name}:{node.lineno}"


def test_the_numbers_that_kernels_share_are_made_of_nothing():
    tree = ast.parse((ROOT / "ops" / "constants.py").read_text())
    assert not any(isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.walk(tree))


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_imports_nothing_heavy():
    heavy = run(
        "import sys, gptneo_fast\n"
        "heavy = ('torch', 'triton', 'transformers', 'tokenizers', 'safetensors', 'numpy', 'jax')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    assert heavy == "[]"


def test_running_a_model_needs_no_triton_and_no_transformers_and_starts_no_cuda():
    code = """
import sys
for name in ("triton", "transformers"):
    sys.modules[name] = None                      # an import of it raises
import torch
torch.cuda._lazy_init = lambda: (_ for _ in ()).throw(AssertionError("CUDA was initialised"))
import gptneo_fast
from gptneo_fast.demo import FOLDER
model = gptneo_fast.GPTNeoForCausalLM.from_pretrained(FOLDER)
model.tokenizer = gptneo_fast.GPT2Tokenizer.from_pretrained(FOLDER)
print(len(model.generate_text("Once upon a time", max_new_tokens=5)) > 0, torch.cuda.is_initialized())
"""
    assert run(code) == "True False"


def test_the_first_tokens_of_a_process_come_without_torchs_compiler():
    code = """
import sys
import torch
assert "torch._dynamo" not in sys.modules
import gptneo_fast
from gptneo_fast.demo import FOLDER
model = gptneo_fast.load(FOLDER, device="cpu")
ways = {}, {"do_sample": True}, {"num_beams": 2}
texts = [model.generate_text("Once upon a time", max_new_tokens=5, **way) for way in ways]
print(all(texts), "torch._dynamo" in sys.modules)
"""
    assert run(code) == "True False"


def test_every_public_name_resolves_and_is_documented():
    for name in gptneo_fast.__all__:
        assert getattr(gptneo_fast, name).__doc__, name
    assert set(gptneo_fast.__all__) <= set(dir(gptneo_fast))
    with pytest.raises(AttributeError, match="did you mean 'GPTNeoForCausalLM'"):
        gptneo_fast.GPTNeoForCausalML  # noqa: B018


@pytest.mark.parametrize("path", [*SOURCES, *KERNELS], ids=lambda p: f"{p.parent.name}/{p.name}")
def test_files_stay_under_400_lines(path):
    assert len(path.read_text().splitlines()) <= 400


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_functions_stay_under_60_lines(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            body = node.end_lineno - node.body[0].lineno - (ast.get_docstring(node) or "").count("\n")
            assert body <= 60, f"{node.name} has {body} lines"
