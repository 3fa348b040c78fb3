"""Every op within its error budget, whole models against transformers eager past the window, memory checked.

The budget is measured, never typed: against float64 on the same weights, ours may err by twice what transformers errs.
"""

from __future__ import annotations

import functools
import gc
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gptneo_fast
from benchmarks.gpu.stage import Case, LeftOut, Setting
from benchmarks.models import DTYPES, ours_of, peer_of
from gptneo_fast import kernels
from gptneo_fast.ops import ops, testing

REPO = Path(__file__).parents[2]
PROMPT, NEW, LONG = 200, 300, 600  # tokens: 500 and 600 are past the window of 256


def op_cases(setting: Setting, dtype: str) -> Iterator[Case]:
    """One case for each op: all its samples."""
    for name in ops.NAMES:
        yield Case(f"{name} {dtype}", lambda name=name: _op(setting, name, DTYPES[dtype]), seconds=5)


def _op(setting: Setting, name: str, dtype: torch.dtype) -> dict[str, Any]:
    if setting.tiny and dtype == torch.bfloat16:
        raise LeftOut("bfloat16 needs a GPU: the interpreter computes it wrong")
    samples = [s.to(dtype, setting.device) for s in testing.SAMPLES[name]()][: 1 if setting.tiny else None]
    found = [testing.share_of_budget(name, getattr(kernels, name), s) for s in samples]
    if over := [fault for share, fault in found if share > 1]:
        raise AssertionError("; ".join(over))
    return {"samples": len(samples), "error over budget": max(share for share, _ in found)}


def model_cases(setting: Setting) -> Iterator[Case]:
    """Logits, greedy tokens, cached steps; then blocks that meet in any order."""
    for shape in setting.compared:
        pair = _Pair(setting, shape)
        yield Case(f"{shape}: logits past the window within the budget of fp32", pair.check_logits, 15)
        yield Case(f"{shape}: greedy tokens equal transformers' past the window", pair.check_tokens, 20)
        yield Case(f"{shape}: ring equals full cache", pair.check_ring, 10)
        yield Case(f"{shape}: memory given back", pair.close, 0)
    yield Case("decode_attention is bitwise equal however its blocks arrive", lambda: check_order(setting), 10)


def sanitizer_cases(setting: Setting) -> Iterator[Case]:
    """The extension and the kernels' samples under compute-sanitizer, each allocation torch's own."""
    extension = ["-m", "pytest", "-q", "-x", "tests/ops/test_extension_cuda.py"]
    kernels = ["-m", "benchmarks.gpu.run", "--stage", "ops bf16"]
    for name, target, tools in (
        ("the extension", extension, ("memcheck", "initcheck")),
        ("the kernels", kernels, ("memcheck", "initcheck", "racecheck")),
    ):
        for tool in tools:
            run = functools.partial(sanitize, setting, tool, target)
            yield Case(f"compute-sanitizer {tool} of {name}", run, 60)


class _Pair:
    """transformers' model and ours with the same random weights, made when first needed."""

    def __init__(self, setting: Setting, shape: str) -> None:
        self.setting, self.config = setting, setting.config(shape)
        self._models: tuple[Any, gptneo_fast.GPTNeoForCausalLM] | None = None
        self.new, self.long = (6, 14) if setting.tiny else (NEW, LONG)  # the tiny window is 8
        self.prompt = 6 if setting.tiny else PROMPT

    def models(self) -> tuple[Any, gptneo_fast.GPTNeoForCausalLM]:
        if self._models is None:
            theirs = peer_of(self.config, torch.float32, self.setting.device)
            self._models = theirs, ours_of(theirs, self.config, torch.float32, self.setting.device, "triton")
        return self._models

    def close(self) -> None:
        """Give the memory back."""
        self._models = None
        gc.collect()

    def ids(self, tokens: int) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.randint(0, self.config.vocab_size, (1, tokens), generator=generator).to(self.setting.device)

    @torch.no_grad()
    def errors(self, ours: Callable[[Any], Tensor], ids: Tensor) -> dict[str, float]:
        """Largest errors of transformers' logits and ours against transformers in float64."""
        theirs, model = self.models()
        plain, got = theirs(ids, use_cache=False).logits, ours(model)
        try:
            exact = theirs.double()(ids, use_cache=False).logits
        finally:
            theirs.float()
        return {"transformers": _worst(plain, exact), "ours": _worst(got, exact)}

    def check_logits(self) -> dict[str, float]:
        """One forward pass."""
        ids = self.ids(self.long)
        return _within(self.errors(lambda m: m(ids, use_cache=False).logits, ids))

    def check_ring(self) -> dict[str, float]:
        """A prompt, a chunk that wraps the ring, then token by token: against a pass that has no cache at all."""
        ids = self.ids(self.long)

        def pieces(model: gptneo_fast.GPTNeoForCausalLM) -> Tensor:
            cache, logits, at = None, [], 0
            for tokens in (self.prompt, self.long // 3, *[1] * self.long):
                if at >= self.long:
                    break
                out = model(ids[:, at : at + tokens], past_key_values=cache, use_cache=True)
                cache, at = out.past_key_values, at + tokens
                logits.append(out.logits)
            return torch.cat(logits, 1)[:, : self.long]

        return _within(self.errors(pieces, ids))

    @torch.no_grad()
    def check_tokens(self) -> dict[str, Any]:
        """Greedy continuations, equal up to a step whose two best logits are closer than the dtype's error."""
        theirs, ours = self.models()
        ids = self.ids(self.prompt)
        how = dict(max_new_tokens=self.new, min_new_tokens=self.new, do_sample=False, pad_token_id=0)
        a, b = (m.generate(ids, attention_mask=torch.ones_like(ids), **how) for m in (theirs, ours))
        if torch.equal(a, b):
            return {"tokens": self.new, "equal": self.new}
        at = int((a != b).nonzero()[0, 1])
        x, y = (m(a[:, :at]).logits[0, -1].float() for m in (theirs, ours))
        margin, error = float(x.topk(2).values.diff().abs()), float((x - y).abs().max())
        if margin > 2 * error:
            raise AssertionError(f"token {at} differs: margin {margin:.3g}, error of the logits {error:.3g}")
        return {"tokens": self.new, "equal": at - self.prompt, "then": f"a tie: margin {margin:.3g}, error {error:.3g}"}


def _worst(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).abs().max())


def _within(errors: dict[str, float]) -> dict[str, float]:
    if not errors["ours"] <= 2 * errors["transformers"]:
        raise AssertionError(f"error {errors['ours']:.3g} against float64, transformers' is {errors['transformers']:.3g}")
    return errors


def check_order(setting: Setting) -> dict[str, Any]:
    """The same call again and again while another stream keeps the card busy: the blocks of a head finish in any order."""
    B, H, D, R, runs = (1, 2, 16, 64, 3) if setting.tiny else (4, 16, 128, 2048, 10_000)
    make = dict(device=setting.device, dtype=torch.float32 if setting.tiny else torch.bfloat16)
    q = torch.randn(B, H, 1, D, **make)
    k, v = (torch.randn(B, H, R, D, **make) for _ in range(2))
    lengths = torch.arange(B, device=setting.device, dtype=torch.int32) * 100 + (R - 1 - 100 * B if not setting.tiny else 9)
    first = kernels.decode_attention(q, k, v, lengths, 0)
    differ = torch.zeros((), dtype=torch.int64, device=setting.device)
    load = torch.randn(2048, 2048, **make) if not setting.tiny else None
    other = torch.cuda.Stream() if not setting.tiny else None
    for i in range(runs):
        if other is not None and load is not None and i % 8 == 0:
            with torch.cuda.stream(other):
                load @ load
        differ += (kernels.decode_attention(q, k, v, lengths, 0) != first).any()
    if int(differ):
        raise AssertionError(f"{int(differ)} of {runs} runs differ from the first")
    return {"runs": runs}


def sanitize(setting: Setting, tool: str, target: list[str]) -> dict[str, Any]:
    """A run of Python under compute-sanitizer."""
    if setting.tiny or shutil.which("compute-sanitizer") is None:
        raise LeftOut("there is no GPU" if setting.tiny else "compute-sanitizer is not installed")
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, *target]
    env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, cwd=REPO, env=env)
    if done.returncode:
        raise AssertionError(f"exit code {done.returncode}: {(done.stdout + done.stderr)[-400:]}")
    return {"said": done.stdout.strip().splitlines()[-1]}
