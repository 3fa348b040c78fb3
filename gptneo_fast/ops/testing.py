"""What tests and benchmarks share: samples of every op, and the error that an implementation may make.

The budget is measured and not typed: against the reference in float64 on the same (rounded) inputs, an implementation may
err by twice what plain torch in the same dtype errs plus one rounding of the output. In which order plain torch adds the
products of a matrix is the luck of its BLAS on this CPU; what it errs is therefore the most of several orders.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import reference
from .constants import ALL, COUNT, END, FEW, FINISHED, FREE, GREEDY, NOT_FIRST, STATUS, SUPPRESSED

EPS = 1e-5
ORDERS = 8  # in which plain torch computes a case; the first is as given
SUMMED = {  # arguments whose last axis is that of the sum
    "norm_linear": (0, 1, 2, 3),
    "norm_qkv": (0, 1, 2, 3, 4, 5),
    "norm_qkv_append": (0, 1, 2, 3, 4, 5),
    "linear_add": (0, 1),
    "lm_head": (0, 1, 2, 3),
    "attention": (0, 1, 6),  # q, k and k_cache: the scores
    "decode_attention": (0, 1),
    "logprob": (0, 1),
}


@dataclass(frozen=True)
class Sample:
    """One call of an op.

    name: what the case is about, for test ids.
    args: positional arguments, floating-point tensors in float64.
    mutates: places of the arguments that the op changes.
    """

    name: str
    args: tuple[Any, ...]
    mutates: tuple[int, ...] = ()

    def to(self, dtype: torch.dtype, device: torch.device | str | None = None) -> Sample:
        """The same call with floating-point tensors rounded to `dtype`, strides kept; None: each where it is."""

        def move(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            return x.to(device=device, dtype=dtype if x.is_floating_point() else x.dtype)

        return Sample(self.name, tuple(map(move, self.args)), self.mutates)

    def reordered(self, places: tuple[int, ...], seed: int) -> Sample:
        """The same call with the last axis of the arguments at `places` in another order, the same for each."""
        order = torch.randperm(self.args[places[0]].shape[-1], generator=torch.Generator().manual_seed(seed))
        args = (a[..., order.to(a.device)] if i in places and a is not None else a for i, a in enumerate(self.args))
        return Sample(self.name, tuple(args), self.mutates)

    def run(self, function: Callable[..., Any]) -> list[Tensor]:
        """Results of `function`, then the arguments that it changed; the sample itself stays as it is."""
        args = [a.clone() if i in self.mutates else a for i, a in enumerate(self.args)]
        out = function(*args)
        results = [] if out is None else [out] if isinstance(out, Tensor) else list(out)
        return results + [args[i] for i in self.mutates]


def over_budget(name: str, function: Callable[..., Any], sample: Sample) -> str | None:
    """What `function` gets wrong on a sample beyond its budget, or None. Arguments as those of `share_of_budget`."""
    share, fault = share_of_budget(name, function, sample)
    return fault if share > 1 else None


def share_of_budget(name: str, function: Callable[..., Any], sample: Sample) -> tuple[float, str]:
    """(the largest error of `function` as a share of what it may be, a sentence about it); infinite where no error can be told.

    Args:
        name: of the op. function: an implementation of it.
        sample: in the dtype to be tested.
    """
    plain = getattr(reference, name)
    orders = [sample, *(sample.reordered(SUMMED[name], seed) for seed in range(1, ORDERS) if name in SUMMED)]
    got, normals = sample.run(function), [order.run(plain) for order in orders]
    exact = sample.to(torch.float64).run(plain)
    worst = 0.0, f"{name}, {sample.name}: no error"
    for i, (g, e, *normal) in enumerate(zip(got, exact, *normals, strict=True)):
        if g.dtype != normal[0].dtype or g.shape != e.shape:
            what = f"result {i} is {g.dtype} {list(g.shape)}, expected {normal[0].dtype} {list(e.shape)}"
            return math.inf, f"{name}, {sample.name}: {what}"
        if not g.isfinite().all():
            return math.inf, f"{name}, {sample.name}: result {i} is not finite everywhere"
        error, usual = (g.double() - e).abs(), [(n.double() - e).abs() for n in normal]
        rounding = (e.to(g.dtype).double() - e).abs()
        for kind, factor in (("max", 2.0), ("mean", 1.5)):
            had, *orders_had = (getattr(t, kind)().item() for t in (error, *(u + rounding for u in usual)))
            may = factor * max(orders_had)
            share = had / may if may else math.inf if had else 0.0
            if share > worst[0]:
                what = f"{kind} error {had:.3g} of result {i} {'exceeds' if share > 1 else 'keeps to'} {may:.3g}"
                worst = share, f"{name}, {sample.name}: {what}"
    return worst


def _random(*shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale


def _norm(C: int) -> tuple[Tensor, Tensor]:
    return 1 + _random(C, scale=0.1), _random(C, scale=0.1, seed=1)


def _embed() -> Iterator[Sample]:
    wte, wpe = _random(41, 24), _random(32, 24, seed=1)
    ids, types = torch.arange(18).view(2, 9) * 2, torch.arange(18).view(2, 9) + 7
    yield Sample("tokens", (ids, torch.arange(9)[None], wte, wpe))
    yield Sample("token types and scattered positions", (ids, ids.flip(0) % 32, wte, wpe, types))


def _layer_norm() -> Iterator[Sample]:
    for C in (8, 48, 768):
        yield Sample(f"width {C}", (_random(2, 5, C), *_norm(C), EPS))
    yield Sample("mean far from zero", (_random(3, 1, 64) + 300, *_norm(64), EPS))


def _norm_linear() -> Iterator[Sample]:
    for rows, C, F in ((1, 16, 64), (3, 48, 20), (130, 64, 256)):
        args = (_random(1, rows, C), *_norm(C), _random(F, C, scale=C**-0.5), _random(F), EPS)
        yield Sample(f"{rows} rows, {C} to {F}", (*args, False))
        yield Sample(f"{rows} rows, {C} to {F}, gelu", (*args, True))
    for rows in (1, 5, 70):
        args = (_random(1, rows, 768) + 100, *_norm(768), _random(40, 768, scale=768**-0.5), _random(40), EPS)
        yield Sample(f"{rows} rows, mean far from zero", (*args, False))


def _norm_qkv() -> Iterator[Sample]:
    for rows, C in ((1, 64), (37, 48)):
        weights = (_random(C, C, scale=C**-0.5, seed=i) for i in range(3))
        yield Sample(f"{rows} rows of {C}", (_random(2, rows, C), *_norm(C), *weights, EPS))


def _linear_add() -> Iterator[Sample]:
    for rows, K, C in ((1, 64, 16), (37, 48, 48), (5, 256, 64)):
        yield Sample(
            f"{rows} rows, {K} to {C}",
            (_random(2, rows, K), _random(C, K, scale=K**-0.5), _random(C), _random(2, rows, C, seed=2)),
        )


def _heads(B: int, H: int, T: int, D: int, seed: int) -> Tensor:
    return _random(B, T, H * D, seed=seed).unflatten(-1, (H, D)).transpose(1, 2)  # [B, H, T, D], strided as in the model


def _int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _attention() -> Iterator[Sample]:
    for T, D, window in ((1, 8, 0), (2, 16, 1), (63, 4, 0), (63, 4, 5), (257, 8, 256), (300, 16, 0)):
        qkv = _heads(2, 2, T, D, 0), _heads(2, 2, T, D, 1), _heads(2, 2, T, D, 2)
        yield Sample(f"T {T}, D {D}, window {window}", (*qkv, window))
    for window in (0, 9):
        qkv = _heads(3, 2, 20, 8, 0), _heads(3, 2, 20, 8, 1), _heads(3, 2, 20, 8, 2)
        yield Sample(f"ragged, window {window}", (*qkv, window, _int32(0, 7, 20), _int32(20, 15, 20)))
        cache = (_random(3, 2, 24, 8, seed=5), _random(3, 2, 24, 8, seed=6))
        yield Sample(f"past, window {window}", (*qkv, window, None, None, *cache, _int32(0, 24, 13)))
        if window:
            yield Sample("ring that has wrapped", (*qkv, window, _int32(0, 3, 0), None, *cache, _int32(100, 31, 24)))


def _decode_attention() -> Iterator[Sample]:
    for T, window, lengths in ((1, 0, (0, 5, 22)), (1, 7, (50, 23, 24)), (5, 7, (0, 19, 77)), (18, 7, (24, 48, 1000))):
        q, cache = _heads(3, 2, T, 8, 0), (_random(3, 2, 24, 8, seed=5), _random(3, 2, 24, 8, seed=6))
        yield Sample(f"T {T}, window {window}, lengths {lengths}", (q, *cache, _int32(*lengths), window))
    q, cache = _heads(2, 1, 3, 4, 0), (_random(2, 1, 10, 4, seed=5), _random(2, 1, 10, 4, seed=6))
    yield Sample("padding before the first token", (q, *cache, _int32(0, 0), 0, _int32(2, 3)))


def _kv_append() -> Iterator[Sample]:
    for T, lengths, starts in ((1, (0, 9, 10), None), (4, (8, 19, 3), None), (25, (0, 7, 33), None), (6, (0, 2, 9), (0, 4, 6))):
        cache = (_random(3, 2, 10, 4, seed=5), _random(3, 2, 10, 4, seed=6))
        new = (_heads(3, 2, T, 4, 0), _heads(3, 2, T, 4, 1))
        begin = None if starts is None else _int32(*starts)
        yield Sample(f"T {T}, lengths {lengths}, starts {starts}", (*cache, *new, _int32(*lengths), begin), mutates=(0, 1))


def _norm_qkv_append() -> Iterator[Sample]:
    for B, T, H, D, lengths, starts in (
        *((1, 1, 4, 16, (9,), None), (3, 1, 2, 24, (0, 9, 1000), None), (3, 4, 2, 8, (8, 19, 3), None)),
        *((2, 13, 4, 4, (0, 7), None), (3, 6, 4, 16, (0, 2, 9), (0, 4, 6)), (33, 2, 1, 64, tuple(range(33)), None)),
    ):
        C, cache = H * D, (_random(B, H, 10, D, seed=5), _random(B, H, 10, D, seed=6))
        weights = (_random(C, C, scale=C**-0.5, seed=i) for i in range(3))
        begin = None if starts is None else _int32(*starts)
        args = (_random(B, T, C), *_norm(C), *weights, EPS, *cache, _int32(*lengths), begin)
        yield Sample(f"{B} x {T} of {H} x {D}, starts {starts}", args, mutates=(7, 8))


def _lm_head() -> Iterator[Sample]:
    for B, C, V in ((1, 64, 97), (3, 48, 40), (17, 128, 51), (65, 16, 33)):
        yield Sample(f"{B} rows of {C} to {V}", (_random(B, 1, C), *_norm(C), _random(V, C, scale=C**-0.5), EPS))


def _logprob() -> Iterator[Sample]:
    for N, C, V in ((9, 16, 5), (12, 48, 97), (33, 64, 40), (11, 32, 3000)):
        targets = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(N))
        yield Sample(f"{N} rows of {C} to {V}", (_random(N, C), _random(V, C, scale=2 * C**-0.5, seed=1), targets))


def _sample() -> Iterator[Sample]:
    B, V, N = 5, 2500, 4
    for name, method, temperature, top_k, top_p, min_p, penalty in (
        *(("greedy", GREEDY, 1.0, 0, 1.0, 0.0, 1.0), ("greedy, penalty", GREEDY, 1.0, 0, 1.0, 0.0, 1.5)),
        *(("temperature", FREE, 0.75, 0, 1.0, 0.0, 1.0), ("top_k", FEW, 0.75, 50, 1.0, 0.0, 1.0)),
        *(("all of few", FEW, 1.25, 64, 0.75, 0.03125, 1.25), ("top_k 1", FEW, 1.0, 1, 0.5, 0.0, 1.0)),
        *(("top_p", ALL, 1.0, 0, 0.875, 0.0, 1.0), ("all of many", ALL, 1.5, 300, 0.75, 0.03125, 1.25)),
    ):
        logits = _random(B, V, scale=3.0)
        logits[3, 7], logits[2] = float("nan"), logits[2].round()  # a broken row, and one of many equal scores
        flags = torch.zeros(V, dtype=torch.uint8)
        flags[:300], flags[300:600], flags[600:900] = SUPPRESSED, END, NOT_FIRST
        state = torch.zeros(5, B, dtype=torch.int64)
        state[COUNT], state[STATUS, 4] = torch.tensor([0, 1, 2, 3, 1]), FINISHED
        seen = None if penalty == 1 else (_random(B, V, seed=3) > 1).to(torch.uint8)
        rates = torch.tensor([temperature, top_p, min_p, penalty], dtype=torch.float64)  # exact in 16 bits
        seeds = torch.arange(B) * 987654321987 + 5
        args = (
            logits,
            rates,
            _int32(top_k, 2, N),
            flags,
            seeds,
            seen,
            state,
            torch.zeros(B, N).int(),
            _int32(*range(B)),
            method,
        )
        yield Sample(name, args, mutates=(6, 7, 8) if seen is None else (5, 6, 7, 8))


SAMPLES: dict[str, Callable[[], Iterator[Sample]]] = {
    "embed": _embed,
    "layer_norm": _layer_norm,
    "norm_linear": _norm_linear,
    "norm_qkv": _norm_qkv,
    "linear_add": _linear_add,
    "attention": _attention,
    "decode_attention": _decode_attention,
    "kv_append": _kv_append,
    "norm_qkv_append": _norm_qkv_append,
    "lm_head": _lm_head,
    "logprob": _logprob,
    "sample": _sample,
}
