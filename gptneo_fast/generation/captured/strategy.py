"""The captured strategy: which requests it serves, and how their tokens come from the device."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..request import Generation, LanguageModel, Request, joined, non_finite
from .params import SamplingParams, why_stepwise
from .runner import BUCKETS, broken_rows
from .speculation import why_not_drafts

_REPLAYS, _REPLAYS_STREAMED = 16, 4  # steps between looks at the device


def why_not(model: LanguageModel, request: Request) -> str | None:
    """Why the steps of a request cannot be captured, or None."""
    for each in (model, request.assistant):
        if each is not None and (each.backend.name != "triton" or each.device.type != "cuda"):
            return f"the {each.backend.name} backend on {each.device.type} is stepwise"
    return why_not_on_device(model, request)


def why_not_on_device(model: LanguageModel, request: Request) -> str | None:
    """What needs the host, on a device that can capture."""
    if not all(each.looked(anew=True) for each in (model, request.assistant) if each is not None):
        return "a module was hooked, replaced, patched or set to train, and a captured step would go on without that"
    if (rows := len(request.prompt.ids)) > BUCKETS[-1]:
        return f"{rows} rows are more than the {BUCKETS[-1]} that steps are captured for"
    why = why_stepwise(request)
    return why_not_drafts(request) if why is None and request.drafts else why


def captured(model: LanguageModel, request: Request) -> Iterator[Tensor]:
    """New tokens int64 [B, 1] of each step, on the host: to send one to the device would mean to wait for the steps that are
    queued there.

    Raises:
        NonFiniteLogitsError: after the other rows have ended, names the rows whose logits were NaN or infinite.
        OutOfMemoryError: see `check_memory`. InputError: the model was touched before its last step.
    """
    prompt = request.prompt
    B, P = prompt.ids.shape
    params = SamplingParams.of(request, model.config.vocab_size)
    runner = model.idle_runners.take(model, request)
    replays = _REPLAYS_STREAMED if request.streamed else _REPLAYS
    pieces: list[Tensor] = []
    columns, broken, drawn = 0, [], torch.zeros(B, dtype=torch.int64)
    try:
        for tokens, status, drawn in runner.run(prompt.ids, prompt.mask, params, replays):
            if not pieces:
                model.last_generation = _generation(runner.why_launched)
            places = torch.arange(columns, columns + tokens.shape[1])
            columns += tokens.shape[1]
            broken = broken_rows(status)
            piece = torch.where(places < drawn[:, None], tokens, request.options.pad_id or 0)
            pieces.append(piece)
            yield from piece.split(1, 1)
    finally:
        model.idle_runners.give_back(model, runner)
    if broken:
        raise non_finite({i: P + int(drawn[i]) for i in broken}, joined(prompt.ids, pieces))


def _generation(why_launched: str | None) -> Generation:
    if why_launched is None:
        return Generation("captured", "every option runs on the device")
    return Generation("launched", f"the step could not be captured: {why_launched}")
