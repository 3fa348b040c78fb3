"""A small model and the captured path without a GPU, for the tests of the engine."""

import types

import pytest
import torch

import gptneo_fast
from gptneo_fast.generation import captured as captured_path
from gptneo_fast.generation.captured import capturing, strategy

CONFIG = dict(
    vocab_size=211, hidden_size=32, num_heads=2, num_layers=2, attention_layers=["global", "local"], window_size=8,
    max_position_embeddings=512, bos_token_id=0, eos_token_id=None,
)  # fmt: skip


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = gptneo_fast.GPTNeoForCausalLM(gptneo_fast.GPTNeoConfig(**CONFIG)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.3 + (p.dim() == 1))
    yield model
    model.idle_runners.drop(model.device)


def capture(monkeypatch):
    """Generation takes the captured path wherever the options allow it, as on a CUDA device; a call stands for the graph."""
    monkeypatch.setattr(captured_path, "why_not", lambda model, request: strategy.why_not_on_device(model, request))
    monkeypatch.setattr(capturing, "capture", lambda step, _: capturing.CapturedStep(types.SimpleNamespace(replay=step), None))


@pytest.fixture
def captured(monkeypatch):
    """The captured path for all of a test."""
    capture(monkeypatch)


def ragged(B=3, P=11, vocabulary=211):
    ids = torch.randint(1, vocabulary, (B, P), generator=torch.Generator().manual_seed(B))
    mask = torch.ones_like(ids)
    for row in range(B):
        mask[row, : 2 * row] = 0
    return {"input_ids": ids, "attention_mask": mask}


def both(model, monkeypatch, **options):
    """(stepwise, captured) tokens."""
    stepwise = model.generate(**options)
    assert model.last_generation.path == "stepwise"
    with monkeypatch.context() as patch:
        capture(patch)
        fast = model.generate(**options)
        assert model.last_generation.path == "captured"
    return stepwise, fast


def repeating(model):
    """A prompt whose end occurs before, and a text that goes on so."""
    return torch.tensor([[5, 6, 7, 8, 9, 10, 11, 5, 6, 7, 8, 9, 10, 11, 5, 6, 7]])
