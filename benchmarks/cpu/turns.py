"""Runners that take turns, one call of each in a round, and what the results file says of them."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.cpu.floor import beside_floor, read_rate
from benchmarks.models import DTYPES, pair
from benchmarks.tables import OURS, PEER
from gptneo_fast.tools.verify import twin

ROUNDS = 5


def prompt(tokens: int, vocabulary: int = 50257) -> Tensor:
    """Random ids [1, tokens]."""
    return torch.randint(0, vocabulary, (1, tokens), generator=torch.Generator().manual_seed(tokens))


def continuation(model: Any, ids: Tensor, new: int) -> Tensor:
    """Greedy tokens, exactly `new` of them."""
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0
    )


def leaves(ours: Any, got: Tensor, expected: Tensor, new: int, coarse: torch.dtype = torch.float32) -> int | None:
    """The number of the first new token that is not transformers', or None.

    Args:
        ours: our model. got, expected: int64 [1, T + new], the peer's tokens and transformers'. coarse: as `Peer.coarse`.

    Raises:
        AssertionError: at some token float64 prefers another by more than twice what plain torch errs there in the model's
            dtype, or in `coarse` where that is coarser.
    """
    if torch.equal(got, expected):
        return None
    T = got.shape[1] - new
    assert torch.equal(got[:, :T], expected[:, :T]), "the prompt was changed"
    low = max(ours.dtype, coarse, key=lambda dtype: torch.finfo(dtype).eps)
    usual, exact = (twin(ours, d)(got[:, :-1]).logits[0, T - 1 :].double() for d in (low, torch.float64))  # [new, V]
    errors = 2 * (usual - exact).abs().amax(1)
    exact[:, ours.config.eos_token_id] = -torch.inf
    margins = exact.amax(1) - exact.gather(1, got[0, T:, None])[:, 0]
    assert (margins <= errors).all(), f"tokens {(margins > errors).nonzero()[:, 0].tolist()} are not the likeliest"
    return int((got != expected)[0].nonzero()[0]) - T


def beside_rounding(ours: Any, rounded: Any, got: Tensor, new: int) -> float:
    """By how much float64 prefers other tokens than those of a runtime that rounds weights, in the largest error of the logits
    of a token with weights rounded in our way; the largest of the new tokens.

    Args:
        ours, rounded: our model, and the same in few bits. got: int64 [1, T + new].
    """
    T = got.shape[1] - new
    ids = got[:, :-1]
    exact, few = (
        model(ids, logits_to_keep=new).logits[0].double() for model in (twin(ours, torch.float64), rounded)
    )  # [new, V]
    errors = (few - exact).abs().amax(1)
    exact[:, ours.config.eos_token_id] = -torch.inf
    margins = exact.amax(1) - exact.gather(1, got[0, T:, None])[:, 0]
    return float((margins / errors).max())


@functools.cache
def check_tokens(shape: str, dtype: str, context: int, new: int) -> None:
    """Ours are those of transformers, or all of them are choices within the error of the dtype."""
    theirs, ours = pair(shape, DTYPES[dtype])
    ids = prompt(context)
    leaves(ours, continuation(ours, ids, new), continuation(theirs, ids, new), new)


def seconds_of(call: Callable[[], Any]) -> float:
    """Of one call."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def beside(
    benchmark: Any, call: Callable[[], Any], others: Mapping[str, Callable[[], Any]], warm: bool = False
) -> dict[str, list[float]]:
    """Time `call`, `ROUNDS` times, and before each every one of `others`, whose seconds are returned.

    warm: all of them have run before; else each runs once untimed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in others}

    def before() -> None:
        for name, other in others.items():
            seconds[name].append(seconds_of(other))

    for first in () if warm else (*others.values(), call):
        first()
    benchmark.pedantic(call, setup=before, rounds=ROUNDS)
    return seconds


def keep(
    benchmark: Any,
    work: str,
    dtype: str,
    threads: int,
    tokens: int,
    others: Mapping[str, list[float]] | None = None,
    more: Callable[[str, float], dict[str, Any]] = lambda runner, median: {},
) -> None:
    """What the results file says of a measurement.

    Args:
        tokens: that a call makes, 0 where that is not what is measured. others: seconds of each call of other runners.
        more: from a runner and the median of its seconds to what else its row says.
    """
    benchmark.group = f"{work}, {dtype}, {threads} threads"
    row = {"work": work, "dtype": dtype, "threads": threads}
    medians = {OURS: benchmark.stats.stats.median} | {name: statistics.median(s) for name, s in (others or {}).items()}
    benchmark.extra_info["rows"] = [
        row
        | {"runner": runner, "ms": median * 1e3}
        | ({"tokens_per_second": tokens / median} if tokens else {})
        | more(runner, median)
        for runner, median in medians.items()
    ]


Decode = Callable[[Tensor, int], Tensor]  # as `Peer.decode`


def decode(
    benchmark: Any,
    work: tuple[str, str, int],
    runners: Mapping[str, Decode],
    shape: tuple[Tensor, int, Any],
    warm: bool = False,
) -> None:
    """Time whole greedy calls of every runner, ours among them, and keep them with a step's share of its floor.

    In every round each also makes one new token alone; a step is what each further one takes, median of the rounds.

    Args:
        work: what a row says: name, dtype and threads.
        shape: prompt int64 [1, T], how many new tokens, the model's configuration. warm: as for `beside`.
    """
    name, dtype, threads = work
    ids, new, config = shape
    others = {f"{n}, first": functools.partial(run, ids, 1) for n, run in runners.items()}
    others |= {n: functools.partial(run, ids, new) for n, run in runners.items() if n != OURS}
    seconds = beside(benchmark, functools.partial(runners[OURS], ids, new), others, warm)
    first = {n: seconds.pop(f"{n}, first") for n in runners}
    whole = seconds | {OURS: benchmark.stats.stats.data}
    rate = read_rate(threads)

    def more(runner: str, _: float) -> dict[str, Any]:
        step = statistics.median(w - f for w, f in zip(whole[runner], first[runner], strict=True)) / (new - 1)
        return beside_floor(config, dtype, ids.shape[1] + new // 2, step, rate)

    keep(benchmark, name, dtype, threads, new, seconds, more)


def generators(shape: str, dtype: str) -> dict[str, Decode]:
    """transformers' own loop and ours."""
    theirs, ours = pair(shape, DTYPES[dtype])
    return {PEER: functools.partial(continuation, theirs), OURS: functools.partial(continuation, ours)}
