"""Our models beside transformers' with the same weights, small enough for every test."""

from __future__ import annotations

import pytest
import torch

import gptneo_fast

CLASSES = [
    "GPTNeoModel",
    "GPTNeoForCausalLM",
    "GPTNeoForSequenceClassification",
    "GPTNeoForTokenClassification",
    "GPTNeoForQuestionAnswering",
]
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


def demo(kind: str, cls: str = "GPTNeoForCausalLM"):
    """(the embedded model in float32, its tokenizer as transformers knows tokenizers, padding with the end token).

    `kind` is "plain" for transformers' model, "accelerated" for that over our blocks, "converted" for ours that
    `to_transformers` handed over, accelerated, or "ours" for our model as it is.
    """
    transformers = pytest.importorskip("transformers")
    from gptneo_fast.demo import FOLDER
    from gptneo_fast.integrations.transformers import accelerate

    library = gptneo_fast if kind in ("converted", "ours") else transformers
    model = getattr(library, cls).from_pretrained(FOLDER, dtype=torch.float32).eval()
    tokenizer = library.AutoTokenizer.from_pretrained(FOLDER)
    tokenizer.pad_token = tokenizer.eos_token
    if library is gptneo_fast:
        tokenizer = tokenizer.to_transformers()
    if kind == "converted":
        model = model.to_transformers()
    return accelerate(model) if kind in ("accelerated", "converted") else model, tokenizer


def field_names(theirs) -> list[str]:
    """Names of the fields of an output of transformers, as they were before 5.24 renamed one."""
    return ["past_key_values" if name == "cache" else name for name in theirs]
