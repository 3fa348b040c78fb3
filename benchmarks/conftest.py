"""Models of the true shapes with random weights, ours and transformers' with the same ones."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import functools

import pytest
import torch

import gptneo_fast

SHAPES = {  # hidden, layers, heads
    "125m": (768, 12, 12),
    "1.3B": (2048, 24, 16),
    "2.7B": (2560, 32, 20),
}


def config_of(shape: str) -> gptneo_fast.GPTNeoConfig:
    """The configuration of a released size."""
    hidden, layers, heads = SHAPES[shape]
    return gptneo_fast.GPTNeoConfig(hidden_size=hidden, num_layers=layers, num_heads=heads)


@functools.lru_cache(maxsize=2)
def pair(shape: str, dtype: torch.dtype):
    """(transformers' model on its eager path, ours), equal random weights widened so that attention is peaked."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    values = config_of(shape).to_dict()
    config = transformers.GPTNeoConfig(
        **{k: v for k, v in values.items() if k not in ("model_type", "dtype", "id2label", "label2id")}
    )
    theirs = transformers.GPTNeoForCausalLM._from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn_like(p) * 0.04 + (1 if p.dim() == 1 else 0))
    ours = gptneo_fast.GPTNeoForCausalLM(config_of(shape))
    ours.load_state_dict(theirs.state_dict())
    return theirs.to(dtype).eval(), ours.to(dtype).eval()
