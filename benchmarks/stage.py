"""A stage of the GPU run: cases with a deadline, each of which may fail without stopping the next; results on disk at once."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import gptneo_fast
from benchmarks.costs import BANDWIDTH, RATE
from benchmarks.models import SHAPES, config_of
from benchmarks.timing import Clock

TINY = dict(
    vocab_size=19, hidden_size=16, num_heads=2, intermediate_size=32, num_layers=2, window_size=8, max_position_embeddings=64
)


@dataclass(frozen=True)
class Setting:
    """Where and how much a run measures.

    mode: "quick", "normal" or "full". device: CUDA, or the CPU for a dry run on tiny shapes.
    bandwidth, copy, rate: measured ceilings of the card, bytes/s read, bytes/s read + written, bf16 FLOP/s.
    """

    mode: str = "normal"
    device: torch.device = field(default_factory=lambda: torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    bandwidth: float = BANDWIDTH
    copy: float = BANDWIDTH
    rate: float = RATE

    @property
    def tiny(self) -> bool:
        """Whether this is a dry run: nothing it measures means anything."""
        return self.device.type != "cuda"

    @property
    def shapes(self) -> list[str]:
        """The models that are measured."""
        return ["tiny"] if self.tiny else list(SHAPES)[: 2 if self.mode == "quick" else None]

    def config(self, shape: str) -> gptneo_fast.GPTNeoConfig:
        """The configuration of one of them."""
        return gptneo_fast.GPTNeoConfig(**TINY) if shape == "tiny" else config_of(shape)

    def length(self, tokens: int) -> int:
        """A context or prompt; the tiny model's are past its window of 8 where the others' are past theirs."""
        return (7 if tokens < 256 else 20) if self.tiny else tokens

    @property
    def dtype(self) -> torch.dtype:
        """What is measured: bfloat16; in a dry run, whose kernels are interpreted, float32."""
        return torch.float32 if self.tiny else torch.bfloat16


class LeftOut(Exception):  # noqa: N818 (nothing went wrong)
    """A case that cannot run here, with the reason."""


@dataclass(frozen=True)
class Case:
    """One measurement or check. run: returns a row of the results, or raises. seconds: what it is expected to take."""

    name: str
    run: Callable[[], dict[str, Any] | None]
    seconds: float = 5.0


def run_cases(cases: Iterable[Case], clock: Clock, path: Path) -> dict[str, Any]:
    """Run what the clock allows; the result is rewritten after every case, so that a process that dies leaves its rows.

    Returns:
        {"rows": [...], "failures": {case: reason}, "left_out": {case: reason}}
    """
    found: dict[str, Any] = {"rows": [], "failures": {}, "left_out": {}}
    for case in cases:
        if clock.left() < case.seconds:
            found["left_out"][case.name] = f"{clock.left():.0f} s were left, it takes about {case.seconds:.0f}"
        elif not _attempt(case, found):
            write(path, found)
            break
        write(path, found)
    return found


def _attempt(case: Case, found: dict[str, Any]) -> bool:
    """One case; False where the device can no longer be used by this process."""
    try:
        row = case.run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found["rows"].append({"case": case.name} | (row or {}))
    except LeftOut as reason:
        found["left_out"][case.name] = str(reason)
    except Exception as error:
        found["failures"][case.name] = f"{type(error).__name__}: {str(error).strip()[:600]}"
        print(f"{case.name} failed\n{traceback.format_exc()}", flush=True)
        if torch.cuda.is_available():
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except RuntimeError:
                found["failures"]["device"] = "the GPU reports an error that this process cannot recover from"
                return False
    return True


def write(path: Path, values: dict[str, Any]) -> None:
    """JSON in place of what was there, whole at every moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(values, indent=1, default=str) + "\n")
    part.replace(path)
