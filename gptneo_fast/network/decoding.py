"""Few rows on the CPU: a run of untouched blocks, with what stands before and after them, as one call of the extension.

A plan names the parameters. Before each call it is compared, by identity, with what stands in the modules then, so that what
was put in the place of another makes a new plan. Values, addresses and dtypes may change as they like: a call reads them anew.
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
from ..ops.drawing import Draws
from .cache import KVCache
from .fused import Kinds
from .masks import Rows
from .touch import is_readable


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
class Several:
    """How several steps go on by themselves, as in `cpu.Plan.several`."""

    running: Tensor
    ends: list[int]
    pad: int
    least: int
    steps: int
    draws: Draws | None = None


@dataclass
class _Planned:
    """A plan, and what it was made of."""

    call: cpu.Plan
    tensors: list[Tensor]
    scales: list[Tensor]
    eps: list[float]
    windows: list[int]


_PLANS = 256  # of a trunk, at most; as many spans as a model of twenty blocks has
_plans: weakref.WeakKeyDictionary[nn.Module, dict[Span, _Planned]] = weakref.WeakKeyDictionary()


def takes(op: ModuleType, x: Tensor, cache: KVCache, rows: Rows) -> bool:
    """Whether calls with these inputs are for the extension. x: ids [B, T] or embeddings [B, T, C]."""
    if op is not cpu or not cache.keys or type(x) is not Tensor:
        return False
    if not 0 < x.shape[0] * x.shape[1] <= cpu.ROWS.get(cache.keys[0].dtype, 0) or rows.ends is not None:
        return False
    if torch.is_grad_enabled() and (x.requires_grad or any(keys.requires_grad for keys in cache.keys)):
        return False
    return is_readable() and not torch.jit.is_tracing()


def forget(trunk: nn.Module) -> None:
    """Let go of a trunk's parameters, which its plans hold."""
    _plans.pop(trunk, None)


def _weight(module: nn.Module, scales: list[Any]) -> Any:
    """A layer's weight; of one in few bits the integers, and then its scales go to the others."""
    own = module._parameters.get("weight")
    if own is not None:
        return own
    packed: Any = module._modules["weight"]
    values, of_values = packed.side_by_side()
    scales.append(of_values)
    return values


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

    def several(self, head: nn.Linear, ids: Tensor, positions: Tensor, how: Several) -> Tensor | None:
        """Tokens [B, n] of up to `how.steps` steps of the whole model from ids [B, 1] on, see `cpu.Plan.several`; the cache has
        then taken n tokens. None where the extension does not take it, and then nothing has been written."""
        written = self.cache._written
        self.cache.reserve(how.steps)
        planned, keys, values = self._planned(Span(0, len(self.trunk.h), True, True, head))
        args = (how.running, how.ends, how.pad, how.least, how.steps, how.draws)
        found = planned.call.several(ids.contiguous(), positions.contiguous(), keys, values, self.cache.lengths, *args)
        if found is not None:
            self.cache.advance(found.shape[1], None)
            written = max(written, self.cache.get_seq_length())
        self.cache._written = written  # fewer than there was room made for
        return found

    def _planned(self, span: Span) -> tuple[_Planned, list[Tensor], list[Tensor]]:
        """The plan of a span, and its layers' keys and values."""
        known = _plans.setdefault(self.trunk, {})
        planned, (tensors, scales, eps, windows) = known.get(span), self._parameters(span)
        if planned is None or not (
            (len(tensors), len(scales)) == (len(planned.tensors), len(planned.scales))
            and all(map(is_, tensors, planned.tensors))
            and all(map(is_, scales, planned.scales))
            and (eps, windows) == (planned.eps, planned.windows)
        ):
            if planned is None and len(known) >= _PLANS:  # of heads and layers that are gone
                known.clear()
            first = 2 if span.embeds else 0
            last = len(tensors) - (2 if span.norm else 0) - (span.head is not None)
            call = cpu.Plan(tensors[:first], tensors[first:last], tensors[last:], scales, windows, eps)
            planned = known[span] = _Planned(call, tensors, scales, eps, windows)
        keys, values = self.cache.keys, self.cache.values
        if span.end - span.first != len(keys):
            keys, values = keys[span.first : span.end], values[span.first : span.end]
        return planned, keys, values

    def _parameters(self, span: Span) -> tuple[list[Any], list[Any], list[float], list[int]]:
        """What stands in the modules now, in the order of `cpu.Plan`: parameters, scales, epsilons, windows. It is asked at
        every call, on cold caches: dictionaries, and no attributes of modules."""
        trunk = self.trunk._modules
        tensors: list[Any] = []
        scales: list[Any] = []
        eps: list[float] = []
        windows: list[int] = []
        if span.embeds:
            tensors += [_weight(trunk["wte"], scales), trunk["wpe"]._parameters["weight"]]
        for block in list(trunk["h"]._modules.values())[span.first : span.end]:
            own = block._modules
            ln_1, ln_2, mlp = own["ln_1"], own["ln_2"], own["mlp"]._modules
            attention = own["attn"]._modules["attention"]._modules
            tensors += [ln_1._parameters["weight"], ln_1._parameters["bias"]]
            tensors += [_weight(attention[name], scales) for name in ("q_proj", "k_proj", "v_proj")]
            for module in (attention["out_proj"], ln_2, mlp["c_fc"], mlp["c_proj"]):
                tensors += [_weight(module, scales), module._parameters["bias"]]
            eps += [ln_1.eps, ln_2.eps]
            windows.append(self.kinds.window(block))
        if span.norm:
            norm = trunk["ln_f"]
            tensors += [norm._parameters["weight"], norm._parameters["bias"]]
            eps.append(norm.eps)
        if span.head is not None:
            tensors.append(_weight(span.head, scales))
        return tensors, scales, eps, windows
