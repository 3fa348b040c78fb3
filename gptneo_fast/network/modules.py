"""The modules of a block. They hold the parameters under transformers' names; ops compute."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import GPTNeoConfig
from ..ops import reference
from .cache import STEP, KVCache
from .masks import Rows


class SelfAttention(nn.Module):
    """q, k and v without bias, heads, out_proj with bias."""

    def __init__(self, config: GPTNeoConfig, layer: int) -> None:
        super().__init__()
        C = config.hidden_size
        self.layer = layer
        self.window = config.window(layer)
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.attention_dropout, self.resid_dropout = config.attention_dropout, config.resid_dropout
        self.k_proj = nn.Linear(C, C, bias=False)
        self.v_proj = nn.Linear(C, C, bias=False)
        self.q_proj = nn.Linear(C, C, bias=False)
        self.out_proj = nn.Linear(C, C)

    def forward(
        self, x: Tensor, norm: nn.LayerNorm, rows: Rows, cache: KVCache | None, op: ModuleType, want_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """x + attention(norm(x)), and the weights [B, H, T, S] where they are wanted. x: [B, T, C]."""
        wq, wk, wv = self.q_proj.weight, self.k_proj.weight, self.v_proj.weight
        args = (x, norm.weight, norm.bias, wq, wk, wv, norm.eps)
        dropout = self.attention_dropout if self.training else 0.0
        masked = want_weights or dropout > 0 or rows.mask is not None
        weights = None
        if cache is not None and cache.get_seq_length() > 0 and x.shape[1] <= STEP and not masked:
            y = self._step(args, rows.starts, cache, op)
        else:
            q, k, v = (self._heads(t) for t in op.norm_qkv(*args))
            if masked:
                y, weights = self._masked(q, k, v, rows, cache, op, dropout)
            else:
                y = self._attend(q, k, v, rows, cache, op)
        return _add(op, y, self.out_proj, x, self.resid_dropout if self.training else 0.0), weights

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], self.num_heads, self.head_dim).transpose(1, 2)  # [B, T, C] -> [B, H, T, D]

    def _step(self, qkv_args: tuple, starts: Tensor | None, cache: KVCache, op: ModuleType) -> Tensor:
        """A short step over a past: appends first, then reads everything from the slots. Returns [B, T, C]."""
        k_cache, v_cache = cache.keys[self.layer], cache.values[self.layer]
        q = self._heads(op.norm_qkv_append(*qkv_args, k_cache, v_cache, cache.lengths, starts))
        seen = cache.past(self.layer, cache.get_seq_length() + q.shape[2])
        return op.decode_attention(q, *seen, cache.lengths, self.window, starts)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, rows: Rows, cache: KVCache | None, op: ModuleType) -> Tensor:
        """Attention over ranges of columns; appends to the cache. Returns [B, T, C]."""
        if cache is None:
            return op.attention(q, k, v, self.window, rows.starts, rows.ends)
        past = cache.get_seq_length()
        k_cache, v_cache = cache.keys[self.layer], cache.values[self.layer]
        old = (*cache.past(self.layer, past), cache.lengths) if past else ()
        y = op.attention(q, k, v, self.window, rows.starts, rows.ends, *old)
        op.kv_append(k_cache, v_cache, k, v, cache.lengths, rows.starts)
        return y

    def _masked(
        self, q: Tensor, k: Tensor, v: Tensor, rows: Rows, cache: KVCache | None, op: ModuleType, dropout: float
    ) -> tuple[Tensor, Tensor]:
        """Attention under any mask, on the reference path; appends to the cache. Returns [B, T, C] and the weights."""
        mask, T = _as_mask(rows, q.shape[2]), q.shape[2]
        past = evicted = 0
        if cache is not None:
            past = cache.get_seq_length()
            keys, values = cache.in_order(self.layer)
            if mask is None and cache.ragged:  # columns that were never stored may not be seen
                columns = torch.arange(past + T, device=q.device)
                mask = (columns >= (past - cache.lengths)[:, None])[:, None, None]
            elif mask is not None and rows.mask is None:  # left padding: the stored columns come first
                columns = torch.arange(past, device=q.device)
                stored = (columns >= (past - cache.lengths)[:, None])[:, None, None]
                mask = torch.cat([stored, mask], -1)
            op.kv_append(cache.keys[self.layer], cache.values[self.layer], k, v, cache.lengths, rows.starts)
            evicted = past - keys.shape[2]
            k, v = torch.cat([keys, k], 2), torch.cat([values, v], 2)
            mask = mask if mask is None else mask[..., evicted:]
        y, weights = reference.masked_attention(q, k, v, mask, self.window, dropout)
        return y, F.pad(weights, (evicted, 0))


class Attention(nn.Module):
    """The level of names between a block and its self-attention: `attn.attention.q_proj`."""

    def __init__(self, config: GPTNeoConfig, layer: int) -> None:
        super().__init__()
        self.attention = SelfAttention(config, layer)


class MLP(nn.Module):
    """c_fc, gelu_new, c_proj."""

    def __init__(self, config: GPTNeoConfig) -> None:
        super().__init__()
        self.resid_dropout = config.resid_dropout
        self.c_fc = nn.Linear(config.hidden_size, config.ffn_size)
        self.c_proj = nn.Linear(config.ffn_size, config.hidden_size)

    def forward(self, x: Tensor, norm: nn.LayerNorm, op: ModuleType) -> Tensor:
        """x + mlp(norm(x)). x: [B, T, C]."""
        y = op.norm_linear(x, norm.weight, norm.bias, self.c_fc.weight, self.c_fc.bias, norm.eps, True)
        return _add(op, y, self.c_proj, x, self.resid_dropout if self.training else 0.0)


class Block(nn.Module):
    """One layer."""

    def __init__(self, config: GPTNeoConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, rows: Rows, cache: KVCache | None, op: ModuleType, want_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """[B, T, C] to [B, T, C], and the attention weights where they are wanted."""
        x, weights = self.attn.attention(x, self.ln_1, rows, cache, op, want_weights)
        return self.mlp(x, self.ln_2, op), weights


@dataclass
class Trace:
    """What a caller may ask to see of a forward pass: L + 1 hidden states [B, T, C], L weights [B, H, T, S]."""

    hidden_states: list[Tensor] | None = None
    attentions: list[Tensor | None] | None = None


def parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """What `module.parameters()` gives, a shared one each time, without the names that make that slow: for every call."""
    modules = [module]
    while modules:
        found = modules.pop()
        for p in found._parameters.values():
            if p is not None:
                yield p
        for m in found._modules.values():
            if m is not None:
                modules.append(m)


def _add(op: ModuleType, x: Tensor, linear: nn.Linear, residual: Tensor, dropout: float) -> Tensor:
    """residual + dropout(linear(x))."""
    if dropout:
        return residual + F.dropout(linear(x), dropout)
    return op.linear_add(x, linear.weight, linear.bias, residual)


def _as_mask(rows: Rows, T: int) -> Tensor | None:
    """A range of columns as a mask [B, 1, 1, T]."""
    if rows.mask is not None or (rows.starts is None and rows.ends is None):
        return rows.mask
    at = rows.starts if rows.starts is not None else rows.ends
    assert at is not None
    columns = torch.arange(T, device=at.device)
    held = columns >= (0 if rows.starts is None else rows.starts[:, None])
    if rows.ends is not None:
        held = held & (columns < rows.ends[:, None])
    return held[:, None, None]
