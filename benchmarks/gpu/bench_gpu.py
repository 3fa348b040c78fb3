"""The whole-model matrix of `make gpu` under pytest, on a machine with a GPU: ours first, then the peers."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu import whole
from benchmarks.gpu.stage import LeftOut, Setting

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU; bench_cpu.py measures this machine")

SETTING = Setting(mode="normal")
CASES = [*whole.decode_cases(SETTING), *whole.our_cases(SETTING), *whole.peer_cases(SETTING, SETTING.shapes)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_whole_model(benchmark, case):
    """One case, timed by its own clock (events, chains of steps); the row stands in extra_info."""
    try:
        row = benchmark.pedantic(case.run, rounds=1)
    except LeftOut as reason:
        pytest.skip(str(reason))
    benchmark.extra_info.update(row or {})
