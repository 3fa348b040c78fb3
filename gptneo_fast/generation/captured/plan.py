"""What a captured step needs to know of a request, and which requests need the host at every step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...ops.sampling import ALL, END, FEW, FREE, GREEDY, KEEP, NOT_FIRST, SUPPRESSED
from ..processors import MinLength, RepetitionPenalty, SuppressTokens
from ..session import Prompt
from ..stepwise import Request
from ..stopping import EndToken, MaxLength
from ..warpers import MinP, Temperature, TopK, TopP

_ON_DEVICE = (MinLength, RepetitionPenalty, SuppressTokens, MinP, Temperature, TopK, TopP)
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio, odd


def why_stepwise(prompt: Prompt, request: Request) -> str | None:
    """Which of a request's wishes needs the host at every step, or None where the captured step does it all."""
    options = request.options
    for processor in request.processors:
        if type(processor) not in _ON_DEVICE:
            return f"{type(processor).__name__} runs on the host"
    for criterion in request.criteria:
        if type(criterion) not in (MaxLength, EndToken):
            return f"{type(criterion).__name__} runs on the host"
    given = {
        "use_cache=False": not options.use_cache,
        "return_dict_in_generate": options.return_dict_in_generate,
        "prefill_chunk_size": options.prefill_chunk_size is not None,
        "inputs_embeds": prompt.embeds is not None,
        "past_key_values": prompt.cache is not None,
        "position_ids": prompt.position_ids is not None,
        "token_type_ids": prompt.token_type_ids is not None,
        "a mask with holes or right padding": prompt.mask is not None and not _left_padded(prompt.mask),
    }
    return next((f"{name} asks for the stepwise path" for name, wanted in given.items() if wanted), None)


def _left_padded(mask: Tensor) -> bool:
    held = mask != 0
    return bool((held[:, 1:] >= held[:, :-1]).all())


@dataclass(frozen=True)
class Drawing:
    """How tokens are drawn: the arguments of the `sample` op that stay the same through a request, on the host.

    method: GREEDY, FREE, FEW or ALL. rates: of 4 numbers. counts: of 3. flags: uint8 [V]. seeds: int64 [B].
    penalty: whether repetition_penalty wants to know which tokens a row has.
    """

    method: int
    rates: list[float]
    counts: list[int]
    flags: Tensor
    seeds: Tensor
    penalty: bool

    @classmethod
    def of(cls, prompt: Prompt, request: Request, vocabulary: int) -> Drawing:
        """The drawing that a request asks for; draws a seed from torch's generator where it names none."""
        temperature, top_k, top_p, min_p, penalty, least = 1.0, 0, 1.0, 0.0, 1.0, 0
        flags = torch.zeros(vocabulary, dtype=torch.uint8)
        P = prompt.ids.shape[1]
        for p in request.processors:
            match p:
                case Temperature():
                    temperature = p.temperature
                case TopK():
                    top_k = p.k if p.k < vocabulary else 0
                case TopP():
                    top_p = p.p
                case MinP():
                    min_p = p.p
                case RepetitionPenalty():
                    penalty = p.penalty
                case MinLength():
                    least = max(0, p.length - P)
                case SuppressTokens():
                    _mark(flags, p.ids, SUPPRESSED if p.length is None else NOT_FIRST)
        for criterion in request.criteria:
            if isinstance(criterion, EndToken):
                _mark(flags, criterion.ids.tolist(), END)
        if not request.options.do_sample:
            method = GREEDY
        elif 0 < top_k <= KEEP:
            method = FEW
        else:
            method = ALL if top_k or top_p < 1 or min_p > 0 else FREE
        seed = request.options.seed
        if seed is None:
            seed = int(torch.randint(2**63 - 1, ())) if request.options.do_sample else 0
        places = range(len(prompt.ids)) if prompt.places is None else prompt.places
        return cls(
            method,
            [temperature, top_p, min_p, penalty],
            [top_k, least, request.total - P],
            flags,
            torch.tensor([_seed_of(seed, place) for place in places]),
            penalty != 1,
        )


def _mark(flags: Tensor, ids: Any, bit: int) -> None:
    inside = [i for i in ids if 0 <= i < len(flags)]
    flags[inside] |= bit


def _seed_of(seed: int, place: int) -> int:
    """Key of a row's random numbers, int64: step `place` of SplitMix64 from a seed of up to 64 bits; Steele et al. 2014."""
    z = (seed + (place + 1) * _GOLDEN) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    z ^= z >> 31
    return z - 2**64 if z >= 2**63 else z
