"""Whether every path of one model gives the same tokens in the dtype that is timed, and logits within the budget of float64."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import gptneo_fast
from benchmarks.gpu.ours import Ours, check_captured
from benchmarks.gpu.stage import Case, LeftOut, Setting

ROWS = (1, 3, 64)
PROMPT, NEW = 200, 100  # tokens: past the window of 256


def cases(setting: Setting) -> Iterator[Case]:
    """The first model, then the next."""
    for shape in setting.compared:
        paths = Paths(setting, shape)
        for rows in ROWS:
            name = f"{shape}, {rows} rows: captured tokens equal stepwise ones"
            yield Case(name, lambda paths=paths, rows=rows: paths.captured(rows), 5)
        for rows in ROWS:
            name = f"{shape}, {rows} rows: early launches change no token"
            yield Case(name, lambda paths=paths, rows=rows: paths.early(rows), 5)
        yield Case(f"{shape}: logits and tokens beside plain torch and float64", paths.verified, 8)
        yield Case(f"{shape}: memory given back", paths.close, 0)


def few_bits_cases(setting: Setting) -> Iterator[Case]:
    """One row of the first model, three of the next, in 8 and in 4 bits."""
    for bits, (shape, rows) in itertools.product(("int8", "int4"), zip(setting.compared, (1, 3), strict=False)):
        paths = Paths(setting, shape, bits)
        yield Case(f"{shape} {bits}: {rows} rows beside plain torch and float64", lambda p=paths, n=rows: p.verified(n), 8)
        yield Case(f"{shape} {bits}: memory given back", paths.close, 0)


class Paths:
    """One model of random weights, made when first needed. quantize: "int8" or "int4" for weights in few bits."""

    def __init__(self, setting: Setting, shape: str, quantize: str | None = None) -> None:
        self.setting, self.config, self.quantize = setting, setting.config(shape), quantize
        self.prompt, self.new = (7, 2) if setting.tiny else (PROMPT, NEW)  # the tiny window is 8
        self._model: Any = None

    @property
    def model(self) -> Any:
        """Ours, on the kernels."""
        if self._model is None:
            self._model = Ours(self.config, self.setting.dtype, self.setting.device, self.quantize).model
        return self._model

    def close(self) -> None:
        """Let go of the model."""
        self._model = None

    def tokens(self, rows: int, early_launch: bool = False, stepwise: bool = False) -> Tensor:
        """Greedy continuations of random prompts, int64 [rows, prompt + new]."""
        model, generator = self.model, torch.Generator().manual_seed(rows)
        ids = torch.randint(0, self.config.vocab_size, (self.setting.batch(rows), self.prompt), generator=generator)
        model.release_memory()  # no step of an earlier call stands for this one
        model.early_launch = early_launch
        how = dict(max_new_tokens=self.new, min_new_tokens=self.new, do_sample=False, pad_token_id=0)
        try:
            if stepwise:  # which an output of its own asks for
                return model.generate(ids.to(model.device), return_dict_in_generate=True, **how).sequences
            return model.generate(ids.to(model.device), **how)
        finally:
            model.early_launch = False

    def captured(self, rows: int) -> dict[str, Any]:
        """The captured step beside launched ones."""
        stepwise, captured = self.tokens(rows, stepwise=True), self.tokens(rows)
        path = check_captured(self.model, self.setting.device)
        _same(captured, stepwise)
        if path != "captured":
            raise LeftOut("steps are captured on a GPU; without one both paths launch them, and their tokens are equal")
        return {"tokens": self.new, "path": path}

    def early(self, rows: int) -> dict[str, Any]:
        """Captured steps whose kernels start early beside captured steps whose kernels do not."""
        self.setting.need_early_launch()
        plain, early = self.tokens(rows), self.tokens(rows, early_launch=True)
        path = check_captured(self.model, self.setting.device)
        _same(early, plain)
        return {"tokens": self.new, "path": path}

    def verified(self, rows: int = 3) -> dict[str, Any]:
        """`gptneo_fast.verify`: logits against float64 within the budget, tokens of the fast path against plain torch's."""
        found = gptneo_fast.verify(self.model, rows=1 if self.setting.tiny else rows, new_tokens=self.new)
        if not found.ok:
            raise AssertionError(str(found))
        row = {
            "path": found.path,
            "error": found.error,
            "allowed": found.allowed,
            "error over budget": found.error / found.allowed,
        }
        return row | {"tokens": found.tokens, "first different": None if found.divergence is None else str(found.divergence)}


def _same(got: Tensor, expected: Tensor) -> None:
    if not torch.equal(got, expected):
        row, at = (got != expected).nonzero()[0].tolist()
        raise AssertionError(f"column {at} of row {row} differs: {got[row, at].item()} and {expected[row, at].item()}")
