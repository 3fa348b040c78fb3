"""Reading: prompts of requests into a cache of their own, in chunks, before the requests join the rows."""

from __future__ import annotations

from collections import OrderedDict

import torch

from ..errors import InputError
from ..generation.request import LanguageModel
from ..network import masks
from ..network.cache import KVCache
from .job import Job

_PREFIXES = 4  # that are kept
_FULL = 0.75  # of a batch of prompts that are read together, what must be tokens


def together(jobs: list[Job], tokens: int) -> bool:
    """Whether the prompts of several requests make one batch of up to so many tokens, with little padding."""
    lengths = [len(job.ids) - 1 for job in jobs]
    padded = len(jobs) * max(lengths)
    return not any(job.shared for job in jobs) and padded <= tokens and sum(lengths) >= _FULL * padded


class Reading:
    """Requests whose prompts are being read: all but their last tokens, after the prefix that one shares with others.

    jobs: one, or several that are read at once.
    """

    def __init__(self, model: LanguageModel, jobs: list[Job], prefixes: OrderedDict[object, KVCache]) -> None:
        self.model, self.jobs, self.prefixes = model, jobs, prefixes
        self.rows = [job.ids[:-1] for job in jobs]
        self.target = max(map(len, self.rows))
        self.shared = jobs[0].shared
        self.own = False  # whether the cache is theirs alone
        self.lasts = True  # whether the prefix is for others, too
        self.cache: KVCache | None = None
        self.family = jobs[0].family
        if self.shared and (found := prefixes.get(self.family)) is not None:
            prefixes.move_to_end(self.family)
            self.cache = found

    @property
    def done(self) -> int:
        """Columns that are read."""
        return 0 if self.cache is None else self.cache.get_seq_length()

    @property
    def is_complete(self) -> bool:
        """Whether the requests can join the others."""
        return self.done == self.target

    def run(self, most: int) -> int:
        """Read up to so many tokens, all of several requests; how many it were, padding included."""
        begin = self.done
        goal = len(self.shared) if begin < len(self.shared) else self.target
        end = min(goal, begin + most)
        if begin == end:
            return 0
        if self.cache is None:
            self.cache = self.model.transformer.new_cache(len(self.rows), goal)
        elif begin >= len(self.shared) and self.shared and not self.own:
            self.cache = self.cache.fork()
            self.cache.allocate(self.target, exact=True)
        self.own = begin >= len(self.shared)
        read(self.model, [row[begin:end] for row in self.rows], self.cache)
        if end == len(self.shared) and not self.own and self.lasts:
            self.prefixes[self.family] = self.cache
            while len(self.prefixes) > _PREFIXES:
                self.prefixes.popitem(last=False)
        return len(self.rows) * (end - begin)


def read(model: LanguageModel, texts: list[list[int]], cache: KVCache) -> None:
    """Append tokens to a cache of as many rows; of several, which may be of any lengths, to an empty one."""
    T, past, device = max(map(len, texts)), cache.get_seq_length(), model.device
    starts = [T - len(text) for text in texts]
    ids = torch.tensor([[0] * start + text for start, text in zip(starts, texts, strict=True)], device=device)
    places = torch.arange(past, past + T, device=device)[None]
    padding = torch.tensor(starts, device=device)[:, None] if any(starts) else None
    places = places if padding is None else (places - padding).clamp(min=0)
    if model.looked().forward:  # nobody asks for logits
        rows = masks.Rows() if padding is None else masks.Rows(starts=padding[:, 0].int())
        model.transformer.run(ids, places, rows=rows, cache=cache)
        return
    mask = None if padding is None else (torch.arange(T, device=device) >= padding).long()
    how = {"attention_mask": mask, "position_ids": places, "use_cache": True, "logits_to_keep": 1, "return_dict": True}
    model(ids, past_key_values=cache, **how)
    require_read(cache, past + T)


def require_read(cache: KVCache, columns: int) -> None:
    """Raise where the model's own forward has not appended what it was given.

    Raises:
        InputError: says how many columns there are.
    """
    if cache.get_seq_length() != columns:
        raise InputError(
            f"the model's forward left {cache.get_seq_length()} columns in past_key_values where {columns} belong; it must "
            "take and fill the cache that it is given, and not train with gradient checkpointing"
        )
