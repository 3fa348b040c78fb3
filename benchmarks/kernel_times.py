"""Stage 3: time of each op at the shapes of the models, its share of the measured ceiling, and torch's own op beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import costs
from benchmarks.stage import Case, LeftOut, Setting
from benchmarks.timing import per_call, rotating
from gptneo_fast.network.cache import ring_slots

PREFILL = 2048
Call = Callable[[], Any]


@dataclass(frozen=True)
class Work:
    """One op at one shape.

    op: name. what: the shape, for people. cost: of one call. make: fresh random arguments, as (our call, torch's call);
    torch's is None where it has no such op.
    """

    op: str
    what: str
    cost: costs.Cost
    make: Callable[[Any], tuple[Call, Call | None]]


def cases(setting: Setting) -> Iterator[Case]:
    """A case for each op and shape; the middle model has every batch, and first place."""
    from gptneo_fast import kernels

    for shape in sorted(setting.shapes, key=lambda name: name != "1.3B"):
        batches = (1, 8, 64) if setting.mode == "full" or shape == "1.3B" else (1,)
        contexts = (128, 1024, 2048) if setting.mode == "full" else (128, 2048)
        for work in Shapes(setting, shape).all(batches, contexts):
            yield Case(f"{shape} {work.op}, {work.what}", lambda work=work: measure(setting, kernels, work), 3)


def measure(setting: Setting, kernels: Any, work: Work) -> dict[str, Any]:
    """Microseconds of ours and of torch's, GB/s or TFLOP/s, and share of the ceiling."""
    if not hasattr(kernels, work.op):
        raise LeftOut("this version has no kernel for it")
    cost = work.cost
    moved = cost.bytes + cost.activations
    sets = rotating(lambda: work.make(kernels), moved, setting.tiny)
    ours = per_call([ours for ours, _ in sets], setting.device)
    theirs = [call for _, call in sets if call is not None]
    floor = max(moved / setting.bandwidth, cost.flops / setting.rate)
    row = {
        "us": ours.seconds * 1e6,
        "how": ours.how,
        "GB/s": moved / ours.seconds / 1e9,
        "TFLOP/s": cost.flops / ours.seconds / 1e12,
        "bound": "memory" if moved / setting.bandwidth > cost.flops / setting.rate else "arithmetic",
        "share of ceiling": floor / ours.seconds,
    }
    if theirs:
        seconds = per_call(theirs, setting.device).seconds
        row |= {"torch us": seconds * 1e6, "times torch": seconds / ours.seconds}
    return row


class Shapes:
    """Random arguments of the ops of one model."""

    def __init__(self, setting: Setting, shape: str) -> None:
        self.setting, self.config = setting, setting.config(shape)
        self.C, self.F, self.eps = self.config.hidden_size, self.config.ffn_size, self.config.layer_norm_epsilon
        self.H, self.D = self.config.num_heads, self.config.head_dim
        self.prefill = setting.length(PREFILL)

    def randn(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, device=self.setting.device, dtype=self.setting.dtype) * scale

    def heads(self, B: int, T: int) -> Tensor:
        return self.randn(B, T, self.C).unflatten(-1, (self.H, self.D)).transpose(1, 2)

    def lengths(self, B: int, held: int) -> Tensor:
        return torch.full((B,), held, device=self.setting.device, dtype=torch.int32)

    def cost(self, B: int, T: int) -> costs.Shape:
        return costs.Shape(self.config, B, T, self.setting.dtype.itemsize, vocabulary_tile=1)

    def all(self, batches: Sequence[int], contexts: Sequence[int]) -> Iterator[Work]:
        """Decode ops by batch and context, then the ops of a prefill."""
        for B in batches:
            yield from self.linears(B, 1, "norm_qkv_append")
            yield self.head(B)
            for context in contexts:
                for layer in (0, 1):
                    yield self.decode_attention(B, self.setting.length(context), layer)
        yield from self.linears(1, self.prefill, "norm_qkv")
        yield self.layer_norm(2 * self.prefill)
        for layer in (0, 1):
            yield self.attention(self.prefill, layer)
        for B, T in ((1, self.prefill), *((B, 1) for B in batches)):
            yield self.kv_append(B, T)

    def linears(self, B: int, T: int, qkv: str) -> Iterator[Work]:
        """The four products with weights of one layer."""
        cost, what = self.cost(B, T), f"{B}x{T}"
        yield Work(qkv, what, cost.norm_qkv(qkv), lambda kernels: self._qkv(kernels, B, T, qkv))
        yield Work("linear_add", f"out_proj {what}", cost.linear_add(self.C), lambda k: self._add(k, B, T, self.C))
        yield Work("norm_linear", f"c_fc + gelu {what}", cost.norm_linear(), lambda k: self._fc(k, B, T))
        yield Work("linear_add", f"c_proj {what}", cost.linear_add(self.F), lambda k: self._add(k, B, T, self.F))

    def _norm(self) -> tuple[Tensor, Tensor]:
        return self.randn(self.C) + 1, self.randn(self.C)

    def _qkv(self, kernels: Any, B: int, T: int, op: str) -> tuple[Call, Call]:
        x, norm = self.randn(B, T, self.C), self._norm()
        weights = [self.randn(self.C, self.C, scale=self.C**-0.5) for _ in range(3)]
        whole, args = torch.cat(weights), (x, *norm, *weights, self.eps)
        if op == "norm_qkv_append":
            slots = self.setting.length(512)
            caches = (self.randn(B, self.H, slots, self.D), self.randn(B, self.H, slots, self.D))
            args = (*args, *caches, self.lengths(B, 100 % slots))
        launcher = getattr(kernels, op)
        return lambda: launcher(*args), lambda: F.linear(F.layer_norm(x, (self.C,), *norm, self.eps), whole)

    def _fc(self, kernels: Any, B: int, T: int) -> tuple[Call, Call]:
        x, norm = self.randn(B, T, self.C), self._norm()
        weight, bias = self.randn(self.F, self.C, scale=self.C**-0.5), self.randn(self.F)

        def plain() -> Tensor:
            return F.gelu(F.linear(F.layer_norm(x, (self.C,), *norm, self.eps), weight, bias), approximate="tanh")

        return lambda: kernels.norm_linear(x, *norm, weight, bias, self.eps, True), plain

    def _add(self, kernels: Any, B: int, T: int, K: int) -> tuple[Call, Call]:
        x, residual = self.randn(B, T, K), self.randn(B, T, self.C)
        weight, bias = self.randn(self.C, K, scale=K**-0.5), self.randn(self.C)
        return lambda: kernels.linear_add(x, weight, bias, residual), lambda: residual + F.linear(x, weight, bias)

    def head(self, B: int) -> Work:
        """ln_f and the logits of one position a row."""

        def make(kernels: Any) -> tuple[Call, Call]:
            x, norm, weight = self.randn(B, 1, self.C), self._norm(), self.randn(self.config.vocab_size, self.C, scale=0.02)
            plain = lambda: F.linear(F.layer_norm(x, (self.C,), *norm, self.eps), weight)  # noqa: E731
            return lambda: kernels.lm_head(x, *norm, weight, self.eps), plain

        return Work("lm_head", f"{B} rows", self.cost(B, 1).head(B), make)

    def layer_norm(self, rows: int) -> Work:
        """Many rows: bound by memory."""

        def make(kernels: Any) -> tuple[Call, Call]:
            x, norm = self.randn(rows, self.C), self._norm()
            return lambda: kernels.layer_norm(x, *norm, self.eps), lambda: F.layer_norm(x, (self.C,), *norm, self.eps)

        return Work("layer_norm", f"{rows} rows", self.cost(1, rows).layer_norm(), make)

    def attention(self, T: int, layer: int) -> Work:
        """A prompt attending to itself; torch's beside it is SDPA with a causal mask, windowless in both layers."""
        window = self.config.window(layer)

        def make(kernels: Any) -> tuple[Call, Call]:
            q, k, v = self.heads(1, T) * 0.1, self.heads(1, T), self.heads(1, T)
            plain = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)  # noqa: E731
            return lambda: kernels.attention(q, k, v, window), plain

        return Work("attention", f"{'local' if window else 'global'} 1x{T}", self.cost(1, T).attention(layer, 0), make)

    def decode_attention(self, B: int, context: int, layer: int) -> Work:
        """One token a row over its cache; torch's beside it is SDPA over the same keys."""
        window = self.config.window(layer)
        slots = min(context, ring_slots(self.config, layer))

        def make(kernels: Any) -> tuple[Call, Call]:
            q, k, v = self.heads(B, 1) * 0.1, self.randn(B, self.H, slots, self.D), self.randn(B, self.H, slots, self.D)
            lengths, seen = self.lengths(B, context - 1), min(context, window or context)
            plain = lambda: F.scaled_dot_product_attention(q, k[:, :, :seen], v[:, :, :seen], scale=1.0)  # noqa: E731
            return lambda: kernels.decode_attention(q, k, v, lengths, window), plain

        cost = self.cost(B, 1).decode_attention(layer, context - 1)
        return Work("decode_attention", f"{'local' if window else 'global'} batch {B}, context {context}", cost, make)

    def kv_append(self, B: int, T: int) -> Work:
        """New keys and values into the slots of a global layer; torch's beside it is two plain copies."""

        def make(kernels: Any) -> tuple[Call, Call]:
            k, v = self.heads(B, T), self.heads(B, T)
            caches = [self.randn(B, self.H, self.setting.length(2048), self.D) for _ in range(2)]
            lengths = self.lengths(B, 0)
            targets = [c[:, :, :T] for c in caches]
            plain = lambda: (targets[0].copy_(k), targets[1].copy_(v))  # noqa: E731
            return lambda: kernels.kv_append(*caches, k, v, lengths), plain

        return Work("kv_append", f"{B}x{T}", self.cost(B, T).kv_append(0), make)
