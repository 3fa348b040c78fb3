"""A whole block as ops that read its parameters, for as long as it is untouched (see `touch`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..ops.quantized import QuantizedWeight
from .activations import NewGELU
from .cache import STEP, KVCache
from .masks import Rows
from .modules import GPTNeoAttention, GPTNeoBlock, GPTNeoMLP, GPTNeoSelfAttention
from .quantized import QuantizedLinear
from .touch import PLAIN

# Of GPTNeoSelfAttention: patched, or asked for, by those who change attention
_PRIVATE = ("_attn", "_split_heads", "_merge_heads", "_bias")


@dataclass(frozen=True)
class Kinds:
    """The classes that a block is made of."""

    block: type[nn.Module]
    attn: type[nn.Module]
    attention: type[nn.Module]
    mlp: type[nn.Module]
    activations: tuple[type[nn.Module], ...]  # those that compute gelu_new
    window: Callable[[Any], int]  # columns that a query of an untouched block sees; 0 for all


OURS = Kinds(
    GPTNeoBlock, GPTNeoAttention, GPTNeoSelfAttention, GPTNeoMLP, (NewGELU,), lambda block: block.attn.attention.window
)


def is_untouched(block: nn.Module, kinds: Kinds = OURS) -> bool:
    """Whether `block` below computes what calling the module would. It is asked of every block in every call: no helpers."""
    if type(block) is not kinds.block:
        return False
    tracing = torch.compiler.is_compiling()
    try:
        outer = block._modules
        attn, mlp, ln_1, ln_2 = outer["attn"], outer["mlp"], outer["ln_1"], outer["ln_2"]
        if type(attn) is not kinds.attn or type(mlp) is not kinds.mlp:
            return False
        inner = attn._modules["attention"]
        if type(inner) is not kinds.attention:
            return False
        a, m = inner._modules, mlp._modules
        plain, biased = (a["q_proj"], a["k_proj"], a["v_proj"]), (a["out_proj"], m["c_fc"], m["c_proj"])
        act, dropouts = m["act"], (a["attn_dropout"], a["resid_dropout"], m["dropout"])
        dtype = ln_1._parameters["weight"].dtype  # type: ignore[union-attr]
        if type(act) not in kinds.activations:
            return False
        for norm in (ln_1, ln_2):
            if type(norm) is not nn.LayerNorm or len(norm.normalized_shape) != 1:
                return False
        weighted = [ln_1, ln_2]
        for linear in (*plain, *biased):
            if type(linear) is nn.Linear:
                weighted.append(linear)
            elif type(linear) is not QuantizedLinear or type(linear._modules["weight"]) is not QuantizedWeight:
                return False
        for module in (*biased, ln_1, ln_2):
            bias = module._parameters["bias"]  # type: ignore[union-attr]
            if type(bias) not in PLAIN or bias.dtype is not dtype:  # type: ignore[union-attr]
                return False
        for module in plain:
            if module._parameters["bias"] is not None:  # type: ignore[union-attr]
                return False
        for module in weighted:
            weight = module._parameters["weight"]  # type: ignore[union-attr]
            if type(weight) not in PLAIN or weight.dtype is not dtype:  # type: ignore[union-attr]
                return False
        for module in dropouts:
            if type(module) is not nn.Dropout or (module.training and module.p > 0):
                return False
        for module in (block, attn, inner, mlp, ln_1, ln_2, act, *plain, *biased, *dropouts):
            own = module.__dict__
            if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
                return False
            if "forward" in own:
                return False
            if tracing and module.forward is None:  # type: ignore[union-attr]  # asked for, so that a patch has it traced again
                return False
    except (KeyError, AttributeError):  # a part is gone
        return False
    own = inner.__dict__
    config: Any = own["config"]
    if own["num_heads"] != config.num_heads or own["head_dim"] != config.hidden_size // config.num_heads:
        return False
    return "_attn" not in own and "_split_heads" not in own and "_merge_heads" not in own and "_bias" not in own


def window_of(block: nn.Module, kinds: Kinds = OURS) -> int:
    """Columns that a query of a block's attention sees; 0 for all, and for attention that may be another."""
    if type(block) is not kinds.block or "forward" in vars(block):
        return 0
    attn = block._modules.get("attn")
    inner = attn._modules.get("attention") if type(attn) is kinds.attn and "forward" not in vars(attn) else None
    if type(inner) is not kinds.attention or any(name in vars(inner) for name in ("forward", *_PRIVATE)):
        return 0
    return kinds.window(block)


def block(block: Any, x: Tensor, *, rows: Rows, cache: KVCache | None, layer: int, window: int, op: ModuleType) -> Tensor:
    """What an untouched block computes: [B, T, C] to [B, T, C].

    Args:
        block: of the modules' names that GPTNeoBlock has.
        window: columns that a query sees; 0 for all.
        rows: which columns are tokens; ranges only.
        cache: read and appended to, in the place `layer`.
        op: the namespace that computes.
    """
    attention, mlp, norm = block.attn.attention, block.mlp, block.ln_1
    args = (x, norm.weight, norm.bias, attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight, norm.eps)
    if cache is not None and cache.get_seq_length() > 0 and x.shape[1] <= STEP:
        y = _step(attention, args, rows.starts, cache, layer=layer, window=window, op=op)
    else:
        q, k, v = (_heads(t, attention) for t in op.norm_qkv(*args))
        y = _attend(q, k, v, rows, cache=cache, layer=layer, window=window, op=op)
    x = op.linear_add(y, attention.out_proj.weight, attention.out_proj.bias, x)
    norm = block.ln_2
    y = op.norm_linear(x, norm.weight, norm.bias, mlp.c_fc.weight, mlp.c_fc.bias, norm.eps, True)
    return cast(Tensor, op.linear_add(y, mlp.c_proj.weight, mlp.c_proj.bias, x))


def _heads(x: Tensor, attention: Any) -> Tensor:
    return x.view(*x.shape[:-1], attention.num_heads, attention.head_dim).transpose(1, 2)  # [B, T, C] -> [B, H, T, D]


def _step(
    attention: Any, qkv: tuple, starts: Tensor | None, cache: KVCache, *, layer: int, window: int, op: ModuleType
) -> Tensor:
    """A short step over a past: appends first, then reads everything from the slots. Returns [B, T, C]."""
    k_cache, v_cache = cache.writable(layer)
    q = _heads(op.norm_qkv_append(*qkv, k_cache, v_cache, cache.lengths, starts), attention)
    seen = cache.past(layer, cache.get_seq_length() + q.shape[2])
    return cast(Tensor, op.decode_attention(q, *seen, cache.lengths, window, starts))


def _attend(
    q: Tensor, k: Tensor, v: Tensor, rows: Rows, *, cache: KVCache | None, layer: int, window: int, op: ModuleType
) -> Tensor:
    """Attention over ranges of columns; appends to the cache. Returns [B, T, C]."""
    if cache is None:
        return cast(Tensor, op.attention(q, k, v, window, rows.starts, rows.ends))
    past = cache.get_seq_length()
    old = (*cache.past(layer, past), cache.lengths) if past else ()
    y = op.attention(q, k, v, window, rows.starts, rows.ends, *old)
    op.kv_append(*cache.writable(layer), k, v, cache.lengths, rows.starts)
    return cast(Tensor, y)
