"""Tokens drawn on the CPU by the extension: torch's, from torch's generator, in a tenth of its time or less."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from ..forks import new_lock
from . import extension

T = TypeVar("T")
_SETTING = new_lock()
_MULTINOMIAL = torch.multinomial


@dataclass(frozen=True)
class Draws:
    """How a token is drawn: of logits / temperature the top_k largest (0: all) and what ties with the last of them; of these
    the likeliest that top_p leaves (1: all), as the warpers of these names do it; and by which generator (None: torch's)."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    generator: torch.Generator | None = None

    @property
    def settings(self) -> tuple[float, int, float]:
        """As ops take them."""
        return self.temperature, min(self.top_k, 2**31), self.top_p


def multinomial(probabilities: Tensor, generator: torch.Generator | None) -> Tensor:
    """`torch.multinomial(probabilities, 1)` of rows [B, V], int64 [B], with the generator where it would be after it (None:
    torch's own)."""
    p = probabilities.detach()
    if p.device.type == "cpu" and p.dtype is torch.float32 and p.is_contiguous() and draws_alike():
        op = torch.ops.gptneo_fast_csrc.multinomial.default
        found: Tensor | None = None
        while found is None:
            found = advanced(generator, lambda state: op(p, state))
        return found
    return torch.multinomial(p, 1, generator=generator).squeeze(1)


def choose(logits: Tensor, how: Draws) -> Tensor | None:
    """Tokens int64 [B] drawn from finite logits [B, V], some of which may be -inf: those that the warpers and
    `torch.multinomial` give. None where the extension does not draw, or where rounding decides, which is torch's to say."""
    x = logits.detach()
    if x.device.type != "cpu" or x.dtype is not torch.float32 or x.stride(1) != 1 or not draws_alike():
        return None
    op = torch.ops.gptneo_fast_csrc.choose.default
    found: Tensor | None = None
    while found is None:
        found = advanced(how.generator, lambda state: op(x, state, *how.settings))
    return found if len(found) else None


def advanced(generator: torch.Generator | None, draw: Callable[[Tensor], T]) -> T | None:
    """What `draw` gives for the state of a generator of the CPU, which it changes, and which becomes the generator's (None:
    torch's own). None where somebody has drawn meanwhile, of another thread, and then nothing is changed."""
    own = torch.default_generator if generator is None else generator
    before = own.get_state()
    after = before.clone()
    found = draw(after)
    with _SETTING:
        if not torch.equal(own.get_state(), before):
            return None
        own.set_state(after)
    return found


def draws_alike() -> bool:
    """Whether the extension draws what this version of torch draws: how, no version promises."""
    own = torch.multinomial is not _MULTINOMIAL  # somebody's in its place, or a mode that may have a say in it
    own = own or torch._C._len_torch_dispatch_stack() > 0
    own = own or any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack())
    return not own and _drew_alike()


@functools.cache
def _drew_alike() -> bool:
    if extension.why_not() is not None:
        return False
    rng = torch.Generator().manual_seed(5)
    p = torch.rand(3, 700, generator=rng).square()
    p[1, 5:] = 0
    p = p / p.sum(1, keepdim=True)
    theirs, ours = rng.clone_state(), rng.get_state()
    try:
        tokens = torch.ops.gptneo_fast_csrc.multinomial(p, ours)
    except RuntimeError:  # a state of another layout
        return False
    expected = torch.multinomial(p, 1, generator=theirs).squeeze(1)
    return torch.equal(tokens, expected) and torch.equal(theirs.get_state(), ours)
