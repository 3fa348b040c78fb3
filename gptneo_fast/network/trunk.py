"""The forward pass of a trunk: its embeddings, its blocks, each fused or module by module, and its last norm."""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import reference
from . import decoding, fused, masks, quantized, touch
from .cache import KVCache
from .decoding import Span
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
    head: nn.Linear | None = None,
    keep: int = 1,
    kinds: fused.Kinds = fused.OURS,
) -> Tensor:
    """Hidden states [B, T, C] after ln_f; or with a head logits [B, keep, V], float32 or wider.

    Args:
        trunk: of the modules wte, wpe, drop, h and ln_f: a GPTNeoModel, of ours or of transformers.
        x: ids [B, T] int64, or embeddings [B, T, C].
        position_ids: [B or 1, T] int64. token_type_ids: [B, T] int64 or None.
        op: the namespace that computes what is untouched.
        look: which modules that are.
        rows: which columns are tokens.
        cache: read, appended to and advanced by T columns: a KVCache, or what else has its `update`.
        trace: filled with what it has lists for.
        head: lm_head, if it and ln_f are untouched and nothing observes the call. keep: columns, the last ones, of its logits.
        kinds: the classes that blocks are made of.
    """
    trace = trace or Trace()
    own = cache if isinstance(cache, KVCache) else None
    B, T = x.shape[:2]
    L = len(trunk.h)
    if own is not None:
        own.reserve(T)
    fusing = trace.attentions is None and rows.mask is None and own is cache and not touch.observed(x.device)
    embed = partial(_embed, trunk, x, position_ids, token_type_ids, op if look.embeddings and fusing else None)
    few = decoding.Few(trunk, own, rows, kinds) if fusing and own is not None and decoding.takes(op, x, own, rows) else None
    stamp, ids = touch.stamp(), look.embeddings and not x.is_floating_point()
    x = x if ids else embed()
    if few and trace.hidden_states is None and look.norm and all(look.blocks) and touch.stamp() == stamp:
        kept = keep if head is not None else T
        found = few.run(Span(0, L, ids, True, head), x, kept, position_ids, token_type_ids)
        if found is not None:
            few.cache.advance(T, rows.starts)
            return found
    x = embed() if ids else x
    mask: Tensor | None = None  # for the blocks that call their modules
    foreign = not look.embeddings  # whether somebody's code has run
    i = 0
    while i < L:
        if foreign and (now := touch.stamp()) != stamp:  # a hook has touched what is still to come
            stamp, look = now, anew(trunk, kinds)
        block = trunk.h[i]
        if trace.hidden_states is not None:
            trace.hidden_states.append(x)
        if few and look.blocks[i]:
            end = i + 1
            while trace.hidden_states is None and end < L and look.blocks[end]:
                end += 1
            if (found := few.run(Span(i, end), x, T)) is not None:
                x, i = found, end
                continue
        if fusing and look.blocks[i]:
            flows = torch.is_grad_enabled() and (x.requires_grad or (own is not None and own.keys[i].requires_grad))
            chosen = reference if flows else op
            call = partial(fused.block, block, rows=rows, cache=own, layer=i, window=kinds.window(block), op=chosen)
            recompute = getattr(block, "recompute", None) if block.training else None
            x = call(x) if recompute is None else recompute(call, x)
        else:
            mask = masks.dense(rows, B, T, cache, x.dtype, x.device) if mask is None else mask
            x = _by_modules(block, x, mask, cache if own is None else own.at(i, rows.starts), trace)
            foreign = True
        i += 1
    if own is not None:
        own.advance(T, rows.starts)
    norm, flows = trunk.ln_f, torch.is_grad_enabled() and x.requires_grad
    look = anew(trunk, kinds) if foreign and touch.stamp() != stamp else look
    if head is not None and not look.norm:
        return head(norm(x.narrow(1, T - keep, keep))).to(torch.promote_types(x.dtype, torch.float32))
    if head is not None:
        chosen = reference if flows else op
        logits: Tensor = chosen.lm_head(x.narrow(1, T - keep, keep), norm.weight, norm.bias, head.weight, norm.eps)
        return logits
    x = op.layer_norm(x, norm.weight, norm.bias, norm.eps) if look.norm and fusing and not flows else norm(x)
    if trace.hidden_states is not None:
        trace.hidden_states.append(x)
    return x


def _by_modules(block: Any, x: Tensor, mask: Tensor, past: Any, trace: Trace) -> Tensor:
    """What calling a block gives for x [B, T, C], its attention weights to the trace."""
    wanted = trace.attentions is not None
    out = block(x, layer_past=past, attention_mask=mask, use_cache=past is not None, output_attentions=wanted)
    x, weights = (out[0], out[1] if len(out) > 1 else None) if isinstance(out, tuple) else (out, None)
    if trace.attentions is not None:
        trace.attentions.append(weights)
    return x


def anew(trunk: Any, kinds: fused.Kinds = fused.OURS) -> touch.Look:
    """Which parts of a trunk are untouched now."""
    wte, wpe, norm, config = trunk.wte, trunk.wpe, trunk.ln_f, trunk.config
    dtype = quantized.dtype_of(wte)
    return touch.Look(
        blocks=tuple([fused.is_untouched(block, kinds) for block in trunk.h]),
        embeddings=quantized.is_plain_embedding(wte)
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
