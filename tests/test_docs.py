"""The Python of the README and of the pages under docs/ runs, with the embedded model in the place of those of the hub."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from gptneo_fast import errors
from gptneo_fast.demo import FOLDER

REPO = Path(__file__).resolve().parent.parent
PAGES = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]
BLOCKS = [(page, block) for page in PAGES for block in re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL)]
OF_JAX = [block for _, block in BLOCKS if "import jax" in block]
OF_EXTRAS = [block for _, block in BLOCKS if "import ray" in block or "onnx" in block]  # tests/integrations runs them


def run(block, names):
    """Run a block with names of those before it; all names after it."""
    code = re.sub(r'"EleutherAI/[\w.-]+"', repr(str(FOLDER)), block)
    names = dict(names)
    exec(compile(code, "a page", "exec"), names)
    return names


@pytest.mark.parametrize("page", sorted({page for page, _ in BLOCKS}), ids=lambda page: page.stem)
def test_each_block_for_torch_runs_after_those_before_it(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some write files
    blocks = [block for of, block in BLOCKS if of == page and block not in OF_JAX + OF_EXTRAS]
    if not blocks:
        pytest.skip("all of them are of extras")
    names = {}
    for block in blocks:
        names = run(block, names)


@pytest.mark.skipif(find_spec("flax") is None, reason="jax and flax are an extra")
def test_the_block_for_jax_runs():
    assert len(OF_JAX) == 1
    run(OF_JAX[0], {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text("utf-8")):
        assert target.startswith("https://") or (page.parent / target).is_file(), target


def test_every_page_is_in_the_site_and_every_error_on_its_page():
    site = (REPO / "mkdocs.yml").read_text("utf-8")
    assert [page.name for page in PAGES[1:] if f" {page.name}\n" not in site] == []
    text = (REPO / "docs/errors.md").read_text("utf-8")
    named = [n for n, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, errors.GPTNeoFastError)]
    assert [name for name in named if f"`{name}`" not in text] == []
