"""ScoringMixin: log-probabilities of the tokens of texts, and perplexity."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from ..config import is_int
from ..errors import InputError, NonFiniteLogitsError, short
from ..network.cache import KVCache
from ..progress import of_batches
from .batches import Text, batches, budget_of, ids_of, texts_of

WANT = ("logprob", "rank", "greedy", "entropy", "mean", "variance")


@dataclass(frozen=True)
class Score:
    """What the model says of the tokens of one text, on the CPU; None for what was not wanted.

    tokens: those that have a score. total: the sum of their log-probabilities.
    logprob: float32 [n], natural logarithms. rank: int64 [n], how many tokens were likelier (of equals, those with lower
        ids). greedy: boolean [n], whether none was. entropy: float32 [n], in nats. mean, variance: float32 [n], of the
        log-probability under the model's distribution, as Min-K%++ takes them.
    """

    tokens: list[int]
    total: float
    logprob: Tensor | None = None
    rank: Tensor | None = None
    greedy: Tensor | None = None
    entropy: Tensor | None = None
    mean: Tensor | None = None
    variance: Tensor | None = None


class ScoringMixin:
    """What GPTNeoForCausalLM offers to people who measure texts. Strings need `tokenizer`."""

    tokenizer: Any

    @torch.no_grad()
    def score(
        self,
        texts: Text | Iterable[Text],
        context: Text | None = None,
        want: Sequence[str] = ("logprob",),
        *,
        progress: bool | None = None,
    ) -> Score | list[Score]:
        """Log-probabilities of the tokens of a text, or of each of several of any lengths, in their order.

        Of a text without context the first token has nothing before it and no score. Texts run together by length; logits
        exist for a few rows at a time only.

        Args:
            texts: a string or token ids, or several; an empty one has no tokens and a total of 0.
            context: what comes before each text, computed once; "" for the beginning of a text.
            want: of "logprob", "rank", "greedy", "entropy", "mean" and "variance".
            progress: show a bar on standard error; None for where that is a terminal and there are several batches.

        Raises:
            InputError: neither text nor ids, too long for the model's positions, or another `want`.
            NonFiniteLogitsError: NaN or infinite logits in some texts; the others are complete, in its `scores`.
            SetupError: text, and the model has no tokenizer.
        """
        if isinstance(want, str) or not set(want) <= set(WANT):
            raise InputError(f"want={short(want)}; give a list of {', '.join(WANT)}")
        model = cast(Any, self)
        given, single = texts_of(texts)
        before = self._before(context)
        rows = [ids_of(self.tokenizer, text, model.config.vocab_size, f"text {i}") for i, text in enumerate(given)]
        limit = model.config.max_position_embeddings + 1  # the last token is not fed
        for i, row in enumerate(rows):
            if len(before) + len(row) > limit:
                raise InputError(
                    f"text {i} has {len(row)} tokens{f' after {len(before)} of context' if before else ''}, and the model "
                    f"scores up to {limit}; cut it, or measure it with perplexity(text)"
                )
        scores: list[Score] = [Score([], 0.0)] * len(rows)
        past = self._past(before[:-1])
        first = before[-1:]
        found = self._scored([first + row for row in rows], past, progress)
        for i, row in enumerate(rows):
            scores[i] = _score_of(row if before else row[1:], found[i], want)
        broken = {i: int(own[0].isnan().nonzero()[0]) for i, own in enumerate(found) if own[0].isnan().any()}
        if broken:
            names, counts = ", ".join(map(str, broken)), ", ".join(map(str, broken.values()))
            raise NonFiniteLogitsError(
                f"logits of text {names} were NaN or infinite after {counts} scored tokens; try dtype=torch.float32. The "
                "error's `scores` has those of all texts",
                list(broken),
                None,
                list(broken.values()),
                scores=scores,
            )
        return scores[0] if single else scores

    @torch.no_grad()
    def perplexity(self, text: Text, stride: int | None = None) -> float:
        """e to the mean of minus the log-probability of a text's tokens after the first, of any length.

        Windows as long as the model's positions go over the text; each scores what the one before has not, so that every
        token has at least `positions - stride` tokens before it where the text has (Hugging Face, "Perplexity of
        fixed-length models", with every token counted once).

        Args:
            stride: tokens by which a window moves; None for half of the positions.

        Raises:
            InputError: fewer than two tokens, or a stride of less than 1 or not below the positions.
        """
        model = cast(Any, self)
        positions = model.config.max_position_embeddings
        stride = max(1, positions // 2) if stride is None else stride
        if not is_int(stride) or not 1 <= stride < positions:
            raise InputError(f"stride={short(stride)} is not an integer from 1 to {positions - 1}, so that windows overlap")
        ids = ids_of(self.tokenizer, text, model.config.vocab_size, "text")
        if len(ids) < 2:
            raise InputError(f"the text has {len(ids)} tokens; perplexity is of those that have one before them")
        windows: list[list[int]] = []
        counts, end = list[int](), 1
        for begin in range(0, len(ids), stride):
            last = min(begin + positions, len(ids))
            if last > end or not windows:
                windows.append(ids[begin:last])
                counts.append(last - end)
                end = last
            if last == len(ids):
                break
        total = sum(float(own.double().sum()) for own, *_ in self._scored(windows, None, False, counts))
        return math.exp(-total / sum(counts))

    def _before(self, context: Text | None) -> list[int]:
        """Ids of a context; of an empty one the token that begins texts."""
        model = cast(Any, self)
        if context is None:
            return []
        ids = ids_of(self.tokenizer, context, model.config.vocab_size, "context")
        if not ids and model.config.bos_token_id is None:
            raise InputError("context is empty and the configuration has no bos_token_id; give one token at least, or None")
        return ids or [model.config.bos_token_id]

    def _past(self, ids: list[int]) -> KVCache | None:
        """A cache of one row that holds ids; None for none."""
        if not ids:
            return None
        model = cast(Any, self)
        tokens = torch.tensor([ids], device=model.device)
        cache = model(tokens, use_cache=True, logits_to_keep=1, return_dict=True).past_key_values
        if not isinstance(cache, KVCache) or cache.get_seq_length() != len(ids):
            raise InputError(
                "the model's forward gave no cache of the context; it must do so with use_cache=True, and not train with "
                "gradient checkpointing; or put the context before each text"
            )
        return cache

    def _scored(
        self, rows: list[list[int]], past: KVCache | None, progress: bool | None, counts: Sequence[int] | None = None
    ) -> list[tuple[Tensor, ...]]:
        """Statistics of the tokens of each row after its first, on the CPU: log-probability, rank, entropy, variance [n].

        counts: of how many, the last ones; None for all.
        """
        model = cast(Any, self)
        nothing = torch.zeros(0), torch.zeros(0, dtype=torch.int64), torch.zeros(0), torch.zeros(0)
        found: list[tuple[Tensor, ...]] = [nothing] * len(rows)
        lengths = [max(0, len(row) - 1) for row in rows]
        held = 0 if past is None else past.get_seq_length()
        for batch in of_batches(batches(lengths, budget_of(model.device), held), "text", progress):
            T = lengths[batch[0]]
            ids = torch.tensor([rows[i][:-1] + [0] * (T - lengths[i]) for i in batch], device=model.device)
            sizes = [lengths[i] if counts is None else min(counts[i], lengths[i]) for i in batch]
            ends = torch.tensor([[lengths[i]] for i in batch], device=model.device)
            begins, columns = ends - torch.tensor(sizes, device=model.device)[:, None], torch.arange(T, device=model.device)
            targets = torch.tensor(
                [t for i, n in zip(batch, sizes, strict=True) for t in rows[i][len(rows[i]) - n :]], device=model.device
            )
            wanted = (columns >= begins) & (columns < ends)
            results = model.logprobs(ids, (columns < ends).long(), wanted, targets, past)
            for i, *row in zip(batch, *(t.cpu().split(sizes) for t in results), strict=True):
                found[i] = tuple(row)
        return found


def _score_of(tokens: list[int], found: tuple[Tensor, ...], want: Sequence[str]) -> Score:
    own, rank, entropy, variance = found
    every = {"logprob": own, "rank": rank, "greedy": rank == 0, "entropy": entropy, "mean": -entropy, "variance": variance}
    return Score(tokens, own.double().sum().item(), **{name: every[name] for name in want})
