"""Stage 4: whole models, random weights at true shapes: decode, prefill, scoring; ours, then the peers, in one run."""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import gptneo_fast
from benchmarks import costs
from benchmarks.models import randomise
from benchmarks.peers import Compiled, Step, Transformers
from benchmarks.stage import Case, LeftOut, Setting
from benchmarks.timing import chain, per_call
from gptneo_fast import GPTNeoConfig
from gptneo_fast.generation.captured.params import SamplingParams
from gptneo_fast.generation.captured.runner import BUCKETS, Runner
from gptneo_fast.ops.sampling import GREEDY, PLACE, TOKEN

STEPS, WARMUP = 32, 4
SEED_SETTINGS = dict(do_sample=True, temperature=0.9, max_new_tokens=100)  # top_k is 50 by default


class Ours:
    """gptneo_fast with random weights."""

    name = "gptneo_fast"

    def __init__(self, config: GPTNeoConfig, dtype: torch.dtype, device: torch.device) -> None:
        with torch.device("meta"):
            model = gptneo_fast.GPTNeoForCausalLM(config)
        self.model = model.to(dtype).to_empty(device=device).eval()
        self.model.tie_weights()
        randomise(self.model)
        self.config, self.dtype, self.device = config, dtype, device

    def logits(self, ids: Tensor) -> Tensor:
        """[B, T, V]."""
        return self.model(ids, use_cache=False).logits

    def prefill(self, ids: Tensor) -> Tensor:
        """[B, 1, V], with a cache."""
        return self.model(ids, use_cache=True, logits_to_keep=1).logits

    def decoder(self, batch: int, context: int, steps: int) -> Step:
        """Captured greedy steps, as `generate` runs them, whose last one sees `context` keys."""
        rows = next(n for n in BUCKETS if n >= batch)
        self.runner = runner = Runner(self.model, rows, context)
        for tensor in (*runner.cache.keys, *runner.cache.values):
            tensor.normal_()
        greedy = SamplingParams(GREEDY, [1.0, 1.0, 0.0, 1.0], [0, 0, context], runner.flags, runner.seeds, penalty=False)
        captured = runner.step_for(greedy)
        runner.counts.copy_(torch.tensor(greedy.counts))
        runner.state.zero_()
        runner.state[PLACE] = context - steps
        runner.lengths.fill_(context - steps)

        def step() -> Tensor:
            captured.replay()
            return runner.state[TOKEN]

        return step

    def generate(self, ids: Tensor, **how: Any) -> Tensor:
        """The whole call, prompt included."""
        return self.model.generate(ids, pad_token_id=0, **how)


class Bench:
    """The work of one model, its runners made when first needed; one at a time holds the memory."""

    def __init__(self, setting: Setting, shape: str) -> None:
        self.setting, self.shape, self.config = setting, shape, setting.config(shape)
        self._made: tuple[str, Any] | None = None

    def runner(self, name: str) -> Any:
        """gptneo_fast, "transformers eager", "transformers flash_attention_2" or "compiled torch"."""
        if self._made is None or self._made[0] != name:
            self._made = None
            gc.collect()
            args = (self.config, self.setting.dtype, self.setting.device)
            if name == Compiled.name:
                self._made = name, Compiled(Transformers(*args).model, self.config, compile_layers=not self.setting.tiny)
            else:
                made = Ours(*args) if name == Ours.name else Transformers(*args, attention=name.removeprefix("transformers "))
                self._made = name, made
        return self._made[1]

    def _floor(self, work: list[costs.Cost]) -> float:
        return costs.total(work).floor(self.setting.bandwidth, self.setting.rate)

    def _row(self, name: str, seconds: float, tokens: int, work: list[costs.Cost] | None) -> dict[str, Any]:
        row: dict[str, Any] = {"model": self.shape, "runner": name, "ms": seconds * 1e3, "tokens/s": tokens / seconds}
        if work is not None:
            row["share of floor"] = self._floor(work) / seconds
        if self.setting.device.type == "cuda":
            row["peak GB"] = torch.cuda.max_memory_allocated() / 1e9
        return row

    @torch.no_grad()
    def decode(self, name: str, batch: int, context: int) -> dict[str, Any]:
        """One token a row: seconds of a step in a loop that waits for nothing."""
        context = self.setting.length(context)
        steps = min(STEPS, context // 4)
        runner = self._fresh(name)
        step = runner.decoder(batch, context, steps + WARMUP)
        seconds = chain(step, steps, self.setting.device, WARMUP)
        work = costs.decode_step(self.config, batch, context - steps // 2, self.setting.dtype)
        return self._row(name, seconds, batch, work) | {"batch": batch, "context": context}

    @torch.no_grad()
    def prefill(self, name: str, tokens: int = 2048) -> dict[str, Any]:
        """One prompt, a cache, the last token's logits."""
        tokens = self.setting.length(tokens)
        runner, ids = self._fresh(name), self._ids(1, tokens)
        seconds = per_call([lambda: runner.prefill(ids)], self.setting.device, graph=False).seconds
        return self._row(name, seconds, tokens, costs.prefill(self.config, 1, tokens, self.setting.dtype))

    @torch.no_grad()
    def scoring(self, name: str, rows: int = 32, tokens: int = 512) -> dict[str, Any]:
        """The log-probability of every token of many sequences, eight at a time where the model has no way of its own."""
        rows, tokens = (2 if self.setting.tiny else rows), self.setting.length(tokens)
        runner, ids = self._fresh(name), self._ids(rows, tokens)
        before = torch.cuda.memory_allocated() if self.setting.device.type == "cuda" else 0
        seconds = per_call([lambda: _scores(runner, ids)], self.setting.device, graph=False).seconds
        work = costs.prefill(self.config, rows, tokens, self.setting.dtype, cache=False, scoring=True)
        row = self._row(name, seconds, rows * tokens, work)
        return row | ({"GB beyond weights": row["peak GB"] - before / 1e9} if before else {})

    @torch.no_grad()
    def sampling(self, name: str) -> dict[str, Any]:
        """The settings that the first version of this project generated with."""
        ids, how = self._ids(1, 8), SEED_SETTINGS | {"min_new_tokens": 100}
        if self.setting.tiny:
            how |= {"max_new_tokens": 9, "min_new_tokens": 9}
        runner = self._fresh(name)
        torch.manual_seed(0)
        seconds = chain(lambda: runner.generate(ids, **how), 1 if self.setting.tiny else 2, self.setting.device, warmup=1)
        return self._row(name, seconds, how["max_new_tokens"], None)

    def _fresh(self, name: str) -> Any:
        runner = self.runner(name)
        gc.collect()
        if self.setting.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        return runner

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


def _points(setting: Setting) -> list[tuple[int, int]]:
    """(batch, context) of decode."""
    if setting.mode == "quick":
        return [(1, 128), (8, 1024)]
    return [(1, 128), (1, 1024), (1, 2048), (8, 1024), (64, 2048)] if setting.mode == "normal" else [
        (b, c) for b in (1, 8, 64) for c in (128, 1024, 2048)
    ]  # fmt: skip


def our_cases(setting: Setting) -> Iterator[Case]:
    """Ours: decode first, then prefill, scoring and the seed's settings."""
    for shape in setting.shapes:
        bench = Bench(setting, shape)
        for batch, context in _points(setting):
            yield _case(bench, "decode", Ours.name, batch, context)
        for work in ("prefill", "scoring", "sampling"):
            yield _case(bench, work, Ours.name)
        yield Case(f"{shape}: memory given back", lambda bench=bench: _close(bench), 0)


def peer_cases(setting: Setting) -> Iterator[Case]:
    """The peers at the same work."""
    for shape in setting.shapes:
        bench = Bench(setting, shape)
        yield _case(bench, "decode", Compiled.name, 1, 128, seconds=40)
        if setting.mode != "quick":
            yield _case(bench, "decode", Compiled.name, 1, 2048, seconds=10)
        if setting.mode == "full":
            for batch, context in ((8, 1024), (64, 2048)):
                yield _case(bench, "decode", Compiled.name, batch, context, seconds=40)
        names = ["transformers eager"]
        if importlib.util.find_spec("flash_attn") and not setting.tiny:
            names.append("transformers flash_attention_2")
        for name in names:
            for batch, context in _points(setting):
                yield _case(bench, "decode", name, batch, context)
            for work in ("prefill", "scoring", "sampling"):
                yield _case(bench, work, name)
        yield Case(f"{shape}: memory given back", lambda bench=bench: _close(bench), 0)


def _close(bench: Bench) -> None:
    bench._made = None
    gc.collect()


def _case(bench: Bench, work: str, name: str, *args: int, seconds: float = 5.0) -> Case:
    what = f"batch {args[0]}, context {args[1]}" if args else ""
    measure: Callable[..., dict[str, Any]] = getattr(bench, work)

    def run() -> dict[str, Any]:
        try:
            row = measure(name, *args)
        except torch.cuda.OutOfMemoryError as error:
            _close(bench)
            raise LeftOut(f"out of memory: {str(error)[:120]}") from error
        wrong = "flash" in name and bench.setting.length(args[1] if args else 2048) > bench.config.window_size
        return row | {"work": work} | ({"wrong": "local layers see past their window"} if wrong else {})

    return Case(f"{bench.shape} {work} {what} {name}".replace("  ", " "), run, seconds)
