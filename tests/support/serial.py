"""What serial generation gives, to hold an engine's results against."""

from __future__ import annotations

import threading

import torch

import gptneo_fast
from tests.support.peers import SMALL


@torch.no_grad()
def lively(dtype=torch.float32, **changes):
    """A small model each of whose greedy tokens depends on all that it sees: a wrong key shows in the text."""
    config = gptneo_fast.GPTNeoConfig(**(SMALL | changes), tie_word_embeddings=False)
    model = gptneo_fast.GPTNeoForCausalLM(config).to(dtype).eval()
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.copy_(torch.randn(p.shape, generator=generator) * 1.5 * p.shape[-1] ** -0.5 if p.dim() == 2 else p)
    model.transformer.wte.weight.mul_(4)
    return model


def serial(model, prompt, **options):
    """New tokens of one prompt by `generate`."""
    return model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()


LENGTHS = [(5, 30), (1, 12), (150, 40), (3, 160), (40, 1), (2, 7), (300, 25), (17, 90)]  # tokens in and out


def ids_of(n, seed=0):
    return torch.randint(3, SMALL["vocab_size"], (n,), generator=torch.Generator().manual_seed(seed + n)).tolist()


def own_forward(model):
    plain = model.forward

    def forward(*args, **keywords):
        out = plain(*args, **keywords)
        out.logits = out.logits.roll(1, -1)
        return out

    model.forward = forward


@torch.no_grad()
def require_same(model, prompt, got, want, error=1e-4):
    """Two greedy continuations are equal, or part where two tokens are as likely as rounding can tell."""
    at = next((i for i, (a, b) in enumerate(zip(got, want, strict=False)) if a != b), None)
    if at is None:
        assert len(got) == len(want), (got, want)
        return
    logits = model(torch.tensor([prompt + want[:at]])).logits[0, -1]
    assert (logits[got[at]] - logits[want[at]]).abs() < error, (at, got, want)


class Gate:
    """A processor that lets a text have so many tokens, prompt included, and the others only once it is opened."""

    def __init__(self, tokens):
        self.tokens, self._opened, self._reached = tokens, threading.Event(), threading.Event()
        self.open = self._opened.set

    def wait(self):
        """Until somebody stands before it."""
        assert self._reached.wait(60)

    def __call__(self, ids, scores):
        if ids.shape[1] > self.tokens:
            self._reached.set()
            assert self._opened.wait(60)
        return scores
