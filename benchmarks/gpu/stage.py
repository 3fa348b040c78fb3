"""A stage of the GPU run: cases with a deadline, each of which may fail without stopping the next; results on disk at once."""

from __future__ import annotations

import gc
import json
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import gptneo_fast
from benchmarks.gpu.timing import Clock
from benchmarks.models import SHAPES, config_of
from benchmarks.static.costs import BANDWIDTH, RATE
from gptneo_fast import errors

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
        return self.device.type == "cpu"

    @property
    def shapes(self) -> list[str]:
        """The models that are measured, the one that matters first."""
        return ["tiny"] if self.tiny else sorted(SHAPES, key=lambda shape: shape != "1.3B")

    @property
    def compared(self) -> list[str]:
        """The models whose tokens are compared."""
        return self.shapes[:2]

    def config(self, shape: str) -> gptneo_fast.GPTNeoConfig:
        """The configuration of one of them."""
        return gptneo_fast.GPTNeoConfig(**TINY) if shape == "tiny" else config_of(shape)

    @property
    def points(self) -> list[tuple[int, int]]:
        """(batch, context) of decoding, those that matter first."""
        first = [(1, 128), (8, 1024), (64, 2048)]
        more = {"quick": [], "normal": [(1, 1024), (1, 2048)], "full": [(b, c) for b in (1, 8, 64) for c in (128, 1024, 2048)]}
        return first if self.tiny else list(dict.fromkeys(first + more[self.mode]))

    def batch(self, rows: int) -> int:
        """Rows of a batch; a dry run has one, two or three."""
        return min(rows, 2 + (rows > 8)) if self.tiny else rows

    def length(self, tokens: int) -> int:
        """A context or prompt; the tiny model's are past its window of 8 where the others' are past theirs."""
        return (7 if tokens < 256 else 20) if self.tiny else tokens

    @property
    def dtype(self) -> torch.dtype:
        """What is measured: bfloat16; in a dry run, whose kernels are interpreted, float16, which takes the same tiles."""
        return torch.float16 if self.tiny else torch.bfloat16

    def need_early_launch(self) -> None:
        """Leave a case out where kernels cannot start early."""
        if self.device.type != "cuda" or torch.cuda.get_device_capability(self.device) < (9, 0):
            raise LeftOut("programmatic dependent launch needs a GPU of capability 9.0")


class LeftOut(Exception):  # noqa: N818 (nothing went wrong)
    """A case that cannot run here, with the reason."""


@dataclass(frozen=True)
class Case:
    """One measurement or check. run: returns a row of the results, or raises. seconds: what it is expected to take."""

    name: str
    run: Callable[[], dict[str, Any] | None]
    seconds: float = 5.0


def run_cases(cases: Iterable[Case], clock: Clock, path: Path | None = None) -> dict[str, Any]:
    """Run what the clock allows; the result is rewritten after every case, so that a process that dies leaves its rows.

    Args:
        path: of the result; None keeps nothing.

    Returns:
        {"rows": [...], "failures": {case: reason}, "left_out": {case: reason}}
    """
    found: dict[str, Any] = {"rows": [], "failures": {}, "left_out": {}}
    write(path, found)
    for case in cases:
        if clock.left() < case.seconds:
            found["left_out"][case.name] = f"{clock.left():.0f} s were left, it takes about {case.seconds:.0f}"
            write(path, found)
            continue
        _attempt(case, found)
        usable = _settle()
        if not usable:
            found["failures"]["device"] = "the GPU reports an error that this process cannot recover from"
        write(path, found)
        if not usable:
            break
    return found


def _attempt(case: Case, found: dict[str, Any]) -> None:
    """One case, its row or why there is none."""
    errors._warned.clear()  # what is warned of once in a process counts in every case
    try:
        row = case.run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found["rows"].append({"case": case.name} | (row or {}))
    except LeftOut as reason:
        found["left_out"][case.name] = str(reason)
    except (torch.OutOfMemoryError, errors.OutOfMemoryError) as error:
        found["left_out"][case.name] = f"out of memory: {str(error)[:120]}"
    except Exception as error:
        found["failures"][case.name] = f"{type(error).__name__}: {str(error).strip()[:600]}"
        print(f"{case.name} failed\n{traceback.format_exc()}", flush=True)


def _settle() -> bool:
    """Give back what the case before held; whether the device still answers this process."""
    gc.collect()
    if not torch.cuda.is_available():
        return True
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


def write(path: Path | None, values: dict[str, Any]) -> None:
    """JSON in place of what was there, whole at every moment; nothing where no path is given.

    Raises:
        ValueError: there is something at the path that is no regular file.
    """
    if path is None:
        return
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no regular file, and a new one would take its place; name another, or none")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(values, indent=1, default=str) + "\n")
    part.replace(path)
