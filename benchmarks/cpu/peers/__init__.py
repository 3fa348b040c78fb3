"""Other runtimes on the weights of a transformers model; who enters offers what `Peer` says and computes the same tokens."""

from __future__ import annotations

from typing import ClassVar, Protocol

import torch
from torch import Tensor


class Peer(Protocol):
    """A runtime that decodes one row of token ids greedily.

    bits: 8 or 4 for its weights, which it rounds from float32 in its own way; None for those of the model.

    name: what stands in tables; it says where a peer leaves something of GPT-Neo out.
    coarse: the dtype in which it computes something whatever the model's dtype is; float32 where that is nothing.
    """

    name: ClassVar[str]
    coarse: ClassVar[torch.dtype]

    def __init__(self, model: torch.nn.Module, threads: int, bits: int | None = None) -> None: ...

    # model: transformers' GPTNeoForCausalLM, on the CPU

    @staticmethod
    def why_not(dtype: torch.dtype, bits: int | None = None) -> str:
        """Why it cannot run here in this dtype, or with weights of as many bits, or nothing."""
        ...

    def decode(self, ids: Tensor, new: int) -> Tensor:
        """ids int64 [1, T] and `new` greedy tokens after them, of which none is the end token: int64 [1, T + new]."""
        ...


def peers() -> list[type[Peer]]:
    """All that are known, the ones that cannot run here included."""
    from .as_gpt2 import CTranslate2, LlamaCpp
    from .compiled import Compiled
    from .exported import OnnxRuntime, OpenVino

    return [Compiled, OnnxRuntime, OpenVino, CTranslate2, LlamaCpp]


def missing(*modules: str) -> str:
    """Which of these modules cannot be imported and why, or nothing."""
    from importlib import import_module

    for module in modules:
        try:
            import_module(module)
        except Exception as error:  # a broken build raises whatever it likes
            return f"{module} cannot be imported ({type(error).__name__}: {error}); `make peers` installs it"
    return ""


def likeliest(logits: Tensor, end: int | None) -> int:
    """The token of the largest of logits [V], the end token left out."""
    if end is not None:
        logits[end] = -torch.inf
    return int(logits.argmax())
