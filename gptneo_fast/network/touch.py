"""What a user did to the modules, and whether the fused ops may stand for them.

A block is untouched while each of its modules is exactly of the class that we made, without hooks, without a `forward` of its
own, with plain parameters of one dtype and no dropout at work. Only then the ops that read its parameters compute what its
modules would; else the modules are called one by one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.hooks import RemovableHandle

PLAIN = frozenset([nn.Parameter, FakeTensor])  # what a weight may be; a fake one stands for a parameter


class Watched(nn.Module):
    """A module whose attributes are counted when they are set: a replaced layer, a patched forward, a change of mode."""

    changes: ClassVar[int] = 0  # to all such modules

    def __setattr__(self, name: str, value: Any) -> None:
        Watched.changes += 1
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        Watched.changes += 1
        super().__delattr__(name)


@dataclass(frozen=True)
class Look:
    """What was found untouched. blocks: one entry a block; embeddings: wte, wpe and drop; norm: ln_f.

    head: lm_head. forward: the model's and the trunk's own, which steps of generation go around. prepare:
    `prepare_inputs_for_generation`, which they go around, too.
    """

    blocks: tuple[bool, ...]
    embeddings: bool
    norm: bool
    head: bool = True
    forward: bool = True
    prepare: bool = True

    def __bool__(self) -> bool:
        return self.embeddings and self.norm and self.head and self.forward and self.prepare and all(self.blocks)


_methods: dict[tuple[type, str], Any] = {}  # (class, name): what it was when it was imported


def ours(*kinds: type[nn.Module], methods: tuple[str, ...] = ("forward",)) -> None:
    """From now on a patch of one of these methods, for all modules of a class, counts as a touch."""
    _methods.update({(kind, name): vars(kind)[name] for kind in kinds for name in methods})


ours(nn.Linear, nn.LayerNorm, nn.Dropout, nn.Embedding)
ours(nn.Module, methods=("__call__", "__getattr__"))  # tracers patch them


_FUNCTIONS = {name: getattr(F, name) for name in ("linear", "layer_norm", "embedding", "softmax", "dropout")}  # of modules


def patched(*kinds: type[nn.Module]) -> bool:
    """Whether a method that `ours` was told of is another now: of these classes, or where none is given of any; or, where none
    is given, a function of torch that modules call."""
    if not kinds and any(getattr(F, name) is not function for name, function in _FUNCTIONS.items()):
        return True
    changed = [kind for (kind, name), method in _methods.items() if kind.__dict__[name] is not method]
    return bool(changed) and (not kinds or any(kind in kinds for kind in changed))


Stamp = tuple[int, int, bool]


def stamp() -> Stamp:
    """What a new hook, a replaced layer or a patched method changes: while it stands, so does a look."""
    return RemovableHandle.next_id, Watched.changes, patched()


def observed(device: torch.device) -> bool:
    """Whether something watches or changes every module or operation of this call: autocast, forward-mode AD, vmap, FLOP
    counters, hooks on all modules, patched classes."""
    if torch.is_autocast_enabled(device.type) or _has_any_global_hook() or patched():
        return True
    if torch.compiler.is_compiling():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0:
        return True
    if not torch._C._len_torch_dispatch_stack():
        return False
    return any(type(mode).__module__ == "torch.utils.flop_counter" for mode in _get_current_dispatch_mode_stack())


def is_readable() -> bool:
    """Whether the values of tensors may be looked at: not while they are traced, nor under vmap and the like."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is None


def has_own(module: nn.Module, kind: type[nn.Module], method: str) -> bool:
    """Whether a method of a module is the one that `kind`, known to `ours`, was made with."""
    return getattr(type(module), method) is _methods[kind, method] and method not in vars(module)


def own_forward(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling a module runs the `forward` that `kind` was made with and nothing else."""
    own = vars(module)
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
        return False
    return has_own(module, kind, "forward") and type(module).__call__ is _methods[nn.Module, "__call__"]


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is exactly of this class, without hooks, with plain parameters, each in one piece."""
    if type(module) is not kind or not own_forward(module, kind):
        return False
    return all(p is None or (type(p) in PLAIN and p.is_contiguous()) for p in module._parameters.values())


def is_plain_embedding(module: nn.Module) -> bool:
    """Whether looking rows up is all that an embedding does."""
    return is_plain(module, nn.Embedding) and cast(nn.Embedding, module).max_norm is None


def is_plain_norm(module: nn.Module) -> bool:
    """Whether a module is a LayerNorm over one axis, with weight and bias."""
    return is_plain(module, nn.LayerNorm) and None not in module._parameters.values() and len(module.normalized_shape) == 1  # type: ignore[arg-type]


def is_idle_dropout(module: nn.Module) -> bool:
    """Whether a module is a dropout that drops nothing now."""
    return is_plain(module, nn.Dropout) and not (module.training and cast(nn.Dropout, module).p > 0)
