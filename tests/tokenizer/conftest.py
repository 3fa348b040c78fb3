"""The demo's tokenizer."""

import shutil

import pytest

from gptneo_fast.demo import FOLDER
from tests.support.tokenizer_folders import FORMS


@pytest.fixture(scope="module")
def demo_files(tmp_path_factory):
    """The demo's tokenizer in both forms; its files stand in for GPT-2's where the size of the vocabulary is no matter."""
    folders = {form: tmp_path_factory.mktemp("demo") for form in FORMS}
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(FOLDER / name, folders["vocab"])
    shutil.copy(FOLDER / "tokenizer.json", folders["json"])
    return folders
