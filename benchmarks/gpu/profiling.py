"""What a decode step launches, how much of it the device works, and the slowest kernels."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.ours import Ours
from benchmarks.gpu.stage import Case, Setting


def cases(setting: Setting) -> Iterator[Case]:
    """One decode profile of each model."""
    for shape in setting.shapes:
        yield Case(f"{shape} decode step", lambda shape=shape: decode_profile(setting, shape), 8)


@torch.no_grad()
def decode_profile(setting: Setting, shape: str) -> dict[str, Any]:
    """Launches a token, busy share of the device, the five slowest kernels with their share of the busy time."""
    ours = Ours(setting.config(shape), setting.dtype, setting.device)
    count = 2 if setting.tiny else 8
    step = ours.decoder(1, setting.length(1024), 2 * count)
    for _ in range(count):
        step()
    cuda = not setting.tiny
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as record:
        began = time.perf_counter()
        for _ in range(count):
            step()
        if cuda:
            torch.cuda.synchronize()
        wall = time.perf_counter() - began
    proof = step.check()
    kernels: dict[str, list[float]] = defaultdict(list)
    for event in record.events():
        if not cuda or event.device_type == torch.autograd.DeviceType.CUDA:
            kernels[event.name].append((event.device_time if cuda else event.self_cpu_time_total) / 1e6)
    busy = sum(map(sum, kernels.values()))
    slowest = sorted(kernels.items(), key=lambda item: -sum(item[1]))[:5]
    return proof | {
        "launches a token": sum(map(len, kernels.values())) / count,
        "us a token": wall / count * 1e6,
        "busy share": busy / wall,
        "slowest": [
            {"kernel": name[:80], "a token": len(t) / count, "us": sum(t) / len(t) * 1e6, "share": sum(t) / busy}
            for name, t in slowest
        ],
    }
