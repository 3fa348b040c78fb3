"""Few rows on the CPU: a run of untouched blocks, with what stands before and after them, as one call of the extension.

A plan names the parameters; whether it still does is asked before each call, by identity: a parameter or a block that was put
in the place of another makes a new plan. Values, addresses and dtypes may change as they like, for the call reads them anew.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from operator import is_
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import cpu
from .cache import KVCache
from .fused import OURS, Kinds
from .masks import Rows
from .touch import Watched, is_readable


@dataclass(frozen=True)
class Span:
    """Blocks [first, end) of a trunk, and what is computed with them.

    embeds: from ids on. norm: ln_f follows. head: lm_head follows that, or None.
    """

    first: int
    end: int
    embeds: bool = False
    norm: bool = False
    head: nn.Linear | None = None


@dataclass(frozen=True)
class Greedy:
    """How several steps go on by themselves, as in `cpu.Plan.greedy`."""

    running: Tensor
    ends: list[int]
    pad: int
    least: int
    steps: int


@dataclass
class _Planned:
    """A plan, and by what it is known to hold."""

    call: cpu.Plan
    blocks: list[nn.Module]
    places: list[tuple[dict[str, Any], str]]  # where each parameter stands
    tensors: list[Tensor]
    norms: list[Any]
    eps: list[float]
    windows: list[int]
    changes: int  # Watched.changes when the places were looked up


_PLANS = 256  # of a trunk, at most; as many spans as a model of twenty blocks has
_plans: weakref.WeakKeyDictionary[nn.Module, dict[Span, _Planned]] = weakref.WeakKeyDictionary()


def takes(op: ModuleType, x: Tensor, cache: KVCache, rows: Rows) -> bool:
    """Whether calls with these inputs are for the extension. x: ids [B, T] or embeddings [B, T, C]."""
    if op is not cpu or not cache.keys or type(x) is not Tensor:
        return False
    if not 0 < x.shape[0] * x.shape[1] <= cpu.ROWS or rows.ends is not None or cache.keys[0].dtype not in cpu.DTYPES:
        return False
    if torch.is_grad_enabled() and (x.requires_grad or any(keys.requires_grad for keys in cache.keys)):
        return False
    return is_readable() and not torch.jit.is_tracing()


@dataclass(frozen=True)
class Few:
    """One pass of a few rows: its trunk, the cache with room for them, which columns are tokens, and the blocks' classes."""

    trunk: Any
    cache: KVCache
    rows: Rows
    kinds: Kinds

    def run(
        self, span: Span, x: Tensor, keep: int, positions: Tensor | None = None, types: Tensor | None = None
    ) -> Tensor | None:
        """Hidden states [B, keep, C] after a span of untouched blocks, or logits float32 [B, keep, V]; None where the
        extension does not take their parameters, and then nothing has been written.

        Args:
            x: ids [B, T] where the span embeds, else hidden states [B, T, C]; appended to the cache, not counted in it.
            keep: columns that are wanted, the last ones.
            positions: [B or 1, T]. types: [B, T] or None.
        """
        planned, keys, values = self._planned(span)
        where = positions.contiguous() if span.embeds and positions is not None else None
        what = types.contiguous() if span.embeds and types is not None else None
        return planned.call(x.contiguous(), where, what, keys, values, self.cache.lengths, self.rows.starts, keep)

    def greedy(self, head: nn.Linear, ids: Tensor, positions: Tensor, how: Greedy) -> Tensor | None:
        """Tokens [B, n] of up to `how.steps` steps of the whole model from ids [B, 1] on, see `cpu.Plan.greedy`; the cache has
        then taken n tokens. None where the extension does not take it, and then nothing has been written."""
        written = self.cache._written
        self.cache.reserve(how.steps)
        planned, keys, values = self._planned(Span(0, len(self.trunk.h), True, True, head))
        args = (how.running, how.ends, how.pad, how.least, how.steps)
        found = planned.call.greedy(ids.contiguous(), positions.contiguous(), keys, values, self.cache.lengths, *args)
        if found is not None:
            self.cache.advance(found.shape[1], None)
            written = max(written, self.cache.get_seq_length())
        self.cache._written = written  # fewer than there was room made for
        return found

    def _planned(self, span: Span) -> tuple[_Planned, list[Tensor], list[Tensor]]:
        """The plan of a span, and its layers' keys and values."""
        known = _plans.setdefault(self.trunk, {})
        planned = known.get(span)
        if planned is None or not self._holds(planned, span):
            if planned is None and len(known) > _PLANS:  # of heads and layers that are gone
                known.clear()
            planned = known[span] = self._plan(span)
        keys, values = self.cache.keys, self.cache.values
        if span.end - span.first != len(keys):
            keys, values = keys[span.first : span.end], values[span.first : span.end]
        return planned, keys, values

    def _holds(self, planned: _Planned, span: Span) -> bool:
        """Whether a plan is still of this trunk's modules and parameters."""
        blocks = list(self.trunk.h._modules.values())[span.first : span.end]
        if len(blocks) != len(planned.blocks) or not all(map(is_, blocks, planned.blocks)):
            return False
        if self.kinds is not OURS or planned.changes != Watched.changes:
            changes = Watched.changes
            norms, places = _places(self.trunk, span)
            if not all(map(is_, norms, planned.norms)) or [self.kinds.window(block) for block in blocks] != planned.windows:
                return False
            planned.places, planned.changes = places, changes
        tensors = [own[name] for own, name in planned.places]
        return all(map(is_, tensors, planned.tensors)) and [norm.eps for norm in planned.norms] == planned.eps

    def _plan(self, span: Span) -> _Planned:
        changes = Watched.changes
        blocks = list(self.trunk.h)[span.first : span.end]
        norms, places = _places(self.trunk, span)
        tensors: list[Tensor] = [own[name] for own, name in places]
        eps, windows = [norm.eps for norm in norms], [self.kinds.window(block) for block in blocks]
        first = 2 if span.embeds else 0
        last = len(tensors) - (2 if span.norm else 0) - (span.head is not None)
        call = cpu.Plan(tensors[:first], tensors[first:last], tensors[last:], windows, eps)
        return _Planned(call, blocks, places, tensors, norms, eps, windows, changes)


def _places(trunk: Any, span: Span) -> tuple[list[Any], list[tuple[dict[str, Any], str]]]:
    """The norms of a span, and where its parameters stand, in the order of `cpu.Plan`."""
    norms: list[Any] = []
    places = [(trunk.wte._parameters, "weight"), (trunk.wpe._parameters, "weight")] if span.embeds else []
    for block in list(trunk.h)[span.first : span.end]:
        attention, mlp = block.attn.attention, block.mlp
        norms += [block.ln_1, block.ln_2]
        for module in (block.ln_1, attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj):
            places.append((module._parameters, "weight"))
            if module is block.ln_1 or module is attention.out_proj:
                places.append((module._parameters, "bias"))
        for module in (block.ln_2, mlp.c_fc, mlp.c_proj):
            places += [(module._parameters, "weight"), (module._parameters, "bias")]
    if span.norm:
        norms.append(trunk.ln_f)
        places += [(trunk.ln_f._parameters, "weight"), (trunk.ln_f._parameters, "bias")]
    if span.head is not None:
        places.append((span.head._parameters, "weight"))
    return norms, places
