"""What a captured step needs to know of a request, and which requests need the host at every step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...ops.constants import ALL, END, FEW, FREE, GREEDY, KEEP, NOT_FIRST, SUPPRESSED
from ..processors import (
    MinLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
)
from ..request import Request
from ..stopping import EosTokenCriteria, MaxLengthCriteria
from ..warpers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

_ON_DEVICE = (
    MinLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio, odd


def why_stepwise(request: Request) -> str | None:
    """Which of a request's wishes needs the host at every step, or None where the captured step does it all."""
    options, prompt = request.options, request.prompt
    for processor in (*request.own, *(p for p in request.processors if type(p) not in _ON_DEVICE)):
        return f"{type(processor).__name__} runs on the host"
    for criterion in request.criteria:
        if type(criterion) not in (MaxLengthCriteria, EosTokenCriteria):
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
class SamplingParams:
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
    def of(cls, request: Request, vocabulary: int) -> SamplingParams:
        """The parameters that a request's options ask for; draws a seed from torch's generator where they name none."""
        o, P = request.options, request.prompt.ids.shape[1]
        least = (o.min_length - P) if o.min_new_tokens is None else o.min_new_tokens
        flags = torch.zeros(vocabulary, dtype=torch.uint8)
        for ids, bit in ((o.suppress_tokens, SUPPRESSED), (o.begin_suppress_tokens, NOT_FIRST), (o.eos_ids, END)):
            flags[[i for i in ids or () if 0 <= i < vocabulary]] |= bit
        method, temperature, top_k, top_p, min_p = GREEDY, 1.0, 0, 1.0, 0.0
        if o.do_sample:
            temperature, top_p, min_p = o.temperature, o.top_p, o.min_p or 0.0
            top_k = o.top_k if o.top_k < vocabulary else 0
            method = FEW if 0 < top_k <= KEEP else ALL if top_k or top_p < 1 or min_p > 0 else FREE
        seed = o.seed
        if seed is None:
            seed = int(torch.randint(2**63 - 1, ())) if o.do_sample else 0
        places = range(len(request.prompt.ids)) if request.prompt.places is None else request.prompt.places
        return cls(
            method=method,
            rates=[temperature, top_p, min_p, o.repetition_penalty],
            counts=[top_k, max(0, least), request.total - P],
            flags=flags,
            seeds=torch.tensor([_seed_of(seed, place) for place in places]),
            penalty=o.repetition_penalty != 1,
        )


def _seed_of(seed: int, place: int) -> int:
    """Key of a row's random numbers, int64: step `place` of SplitMix64 from a seed of up to 64 bits; Steele et al. 2014."""
    z = (seed + (place + 1) * _GOLDEN) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    z ^= z >> 31
    return z - 2**64 if z >= 2**63 else z
