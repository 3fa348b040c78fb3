"""Whole models, random weights at true shapes: decode, prefill, scoring; ours and the peers at the same work."""

from __future__ import annotations

import functools
import gc
import importlib.util
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu import predictions
from benchmarks.gpu.ours import Ours
from benchmarks.gpu.peers import Compiled, Transformers
from benchmarks.gpu.stage import Case, Setting
from benchmarks.gpu.timing import chain, per_call, wall
from benchmarks.static import costs
from gptneo_fast.ops.quantized import Format

STEPS, WARMUP = 32, 4
PROMPT, SCORED = (1, 2048), (32, 512)  # rows and tokens of prefill and scoring
SEED_SETTINGS = dict(do_sample=True, temperature=0.9, max_new_tokens=100)  # top_k is 50 by default


class Bench:
    """The work of one model, its runners made when first needed; one at a time holds the memory."""

    def __init__(self, setting: Setting, shape: str) -> None:
        self.setting, self.shape, self.config = setting, shape, setting.config(shape)
        self._made: tuple[str, Any] | None = None

    def runner(self, name: str) -> Any:
        """gptneo_fast (then " int8" or " int4"), "transformers eager", "transformers flash_attention_2" or "compiled torch";
        peak memory counts anew."""
        if self._made is None or self._made[0] != name:
            self.close()
            args = (self.config, self.setting.dtype, self.setting.device)
            if name == Compiled.name:
                self._made = name, Compiled(Transformers(*args).model, self.config, compile_layers=not self.setting.tiny)
            elif name.startswith(Ours.name):
                self._made = name, Ours(*args, quantize=_bits(name))
            else:
                self._made = name, Transformers(*args, attention=name.removeprefix("transformers "))
        if self.setting.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        return self._made[1]

    def close(self) -> None:
        """Let go of the model."""
        self._made = None
        gc.collect()

    def _row(
        self, name: str, seconds: float, tokens: int, work: list[costs.Cost] | None = None, what: str = ""
    ) -> dict[str, Any]:
        """What every measurement says. what: the work, as predictions name it."""
        row: dict[str, Any] = {"model": self.shape, "runner": name, "ms": seconds * 1e3, "tokens/s": tokens / seconds}
        if work is not None:
            floor = costs.total(work).floor(self.setting.bandwidth, self.setting.rate)
            row |= {"floor ms": floor * 1e3, "share of floor": floor / seconds}
        if name == Ours.name:
            row["predicted ms"] = predictions.whole_ms(self.shape, what)
        if self.setting.device.type == "cuda":
            row["peak GB"] = torch.cuda.max_memory_allocated() / 1e9
        return row

    @torch.no_grad()
    def decode(self, name: str, batch: int, context: int, early_launch: bool = False) -> dict[str, Any]:
        """One token a row: seconds of a step in a loop that waits for nothing; then whether the steps did what they should."""
        early = {"early_launch": True} if early_launch else {}
        if early_launch:
            self.setting.need_early_launch()
        rows, held = self.setting.batch(batch), self.setting.length(context)
        steps, warmup = (1, 1) if self.setting.tiny else (STEPS, WARMUP)
        step = self.runner(name).decoder(rows, held, steps + warmup, **early)
        seconds = chain(step, steps, self.setting.device, warmup)
        proof = step.check() if name.startswith(Ours.name) else {}
        bits = _bits(name)
        how = Format.of(bits) if bits else None
        work = costs.decode_step(self.config, rows, held - steps // 2, self.setting.dtype, how=how)
        what = f"decode {batch}, ctx {context}" + (", early launch" if early else "")
        return self._row(name, seconds, rows, work, what) | {"batch": batch, "context": context} | early | proof

    @torch.no_grad()
    def prefill(self, name: str) -> dict[str, Any]:
        """One prompt, a cache, the last token's logits: what a caller waits, and of ours what the device alone needs."""
        rows, tokens = PROMPT[0], self.setting.length(PROMPT[1])
        runner, ids = self.runner(name), self._ids(rows, tokens)
        work = costs.prefill(self.config, rows, tokens, self.setting.dtype)
        seconds = wall(lambda: runner.prefill(ids), self.setting.device)
        row = self._row(name, seconds, rows * tokens, work, "prefill 1x2048")
        if name == Ours.name:
            alone = per_call([runner.prefill_on_device(ids)], self.setting.device)
            row |= {"device ms": alone.seconds * 1e3, "device how": alone.how}
            row["device share of floor"] = row["floor ms"] / row["device ms"]
        return row

    @torch.no_grad()
    def scoring(self, name: str) -> dict[str, Any]:
        """The log-probability of every token of many sequences, eight at a time where the model has no way of its own."""
        rows, tokens = self.setting.batch(SCORED[0]), self.setting.length(SCORED[1])
        runner, ids = self.runner(name), self._ids(rows, tokens)
        before = torch.cuda.memory_allocated() if self.setting.device.type == "cuda" else 0
        scores = runner.scores if name == Ours.name else functools.partial(_scores, runner)
        seconds = wall(lambda: scores(ids), self.setting.device)
        work = costs.prefill(self.config, rows, tokens, self.setting.dtype, cache=False, scoring=True)
        row = self._row(name, seconds, rows * tokens, work, "scoring 32x512")
        return row | ({"GB beyond weights": row["peak GB"] - before / 1e9} if before else {})

    @torch.no_grad()
    def sampling(self, name: str) -> dict[str, Any]:
        """The settings that the first version of this project generated with."""
        ids, how = self._ids(1, 8), SEED_SETTINGS | {"min_new_tokens": 100}
        if self.setting.tiny:
            how |= {"max_new_tokens": 3, "min_new_tokens": 3}
        runner = self.runner(name)
        torch.manual_seed(0)
        seconds = chain(lambda: runner.generate(ids, **how), 1 if self.setting.tiny else 2, self.setting.device, warmup=1)
        return self._row(name, seconds, how["max_new_tokens"])

    def _ids(self, B: int, T: int) -> Tensor:
        return torch.randint(0, self.config.vocab_size, (B, T), device=self.setting.device)


def _scores(runner: Any, ids: Tensor) -> Tensor:
    """Log-probabilities [B, T - 1] of the tokens of ids [B, T]."""
    found = []
    for rows in ids.split(8):
        logits = runner.logits(rows)[:, :-1]
        found.append(
            -F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten(), reduction="none").view(len(rows), -1)
        )
    return torch.cat(found)


def _bits(name: str) -> str | None:
    """The format in a runner's name."""
    return name.removeprefix(Ours.name).strip() or None if name.startswith(Ours.name) else None


def decode_cases(setting: Setting) -> Iterator[Case]:
    """Ours, the first model."""
    bench = Bench(setting, setting.shapes[0])
    yield from _decoding(bench)
    yield _close(bench)


def our_cases(setting: Setting) -> Iterator[Case]:
    """The rest of ours: prompts, scoring and the seed's settings of the first model, then everything of the others."""
    for i, shape in enumerate(setting.shapes):
        bench = Bench(setting, shape)
        if i:
            yield from _decoding(bench)
        yield from _prompts(bench, [Ours.name])
        yield _close(bench)


def few_bits_cases(setting: Setting) -> Iterator[Case]:
    """Weights in few bits: the first model's steps, then prompts of it."""
    bench = Bench(setting, setting.shapes[0])
    for bits in ("int8", "int4"):
        for batch, context in setting.points[:3]:
            yield _case(bench, "decode", f"{Ours.name} {bits}", batch, context, seconds=4)
        yield _case(bench, "prefill", f"{Ours.name} {bits}", seconds=4)
    yield _close(bench)


def peer_cases(setting: Setting, shapes: list[str]) -> Iterator[Case]:
    """The peers at the same work: transformers, then at batch 1 compiled torch, which takes long to compile."""
    eager = ["transformers eager"]
    if importlib.util.find_spec("flash_attn") and not setting.tiny:
        eager.append("transformers flash_attention_2")
    for shape in shapes:
        bench = Bench(setting, shape)
        for name in eager:
            for batch, context in setting.points[:3]:
                yield _case(bench, "decode", name, batch, context, seconds=4)
        compiled = {"quick": setting.points[:1], "normal": [(1, 128), (1, 2048)], "full": setting.points}
        for batch, context in compiled[setting.mode]:
            yield _case(bench, "decode", Compiled.name, batch, context, seconds=20)
        yield from _prompts(bench, eager)
        yield _close(bench)


def _decoding(bench: Bench) -> Iterator[Case]:
    """Each point without early launches and with them."""
    for batch, context in bench.setting.points:
        for early in (False, True):
            yield _case(bench, "decode", Ours.name, batch, context, early, seconds=4)


def _prompts(bench: Bench, names: Iterable[str]) -> Iterator[Case]:
    for name in names:
        for work in ("prefill", "scoring", "sampling"):
            yield _case(bench, work, name)


def _close(bench: Bench) -> Case:
    return Case(f"{bench.shape}: memory given back", bench.close, 0)


def _case(bench: Bench, work: str, name: str, *args: Any, seconds: float = 5.0) -> Case:
    what = f"batch {args[0]}, context {args[1]}" if args else ""
    early = " with early launches" if args[2:] == (True,) else ""
    measure: Callable[..., dict[str, Any]] = getattr(bench, work)

    def run() -> dict[str, Any]:
        row = measure(name, *args)
        longest = bench.setting.length(args[1] if args else PROMPT[1])
        wrong = "flash" in name and longest > bench.config.window_size
        return row | {"work": work} | ({"wrong": "local layers see past their window"} if wrong else {})

    return Case(f"{bench.shape} {work} {what} {name}{early}".replace("  ", " "), run, seconds)
