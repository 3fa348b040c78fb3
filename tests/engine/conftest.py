"""Models, and what is read of prompts, for the tests of this room."""

import pytest
import torch

import gptneo_fast
from gptneo_fast.engine import reading, rows
from tests.support.serial import lively


@pytest.fixture(scope="module")
def model():
    return lively()


@pytest.fixture(scope="module")
def stories():
    from gptneo_fast.demo import FOLDER

    return gptneo_fast.load(FOLDER, dtype=torch.float32)


@pytest.fixture
def reads(monkeypatch):
    """Tokens of each read of a prompt, None for each step."""
    found, read, step = [], reading.read, rows.Rows.step

    def counted(model, texts, cache):
        found.append(len(texts) * max(map(len, texts)))
        read(model, texts, cache)

    def stepped(own):
        found.append(None)
        step(own)

    monkeypatch.setattr(reading, "read", counted)
    monkeypatch.setattr(rows.Rows, "step", stepped)
    return found
