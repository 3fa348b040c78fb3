"""Models of the true shapes with random weights, ours and transformers' with the same ones."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import functools
import tempfile
from typing import Any

import torch

import gptneo_fast
from gptneo_fast.demo import FOLDER

SHAPES = {  # hidden, layers, heads
    "125m": (768, 12, 12),
    "1.3B": (2048, 24, 16),
    "2.7B": (2560, 32, 20),
}
STORIES = {"TinyStories-33M": (768, 4, 16), "TinyStories-1M": (64, 8, 16)}
EMBEDDED = "embedded model"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def config_of(shape: str) -> gptneo_fast.GPTNeoConfig:
    """The configuration of a released size."""
    hidden, layers, heads = (SHAPES | STORIES)[shape]
    return gptneo_fast.GPTNeoConfig(hidden_size=hidden, num_layers=layers, num_heads=heads)


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Random weights in place, wider than fresh ones, so that attention is as peaked as in a trained model."""
    some = next(model.parameters())
    generator = torch.Generator(some.device).manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(generator=generator).mul_(0.04).add_(1 if p.dim() == 1 else 0)


def peer_of(config: gptneo_fast.GPTNeoConfig, dtype: torch.dtype, device: torch.device | str = "cpu") -> Any:
    """transformers' causal model of this configuration on its eager path, random weights, in eval mode.

    Raises:
        ImportError: transformers is not installed.
    """
    import transformers

    values = config.to_dict()
    theirs = transformers.GPTNeoConfig(
        **{k: v for k, v in values.items() if k not in ("model_type", "dtype", "id2label", "label2id")}
    )
    with torch.device(device):
        model = transformers.GPTNeoForCausalLM._from_config(theirs, attn_implementation="eager")
    randomise(model)
    return model.to(dtype).eval()


def ours_of(
    theirs: Any, config: gptneo_fast.GPTNeoConfig, dtype: torch.dtype, device: torch.device | str = "cpu", backend: str = "auto"
) -> gptneo_fast.GPTNeoForCausalLM:
    """Our model with the weights of theirs."""
    with torch.device(device):
        model = gptneo_fast.GPTNeoForCausalLM(config, backend=backend)
    model.to(dtype)
    model.load_state_dict(theirs.state_dict())
    return model.eval()


def loaded(model: gptneo_fast.GPTNeoForCausalLM, **how: Any) -> gptneo_fast.GPTNeoForCausalLM:
    """A model as `load` gives it, where its weights lie in memory included."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return gptneo_fast.load(folder, **how)


@functools.lru_cache(maxsize=2)
def pair(shape: str, dtype: torch.dtype) -> tuple[Any, gptneo_fast.GPTNeoForCausalLM]:
    """(transformers' model on its eager path, ours), with equal weights: random ones, but for the model that is embedded."""
    if shape == EMBEDDED:
        ours = gptneo_fast.GPTNeoForCausalLM.from_pretrained(FOLDER, dtype=dtype)
        return ours.to_transformers().eval(), ours
    config = config_of(shape)
    theirs = peer_of(config, dtype)
    return theirs, loaded(ours_of(theirs, config, dtype), dtype=dtype)
