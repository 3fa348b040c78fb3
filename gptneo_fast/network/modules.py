"""The modules of a block: transformers' graph, names, arguments and meaning. `fused` computes the same at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from ..config import GPTNeoConfig
from ..errors import warn_once
from ..ops import reference
from .activations import NewGELU, activation
from .touch import Watched, ours


class Past(Protocol):
    """What attention asks of a cache: keys and values [B, H, T, D] of new columns in, those of all columns out."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]: ...


class GPTNeoSelfAttention(Watched):
    """q, k and v without bias, heads, out_proj with bias; scores are not divided by sqrt(D)."""

    is_causal = True
    _bias: Tensor | None = None

    def __init__(self, config: GPTNeoConfig, attention_type: str = "global", layer_id: int = 0) -> None:
        super().__init__()
        C = config.hidden_size
        self.config = config
        self.attention_type, self.layer_id = attention_type, layer_id
        self.window = config.window_size if attention_type == "local" else 0  # keys a query sees; 0 for all
        self.embed_dim, self.num_heads, self.head_dim = C, config.num_heads, config.head_dim
        self.attn_dropout = nn.Dropout(config.attention_dropout)
        self.resid_dropout = nn.Dropout(config.resid_dropout)
        self.k_proj = nn.Linear(C, C, bias=False)
        self.v_proj = nn.Linear(C, C, bias=False)
        self.q_proj = nn.Linear(C, C, bias=False)
        self.out_proj = nn.Linear(C, C)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        layer_past: Past | None = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Attention [B, T, C] of normalised states [B, T, C], and the weights [B, H, T, S] that were multiplied.

        Args:
            attention_mask: [B or 1, H or 1, T or 1, S], boolean (True: seen) or additive. The causal window holds besides.
            layer_past: a KVCache, which gets the T new columns; S counts what it holds and them.
        """
        q, k, v = (
            self._split_heads(projection(hidden_states), self.num_heads, self.head_dim)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if layer_past is not None:
            k, v = layer_past.update(k, v, self.layer_id)
        y, weights = self._attn(q, k, v, attention_mask)
        return self.resid_dropout(self.out_proj(self._merge_heads(y, self.num_heads, self.head_dim))), weights

    def _split_heads(self, tensor: Tensor, num_heads: int, attn_head_size: int) -> Tensor:
        return tensor.view(*tensor.shape[:-1], num_heads, attn_head_size).transpose(1, 2)  # [B, T, C] -> [B, H, T, D]

    def _merge_heads(self, tensor: Tensor, num_heads: int, attn_head_size: int) -> Tensor:
        return tensor.transpose(1, 2).flatten(2)  # [B, H, T, D] -> [B, T, C]

    def _attn(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """[B, H, T, D] of queries that are the last T of the S columns of key and value; and the weights [B, H, T, S]."""
        T, S = query.shape[2], key.shape[2]
        seen = None if self._bias is None else self._bias[:, :, S - T : S, :S].to(query.device)
        weights = reference.attention_weights(query, key, attention_mask, self.window, seen).to(value.dtype)
        weights = self.attn_dropout(weights)
        return weights @ value, weights

    def visible(self) -> Tensor:
        """A copy of `bias`, which leaves a block untouched."""
        if self._bias is not None:
            return self._bias.clone()
        P = self.config.max_position_embeddings
        visible = torch.ones(P, P, dtype=torch.bool, device=self.k_proj.weight.device).tril_()
        return (visible.triu_(1 - self.window) if self.window else visible)[None, None]

    @property
    def bias(self) -> Tensor:
        """Boolean [1, 1, P, P], which column sees which, P being max_position_embeddings. It is made when it is first asked
        for, and obeyed from then on: it may be changed, or set."""
        if self._bias is None:
            self.bias = self.visible()
        assert self._bias is not None
        return self._bias

    @bias.setter
    def bias(self, value: Tensor) -> None:
        object.__setattr__(self, "_bias", value)
        Watched.changes += 1


class GPTNeoAttention(Watched):
    """The level of names between a block and its self-attention: `attn.attention.q_proj`."""

    def __init__(self, config: GPTNeoConfig, layer_id: int = 0) -> None:
        super().__init__()
        self.layer_id = layer_id
        self.attention_layers = config.attention_layers
        self.attention_type = config.attention_layers[layer_id]
        self.attention = GPTNeoSelfAttention(config, self.attention_type, layer_id)

    def forward(
        self,
        hidden_states: Tensor,
        layer_past: Past | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """As GPTNeoSelfAttention."""
        found: tuple[Tensor, Tensor] = self.attention(
            hidden_states,
            attention_mask=attention_mask,
            layer_past=layer_past,
            use_cache=use_cache,
            output_attentions=output_attentions,
        )
        return found


class GPTNeoMLP(Watched):
    """c_fc, activation, c_proj, dropout."""

    def __init__(self, intermediate_size: int, config: GPTNeoConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.hidden_size, intermediate_size)
        self.c_proj = nn.Linear(intermediate_size, config.hidden_size)
        self.act = activation(config.activation_function)
        self.dropout = nn.Dropout(config.resid_dropout)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, T, C] to [B, T, C], without the residual."""
        out: Tensor = self.dropout(self.c_proj(self.act(self.c_fc(hidden_states))))
        return out


class GPTNeoBlock(Watched):
    """One layer.

    recompute: calls a function of x [B, T, C] so that the backward pass computes it again, see `checkpoints`; None keeps what
        it computes.
    """

    recompute: Callable[..., Any] | None = None

    def __init__(self, config: GPTNeoConfig, layer_id: int = 0) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.attn = GPTNeoAttention(config, layer_id)
        self.ln_2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mlp = GPTNeoMLP(config.ffn_size, config)

    def forward(
        self,
        hidden_states: Tensor,
        layer_past: Past | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """[B, T, C] to [B, T, C], and the attention weights; arguments as of GPTNeoSelfAttention."""
        if self.recompute is not None and self.training:
            if layer_past is not None:
                warn_once("a cache does not go with gradient checkpointing; a block keeps none")
            out: tuple[Tensor, Tensor] = self.recompute(partial(self._forward, attention_mask=attention_mask), hidden_states)
            return out
        return self._forward(hidden_states, layer_past, attention_mask, use_cache, output_attentions)

    def _forward(
        self,
        hidden_states: Tensor,
        layer_past: Past | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool = False,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor]:
        y, weights = self.attn(
            self.ln_1(hidden_states),
            layer_past=layer_past,
            attention_mask=attention_mask,
            use_cache=use_cache,
            output_attentions=output_attentions,
        )
        hidden_states = y + hidden_states
        return hidden_states + self.mlp(self.ln_2(hidden_states)), weights


def checkpoints(offload: bool, **how: Any) -> Callable[..., Any]:
    """What `GPTNeoBlock.recompute` is for these keywords of torch's `checkpoint`; `offload` keeps inputs in host memory."""
    return partial(_offloaded if offload else checkpoint, **({"use_reentrant": False} | how))


def _offloaded(function: Callable[..., Any], *args: Any, **how: Any) -> Any:
    with save_on_cpu(pin_memory=args[0].is_cuda):
        return checkpoint(function, *args, **how)


ours(GPTNeoSelfAttention, methods=("forward", "_attn", "_split_heads", "_merge_heads"))
ours(GPTNeoAttention, GPTNeoMLP, GPTNeoBlock, NewGELU)


def walk(module: nn.Module) -> Iterator[nn.Module]:
    """What `module.modules()` gives, a shared one each time, without the names that make that slow: for every call."""
    modules = [module]
    while modules:
        found = modules.pop()
        yield found
        modules += [m for m in found._modules.values() if m is not None]


def parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """What `module.parameters()` gives, in the same way."""
    for found in walk(module):
        yield from [p for p in found._parameters.values() if p is not None]
