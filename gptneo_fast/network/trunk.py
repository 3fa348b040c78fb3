"""The forward pass of a trunk: its embeddings, its blocks, each fused or module by module, and its last norm."""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import reference
from . import fused, masks, touch
from .cache import KVCache
from .masks import Rows
from .outputs import Trace


def run(
    trunk: Any,
    x: Tensor,
    position_ids: Tensor,
    token_type_ids: Tensor | None,
    *,
    op: ModuleType,
    look: touch.Look,
    rows: Rows,
    cache: Any,
    trace: Trace | None = None,
    final_norm: bool = True,
    kinds: fused.Kinds = fused.OURS,
) -> Tensor:
    """Hidden states [B, T, C] after ln_f, or with `final_norm=False` before it.

    Args:
        trunk: of the modules wte, wpe, drop, h and ln_f: a GPTNeoModel, of ours or of transformers.
        x: ids [B, T] int64, or embeddings [B, T, C].
        position_ids: [B or 1, T] int64. token_type_ids: [B, T] int64 or None.
        op: the namespace that computes what is untouched.
        look: which modules that are.
        rows: which columns are tokens.
        cache: read, appended to and advanced by T columns: a KVCache, or what else has its `update`.
        trace: filled with what it has lists for.
        kinds: the classes that blocks are made of.
    """
    trace = trace or Trace()
    own = cache if isinstance(cache, KVCache) else None
    B, T = x.shape[:2]
    if own is not None:
        own.reserve(T)
    fusing = trace.attentions is None and rows.mask is None and own is cache and not touch.observed(x.device)
    x = _embed(trunk, x, position_ids, token_type_ids, op if look.embeddings and fusing else None)
    mask: Tensor | None = None  # for the blocks that call their modules
    call: Any
    for i, block in enumerate(trunk.h):
        if trace.hidden_states is not None:
            trace.hidden_states.append(x)
        if fusing and look.blocks[i]:
            flows = torch.is_grad_enabled() and (x.requires_grad or (own is not None and own.keys[i].requires_grad))
            window = kinds.window(block)
            chosen = reference if flows else op
            call = partial(fused.block, block, rows=rows, cache=own, layer=i, window=window, op=chosen)
            recompute = getattr(block, "recompute", None) if block.training else None
            x = call(x) if recompute is None else recompute(call, x)
            continue
        if mask is None:
            mask = masks.dense(rows, B, T, cache, x.dtype, x.device)
        out: Any = block(
            x,
            layer_past=cache if own is None else own.at(i, rows.starts),
            attention_mask=mask,
            use_cache=cache is not None,
            output_attentions=trace.attentions is not None,
        )
        x, weights = (out[0], out[1] if len(out) > 1 else None) if isinstance(out, tuple) else (out, None)
        if trace.attentions is not None:
            trace.attentions.append(weights)
    if own is not None:
        own.advance(T, rows.starts)
    if not final_norm:
        return x
    norm = trunk.ln_f
    plain = look.norm and fusing and not (torch.is_grad_enabled() and x.requires_grad)
    x = op.layer_norm(x, norm.weight, norm.bias, norm.eps) if plain else norm(x)
    if trace.hidden_states is not None:
        trace.hidden_states.append(x)
    return x


def look(trunk: Any, kinds: fused.Kinds = fused.OURS) -> touch.Look:
    """Which parts of a trunk are untouched now."""
    wte, wpe, norm, config = trunk.wte, trunk.wpe, trunk.ln_f, trunk.config
    dtype = wte.weight.dtype if isinstance(wte, nn.Embedding) else None
    return touch.Look(
        blocks=tuple([fused.is_untouched(block, kinds) for block in trunk.h]),
        embeddings=touch.is_plain_embedding(wte)
        and touch.is_plain_embedding(wpe)
        and (wte.num_embeddings, wpe.num_embeddings) == (config.vocab_size, config.max_position_embeddings)
        and touch.is_idle_dropout(trunk.drop)
        and wpe.weight.dtype is dtype,
        norm=touch.is_plain_norm(norm) and norm.weight.dtype is dtype,
    )


def windows(trunk: Any, kinds: fused.Kinds = fused.OURS) -> tuple[int, ...]:
    """Columns that a query of each block sees; 0 for all, and where a patch of attention's classes may have changed that."""
    if touch.patched(kinds.attn, kinds.attention):
        return (0,) * len(trunk.h)
    return tuple([fused.window_of(block, kinds) for block in trunk.h])


def _embed(trunk: Any, x: Tensor, position_ids: Tensor, token_type_ids: Tensor | None, op: ModuleType | None) -> Tensor:
    """Embeddings [B, T, C] of ids [B, T] or of embeddings; by the op, or where there is none by the modules."""
    if op is not None and not x.is_floating_point():
        embedded: Tensor = op.embed(x, position_ids, trunk.wte.weight, trunk.wpe.weight, token_type_ids)
        return embedded
    x = (x if x.is_floating_point() else trunk.wte(x)) + trunk.wpe(position_ids)
    x = x if token_type_ids is None else x + trunk.wte(token_type_ids)
    dropped: Tensor = trunk.drop(x)
    return dropped
