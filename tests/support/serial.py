"""What serial generation gives, to hold an engine's results against."""

from __future__ import annotations

import torch


def serial(model, prompt, **options):
    """New tokens of one prompt by `generate`."""
    return model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()


@torch.no_grad()
def require_same(model, prompt, got, want, error=1e-4):
    """Two greedy continuations are equal, or part where two tokens are as likely as rounding can tell."""
    at = next((i for i, (a, b) in enumerate(zip(got, want, strict=False)) if a != b), None)
    if at is None:
        assert len(got) == len(want), (got, want)
        return
    logits = model(torch.tensor([prompt + want[:at]])).logits[0, -1]
    assert (logits[got[at]] - logits[want[at]]).abs() < error, (at, got, want)
