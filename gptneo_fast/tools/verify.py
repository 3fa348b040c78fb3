"""verify(): proof of equality on the user's own machine, the fast path beside the reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..network import quantized

ORDERS = 4  # in which plain torch computes the logits; the first is as given


@dataclass(frozen=True)
class Divergence:
    """The first token that differs.

    row, token: where, counted from the first new token.
    margin: by how much the reference preferred its own there. error: by how much plain torch in the model's dtype may be
    wrong about such a margin, twice the largest error of its logits there against float64.
    """

    row: int
    token: int
    margin: float
    error: float


@dataclass(frozen=True)
class Verification:
    """What `verify` found.

    ok: errors within their budgets, and tokens equal but where the choice was within the error.
    backend, path: what computed. dtype: in which.
    error, allowed: largest error of the fast path's logits, and twice that of plain torch in the same dtype with one rounding.
        What plain torch errs is the most of several orders of its sums (`ORDERS`), of which one is as lucky as another.
    mean_error, mean_allowed: the same of the mean, with 1.5 in place of 2.
    tokens: how many were generated on both paths. divergence: the first that differs, or None.
    """

    ok: bool
    backend: str
    path: str
    dtype: str
    error: float
    allowed: float
    mean_error: float
    mean_allowed: float
    tokens: int
    divergence: Divergence | None

    def __str__(self) -> str:
        first = "all equal"
        if self.divergence is not None:
            d = self.divergence
            first = (
                f"first different one: row {d.row}, token {d.token}, where the reference's two best are {d.margin:.3g} apart"
            )
        return (
            f"{'verified' if self.ok else 'NOT EQUAL'}: {self.backend} backend, {self.path} path, {self.dtype}\n"
            f"  logits: largest error {self.error:.3g} of {self.allowed:.3g} allowed, "
            f"mean {self.mean_error:.3g} of {self.mean_allowed:.3g}\n"
            f"  tokens: {self.tokens} generated greedily on both paths, {first}"
        )


@torch.no_grad()
def verify(model: Any, *, rows: int = 3, new_tokens: int = 64, seed: int = 0) -> Verification:
    """Run prompts that cross the window on the model's own path and on the reference, and compare.

    Logits are held against the reference in float64 (a copy of the model, for the time of the call), with the error that
    plain torch makes in the model's dtype as the measure; greedy tokens against those of the reference path.

    Args:
        model: a GPTNeoForCausalLM.
        rows: prompts of random tokens, of different lengths, together in one left-padded batch.
        new_tokens: generated for each.
        seed: of the prompts.

    Raises:
        InputError: the model cannot generate, or has too few positions for `new_tokens`.
    """
    if not getattr(model, "can_generate", lambda: False)():
        raise InputError(f"verify needs a GPTNeoForCausalLM; this is a {type(model).__name__}")
    config, limit = model.config, model.config.max_position_embeddings
    longest = min(2 * config.window_size + 45, limit - new_tokens)
    if rows < 1 or new_tokens < 1 or longest < rows:
        raise InputError(f"{rows} rows and {new_tokens} new tokens do not fit a model of {limit} positions; take fewer")
    plain = twin(model, model.dtype)
    ids, mask = _prompts(rows, longest, config.vocab_size, seed, model.device)
    new = dict(attention_mask=mask, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
    fast_tokens, path = model.generate(ids, **new), model.last_generation.path
    plain_tokens = plain.generate(ids, **new)

    fast, usual = (_logits(m, ids, mask) for m in (model, plain))
    exact = _logits(twin(model, torch.float64), ids, mask)
    rounding = (exact.to(model.dtype).double() - exact).abs()
    orders = (usual, *(_logits(reordered(plain, order), ids, mask) for order in range(1, ORDERS)))
    error, may = (fast - exact).abs(), [(logits - exact).abs() + rounding for logits in orders]
    most, mean = (max(getattr(t, kind)().item() for t in may) for kind in ("max", "mean"))
    numbers = error.max().item(), 2 * most, error.mean().item(), 1.5 * mean
    found = first_divergence(plain, fast_tokens, plain_tokens, mask)
    ok = numbers[0] <= numbers[1] and numbers[2] <= numbers[3]
    ok = ok and (found is None or found.margin <= max(found.error, 2 * numbers[1]))
    dtype = str(model.dtype).removeprefix("torch.")
    return Verification(ok, model.backend.name, path, dtype, *numbers, rows * new_tokens, found)


def twin(model: Any, dtype: torch.dtype) -> Any:
    """The same model on the reference path, sharing its weights where the dtype is theirs; those in few bits are floats."""
    with torch.device("meta"):
        twin = type(model)(model.config, backend="reference")
    state = {name: p.to(dtype) for name, p in model.state_dict().items()}
    for name, weight in quantized.weights(model).items():
        for part in ("values", "scales"):
            del state[f"{name}.weight.{part}"]
        state[f"{name}.weight"] = weight.dequantize(dtype)
    twin.load_state_dict(state, assign=True)
    twin.tie_weights()
    return twin.eval()


def reordered(model: Any, seed: int) -> Any:
    """A twin whose hidden axis C lies in another order: it adds the same numbers in another order."""
    other, state = twin(model, model.dtype), {}
    for name, p in model.state_dict().items():
        module, kind = name.split(".")[-2:]
        axis = 0 if module in ("out_proj", "c_proj") or module.startswith("ln_") else p.dim() - 1
        order = torch.randperm(p.shape[axis], generator=torch.Generator().manual_seed(seed)).to(p.device)
        state[name] = p if module == "c_fc" and kind == "bias" else p.index_select(axis, order)
    other.load_state_dict(state, assign=True)
    other.tie_weights()
    return other


def _prompts(rows: int, longest: int, vocabulary: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random ids int64 [B, T] and their mask; row i is shorter by i shares of the batch."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, (rows, longest), generator=generator).to(device)
    starts = torch.arange(rows, device=device)[:, None] * (longest // rows)
    return ids, (torch.arange(longest, device=device) >= starts).long()


def _logits(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits float64 [tokens, V] of every token that is not padding."""
    out: Tensor = model(ids, attention_mask=mask, use_cache=False).logits[mask != 0].double()
    return out


def first_divergence(plain: Any, tokens: Tensor, expected: Tensor, mask: Tensor) -> Divergence | None:
    """Where tokens int64 [B, T + new] leave those of the reference model `plain`, whose prompts have this mask [B, T]."""
    different = tokens != expected
    if not bool(different.any()):
        return None
    column = int(different.any(0).nonzero()[0])
    row = int(different[:, column].nonzero()[0])
    start = int((mask[row] != 0).nonzero()[0])
    text = expected[row : row + 1, start:column]
    logits, exact = (m(text, use_cache=False).logits[0, -1].double() for m in (plain, twin(plain, torch.float64)))
    margin = (logits[expected[row, column]] - logits[tokens[row, column]]).item()
    return Divergence(row, column - mask.shape[1], margin, 2 * (logits - exact).abs().max().item())
