"""Prompts for generation: one, a batch, and one padded on the left."""

import torch

V = 97
PROMPTS = ["one", "batch", "padded"]


def prompt(kind, T=11):
    ids = torch.randint(3, V, (1 if kind == "one" else 3, T), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    if kind == "padded":
        mask[0, :4], mask[2, :9] = 0, 0
        ids = ids.masked_fill(mask == 0, 0)
    return {"input_ids": ids, "attention_mask": mask}
