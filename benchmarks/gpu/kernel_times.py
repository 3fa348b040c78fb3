"""Every op at the shapes of the models: first held against float64, then timed, its floor and torch's own op beside it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu import predictions
from benchmarks.gpu.stage import Case, Setting
from benchmarks.gpu.timing import per_call, rotating
from benchmarks.static import costs
from gptneo_fast import kernels
from gptneo_fast.network.cache import ring_slots
from gptneo_fast.ops import ops, testing
from gptneo_fast.ops.constants import ALL, FEW, FREE, GREEDY, LOGITS_ALIGN
from gptneo_fast.ops.testing import Sample

PREFILL = 2048
DRAWN = 64  # tokens that a row of `sample` may draw while it is timed
METHODS = {"greedy": GREEDY, "temperature": FREE, "top_k 50": FEW, "top_p 0.9": ALL}
Args = tuple[Any, ...]
Call = Callable[[], Any]


@dataclass(frozen=True)
class Work:
    """One op at one shape.

    op: name. what: the shape, for people. cost: of one call. make: fresh random arguments, by the number of their set.
    plain: of arguments, a call of torch's own op on them; None where it has no such op.
    mutates: places of the arguments that the op changes. called: whether as the model calls it, through `ops`.
    """

    op: str
    what: str
    cost: costs.Cost
    make: Callable[[int], Args]
    plain: Callable[..., Call] | None = None
    mutates: tuple[int, ...] = ()
    called: bool = False

    @property
    def name(self) -> str:
        """For people; predictions go by it."""
        return f"{self.op}, {self.what}"

    @property
    def moved(self) -> int:
        """Bytes that one call alone reads and writes, activations included: nothing is in a cache before it."""
        return self.cost.bytes + self.cost.activations

    def function(self) -> Callable[..., Any]:
        """What computes it: the Triton kernel's launcher, or what the model calls."""
        return getattr(ops if self.called else kernels, self.op)


def exact_cases(setting: Setting) -> Iterator[Case]:
    """Each op of the first model at the shapes that are timed, against float64."""
    shape = setting.shapes[0]
    for work in Shapes(setting, shape).all():
        yield Case(f"{shape} {work.name}", lambda work=work: exact(work), 3)


def time_cases(setting: Setting, shapes: list[str]) -> Iterator[Case]:
    """The times of the same."""
    for shape in shapes:
        for work in Shapes(setting, shape).all():
            yield Case(f"{shape} {work.name}", lambda shape=shape, work=work: measure(setting, shape, work), 2)


@torch.no_grad()
def exact(work: Work) -> dict[str, float]:
    """The error of a first result as a share of what it may be.

    Raises:
        AssertionError: it is more.
    """
    sample = Sample(work.what, work.make(0), work.mutates)
    share, fault = testing.share_of_budget(work.op, work.function(), sample)
    if share > 1:
        raise AssertionError(fault)
    return {"error over budget": share}


@torch.no_grad()
def measure(setting: Setting, shape: str, work: Work) -> dict[str, Any]:
    """The error, then microseconds of ours and of torch's, GB/s or TFLOP/s, floor, share of it, what was predicted."""
    row: dict[str, Any] = exact(work) | {"predicted us": predictions.kernel_us(shape, work.name)}
    function = work.function()
    sets = rotating(work.make, work.moved, setting.tiny)
    ours = per_call([functools.partial(function, *args) for args in sets], setting.device)
    by_memory, by_arithmetic = work.moved / setting.bandwidth, work.cost.flops / setting.rate
    floor = max(by_memory, by_arithmetic)
    row |= {
        "us": ours.seconds * 1e6,
        "how": ours.how,
        "sets": len(sets),
        "GB/s": work.moved / ours.seconds / 1e9,
        "TFLOP/s": work.cost.flops / ours.seconds / 1e12,
        "bound": "memory" if by_memory > by_arithmetic else "arithmetic",
        "floor us": floor * 1e6,
        "share of floor": floor / ours.seconds,
    }
    if work.plain is not None:
        seconds = per_call([work.plain(*args) for args in sets], setting.device).seconds
        row |= {"torch us": seconds * 1e6, "times torch": seconds / ours.seconds}
    return row


class Shapes:
    """The work of one model, its arguments random."""

    def __init__(self, setting: Setting, shape: str) -> None:
        self.setting, self.shape, self.config = setting, shape, setting.config(shape)
        self.C, self.F, self.eps = self.config.hidden_size, self.config.ffn_size, self.config.layer_norm_epsilon
        self.H, self.D, self.V = self.config.num_heads, self.config.head_dim, self.config.vocab_size
        self.prompt = setting.length(PREFILL)
        self.layers = {kind: self.config.attention_layers.index(kind) for kind in ("global", "local")}

    def all(self) -> Iterator[Work]:
        """Decode ops by batch and context, then those of a prompt."""
        seen = set()
        for batch, context in self.setting.points:
            if batch not in seen:
                seen.add(batch)
                yield from self.linears("norm_qkv_append", batch, 1)
                yield self.head(batch)
                yield self.sample(batch, "greedy")
            for kind in self.layers:
                yield self.decode_attention(batch, context, kind)
        for method in list(METHODS)[1:]:
            yield self.sample(1, method)
        yield from self.linears("norm_qkv", 1, self.prompt)
        yield self.layer_norm(2 * self.prompt)
        yield self.logprob(self.setting.batch(512))
        for kind in self.layers:
            yield self.attention(kind)
        for called in (True, False):
            for B, T in ((1, self.prompt), (1, 1), (64, 1)):
                yield self.kv_append(B, T, called)

    def linears(self, qkv: str, B: int, T: int) -> Iterator[Work]:
        """The four products with weights of one layer."""
        rows, what = self.setting.batch(B), f"{B}x{T}"
        cost = self.cost(rows, T)
        cached = qkv == "norm_qkv_append"
        make = functools.partial(self._qkv, rows, T, cached)
        yield Work(qkv, what, cost.norm_qkv(qkv), make, self._plain_qkv, mutates=(7, 8) if cached else ())
        for name, K in (("out_proj", self.C), ("c_proj", self.F)):
            make = functools.partial(self._add, rows, T, K)
            yield Work("linear_add", f"{name} {what}", cost.linear_add(K), make, self._plain_add)
        yield Work("norm_linear", f"c_fc {what}", cost.norm_linear(), lambda _: self._fc(rows, T), self._plain_fc)

    def randn(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, device=self.setting.device, dtype=self.setting.dtype) * scale

    def heads(self, B: int, T: int) -> Tensor:
        return self.randn(B, T, self.C).unflatten(-1, (self.H, self.D)).transpose(1, 2)

    def lengths(self, B: int, held: int) -> Tensor:
        return torch.full((B,), held, device=self.setting.device, dtype=torch.int32)

    def cost(self, B: int, T: int) -> costs.Shape:
        return costs.Shape(self.config, B, T, self.setting.dtype.itemsize, vocabulary_tile=1)

    def _norm(self) -> tuple[Tensor, Tensor]:
        return self.randn(self.C, scale=0.1) + 1, self.randn(self.C, scale=0.1)

    def _qkv(self, B: int, T: int, cached: bool, _: int) -> Args:
        weights = [self.randn(self.C, self.C, scale=self.C**-0.5) for _ in range(3)]
        args = (self.randn(B, T, self.C), *self._norm(), *weights, self.eps)
        slots = self.setting.length(512)
        caches = (self.randn(B, self.H, slots, self.D) for _ in range(2))
        return (*args, *caches, self.lengths(B, 100 % slots)) if cached else args

    def _plain_qkv(self, x: Tensor, gamma: Tensor, beta: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Call:
        whole = torch.cat([q, k, v])
        return lambda: F.linear(F.layer_norm(x, (self.C,), gamma, beta, self.eps), whole)

    def _fc(self, B: int, T: int) -> Args:
        weight, bias = self.randn(self.F, self.C, scale=self.C**-0.5), self.randn(self.F)
        return (self.randn(B, T, self.C), *self._norm(), weight, bias, self.eps, True)

    def _plain_fc(self, x: Tensor, gamma: Tensor, beta: Tensor, w: Tensor, b: Tensor, *_: Any) -> Call:
        return lambda: F.gelu(F.linear(F.layer_norm(x, (self.C,), gamma, beta, self.eps), w, b), approximate="tanh")

    def _add(self, B: int, T: int, K: int, _: int) -> Args:
        return self.randn(B, T, K), self.randn(self.C, K, scale=K**-0.5), self.randn(self.C), self.randn(B, T, self.C)

    def _plain_add(self, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Call:
        return lambda: residual + F.linear(x, weight, bias)

    def head(self, B: int) -> Work:
        """ln_f and the logits of one position a row."""
        rows = self.setting.batch(B)

        def make(_: int) -> Args:
            return self.randn(rows, 1, self.C), *self._norm(), self.randn(self.V, self.C, scale=0.02), self.eps

        def plain(x: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor, eps: float) -> Call:
            return lambda: F.linear(F.layer_norm(x, (self.C,), gamma, beta, eps), weight)

        return Work("lm_head", f"{B} rows", self.cost(rows, 1).head(rows), make, plain)

    def sample(self, B: int, method: str) -> Work:
        """The next token of each row, drawn anew with each call; torch's beside it is an argmax."""
        rows, top_k, top_p = self.setting.batch(B), 50 if method == "top_k 50" else 0, 0.9 if method == "top_p 0.9" else 1.0
        new = dict(device=self.setting.device)

        def make(_: int) -> Args:
            logits = torch.randn(rows, self.V + -self.V % LOGITS_ALIGN, **new)[:, : self.V]
            rates, counts = torch.tensor([1.0, top_p, 0.0, 1.0], **new), torch.tensor([top_k, 0, DRAWN]).int().to(**new)
            flags, seeds = torch.zeros(self.V, dtype=torch.uint8, **new), torch.arange(rows, **new)
            state = torch.zeros(5, rows, dtype=torch.int64, **new)
            out = torch.zeros(DRAWN, rows, dtype=torch.int32, **new).t()
            return logits, rates, counts, flags, seeds, None, state, out, self.lengths(rows, 0), METHODS[method]

        plain = (lambda logits, *_: lambda: logits.argmax(-1)) if method == "greedy" else None
        return Work("sample", f"{method} {B} rows", self.cost(rows, 1).sample(), make, plain, mutates=(6, 7, 8))

    def layer_norm(self, rows: int) -> Work:
        """Many rows: bound by memory."""

        def plain(x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Call:
            return lambda: F.layer_norm(x, (self.C,), gamma, beta, eps)

        cost = self.cost(1, rows).layer_norm()
        return Work("layer_norm", f"{rows} rows", cost, lambda _: (self.randn(rows, self.C), *self._norm(), self.eps), plain)

    def logprob(self, rows: int) -> Work:
        """What the distributions say of one token each; torch's beside it makes the logits and takes their loss."""

        def make(_: int) -> Args:
            weight = self.randn(self.V, self.C, scale=self.C**-0.5)
            return self.randn(rows, self.C), weight, torch.randint(self.V, (rows,), device=self.setting.device)

        def plain(x: Tensor, weight: Tensor, targets: Tensor) -> Call:
            return lambda: F.cross_entropy(F.linear(x, weight).float(), targets, reduction="none")

        return Work("logprob", f"{rows} rows", self.cost(1, rows).head(rows, op="logprob", stored=False), make, plain)

    def attention(self, kind: str) -> Work:
        """A prompt attending to itself; torch's beside it is SDPA with a causal mask, windowless in both layers."""
        T, layer = self.prompt, self.layers[kind]

        def make(_: int) -> Args:
            return self.heads(1, T) * 0.1, self.heads(1, T), self.heads(1, T), self.config.window(layer)

        def plain(q: Tensor, k: Tensor, v: Tensor, window: int) -> Call:
            return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)

        return Work("attention", f"{kind} 1x{T}", self.cost(1, T).attention(layer, 0), make, plain)

    def decode_attention(self, B: int, context: int, kind: str) -> Work:
        """One token a row over its cache; torch's beside it is SDPA over the same keys."""
        rows, held, layer = self.setting.batch(B), self.setting.length(context), self.layers[kind]
        slots, window = min(held, ring_slots(self.config, self.config.window(layer))), self.config.window(layer)

        def make(_: int) -> Args:
            q, (k, v) = self.heads(rows, 1) * 0.1, (self.randn(rows, self.H, slots, self.D) for _ in range(2))
            return q, k, v, self.lengths(rows, held - 1), window

        def plain(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Call:
            seen = min(held, window or held)
            return lambda: F.scaled_dot_product_attention(q, k[:, :, :seen], v[:, :, :seen], scale=1.0)

        cost = self.cost(rows, 1).decode_attention(layer, held - 1)
        return Work("decode_attention", f"{kind} batch {B}, context {context}", cost, make, plain)

    def kv_append(self, B: int, T: int, called: bool) -> Work:
        """New keys and values into slots of a global layer, each set into others; torch's beside it is two plain copies."""
        rows, slots = self.setting.batch(B), self.setting.length(512 if T == 1 else 2048)
        caches = functools.cache(lambda _: tuple(self.randn(rows, self.H, slots, self.D) for _ in range(2)))

        def make(i: int) -> Args:
            new = self.heads(rows, T), self.heads(rows, T)
            return *caches(i if T > 1 else 0), *new, self.lengths(rows, i * 37 % slots if T == 1 else 0)

        def plain(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Call:
            return lambda: (k_cache[:, :, :T].copy_(k), v_cache[:, :, :T].copy_(v))

        what = f"{B}x{T}" + (" as the model calls it" if called else "")
        return Work("kv_append", what, self.cost(rows, T).kv_append(0), make, plain, mutates=(0, 1), called=called)
