"""Many texts on the CPU beside transformers' loops over padded batches: continuations of ragged prompts, and scores.

CTranslate2, where it is installed (`make peers` does), makes the same batches; its GPT-2 computes the same within the window.
One round each, which is hundreds of steps or a hundred forward passes; what is compared is checked in the same round.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.cpu.peers.as_gpt2 import CTranslate2
from benchmarks.cpu.turns import keep, leaves, seconds_of
from benchmarks.models import DTYPES, pair
from benchmarks.tables import PEER
from gptneo_fast import Engine

SHAPE, BATCH = "125m", 8  # rows of transformers' batches
PROMPTS, TEXTS, TOKENS = 64, 32, 512

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="`make gpu` measures this machine")


def ragged() -> list[tuple[list[int], int]]:
    """(prompt of 16 to 400 tokens, 16 to 128 new ones) of each request."""
    r = random.Random(0)
    return [([r.randrange(50256) for _ in range(r.randint(16, 400))], r.randint(16, 128)) for _ in range(PROMPTS)]


def batches(model: Any, requests: list[tuple[list[int], int]]) -> Iterator[list[int]]:
    """New tokens of each request, from padded batches in the order given, each as long as its longest asks for."""
    for i in range(0, len(requests), BATCH):
        group = requests[i : i + BATCH]
        wide, new = max(len(p) for p, _ in group), max(n for _, n in group)
        ids = torch.tensor([[0] * (wide - len(p)) + p for p, _ in group])
        mask = torch.tensor([[0] * (wide - len(p)) + [1] * len(p) for p, _ in group])
        how = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        found = model.generate(ids, attention_mask=mask, **how)[:, wide:]
        yield from (row[:n] for row, (_, n) in zip(found.tolist(), group, strict=True))


def batches_of_ctranslate2(runner: CTranslate2, requests: list[tuple[list[int], int]]) -> Iterator[list[int]]:
    """As `batches`, by CTranslate2, which pads by itself."""
    for i in range(0, len(requests), BATCH):
        group = requests[i : i + BATCH]
        new, prompts = max(n for _, n in group), [[str(token) for token in p] for p, _ in group]
        how = {"max_length": new, "min_length": new, "sampling_topk": 1, "include_prompt_in_result": False}
        found = runner.generator.generate_batch(prompts, **how)
        yield from (row.sequences_ids[0][:n] for row, (_, n) in zip(found, group, strict=True))


@pytest.mark.parametrize("dtype", ["fp32"])
@torch.no_grad()
def test_ragged_prompts(benchmark, dtype):
    theirs, ours = pair(SHAPE, DTYPES[dtype])
    requests, found, expected = ragged(), [], []

    def engine() -> None:
        with Engine(ours, max_waiting=PROMPTS) as engine:
            jobs = [engine.submit(p, max_new_tokens=n, min_new_tokens=n) for p, n in requests]
            found.extend(job.result() for job in jobs)

    others = {PEER: [seconds_of(lambda: expected.extend(batches(theirs, requests)))]}
    benchmark.pedantic(engine, rounds=1)
    results = [(found, ours.config.max_position_embeddings)]
    if not CTranslate2.why_not(DTYPES[dtype]):
        runner, beside = CTranslate2(theirs, torch.get_num_threads()), list[list[int]]()
        others[CTranslate2.name] = [seconds_of(lambda: beside.extend(batches_of_ctranslate2(runner, requests)))]
        results.append((beside, ours.config.window_size))
    for rows, limit in results:
        for (prompt, n), got, want in zip(requests, rows, expected, strict=True):
            if len(prompt) + n <= limit:
                leaves(ours, torch.tensor([prompt + got]), torch.tensor([prompt + want]), n)
    new = sum(n for _, n in requests)
    keep(benchmark, f"125m, {PROMPTS} prompts of 16 to 400 + 16 to 128 tokens", dtype, torch.get_num_threads(), new, others)


class Peak:
    """Bytes that the process came to need within the block, above what it had."""

    def __enter__(self) -> Peak:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        self.begin = self._read("VmRSS")
        return self

    def __exit__(self, *_: Any) -> None:
        self.bytes = self._read("VmHWM") - self.begin

    @staticmethod
    def _read(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


def loop(model: Any, texts: Tensor) -> Tensor:
    """Log-probabilities [n, T - 1] as scripts take them of transformers."""
    found = []
    for ids in texts.split(BATCH):
        logits = model(ids, use_cache=False).logits[:, :-1].float()
        found.append(logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0])
    return torch.cat(found)


@pytest.mark.parametrize("dtype", ["fp32"])
@torch.no_grad()
def test_scores(benchmark, dtype):
    """Log-probability, rank and entropy of every token; transformers' loop gives the first alone."""
    theirs, ours = pair(SHAPE, DTYPES[dtype])
    texts = torch.randint(0, 50257, (TEXTS, TOKENS), generator=torch.Generator().manual_seed(0))
    results: dict[str, Any] = {}

    def run(name: str, call: Callable[[], Any]) -> float:
        with Peak() as peak:
            begin = time.perf_counter()
            results[name] = call()
            seconds = time.perf_counter() - begin
        results[f"{name}, bytes"] = peak.bytes
        return seconds

    peer = {PEER: [run(PEER, lambda: loop(theirs, texts))]}
    benchmark.pedantic(lambda: run("ours", lambda: ours.score(texts, want=("logprob", "rank", "entropy"))), rounds=1)
    got = torch.stack([score.logprob for score in results["ours"]])
    assert (got - results[PEER]).abs().max() < 1e-3

    def more(runner: str, _: float) -> dict[str, Any]:
        return {"extra_mb": results[f"{PEER if runner == PEER else 'ours'}, bytes"] / 1e6}

    keep(
        benchmark,
        f"125m, scores of {TEXTS} x {TOKENS} tokens",
        dtype,
        torch.get_num_threads(),
        TEXTS * (TOKENS - 1),
        peer,
        more,
    )
