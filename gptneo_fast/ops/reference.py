"""What every op computes, in plain torch: the specification, the CPU path, and in float64 the oracle.

One function per op, under the op's name. Arithmetic runs in float32 or in the input's dtype where that is wider, and the
result has the input's dtype. A weight in few bits (see `quantized`) counts as what it stands for in that dtype. The shape
letters used throughout the project:

    B batch, T new tokens, S keys, H heads, D head dim, C width (H * D), F ffn width, L layers, V vocabulary, R slots of a cache

Tokens of a row are numbered from 0 without its padding. `lengths` [B] counts the tokens that a row's cache holds before
the call, `starts` [B] the columns of left padding among the T new ones, so that column i of row b is token
`lengths[b] + i - starts[b]`. A cache keeps token t in slot t mod R.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .constants import LOGITS_ALIGN
from .quantized import Weight, linear
from .sampling import sample as sample

_QUERY_BLOCK = 256  # queries whose scores exist at one time: [B, H, 256, S] and never [B, H, T, S]


def embed(ids: Tensor, position_ids: Tensor, wte: Weight, wpe: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
    """Token + position (+ token type) embeddings; token types index `wte`, as in GPT-2.

    Args:
        ids: [B, T] int64.
        position_ids: [B or 1, T] int64.
        wte: [V, C]. wpe: [P, C].
        token_type_ids: [B, T] int64 or None.

    Returns:
        [B, T, C] in the dtype of `wpe`.
    """
    x = _rows(ids, wte, wpe.dtype) + F.embedding(position_ids, wpe)
    return x if token_type_ids is None else x + _rows(token_type_ids, wte, wpe.dtype)


def _rows(ids: Tensor, wte: Weight, dtype: torch.dtype) -> Tensor:
    return F.embedding(ids, wte) if isinstance(wte, Tensor) else wte.rows(ids, dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last axis with biased variance, in float32 inside. x: [..., C]; weight, bias: [C]."""
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def norm_linear(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Weight, bias: Tensor, eps: float, gelu: bool
) -> Tensor:
    """LayerNorm, linear, and with `gelu` the tanh form of GELU (`gelu_new`): the first half of the MLP.

    gelu_new(x) = x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3))), Hendrycks and Gimpel 2016, section 2.

    Args:
        x: [..., C]. norm_weight, norm_bias: [C].
        weight: [F, C]. bias: [F].

    Returns:
        [..., F]
    """
    y = linear(layer_norm(x, norm_weight, norm_bias, eps), weight, bias)
    return F.gelu(y, approximate="tanh") if gelu else y


def norm_qkv(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, wq: Weight, wk: Weight, wv: Weight, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm and the three projections, which have no bias. x: [B, T, C]; wq, wk, wv: [C, C]; returns three [B, T, C]."""
    y = layer_norm(x, norm_weight, norm_bias, eps)
    return linear(y, wq), linear(y, wk), linear(y, wv)


def linear_add(x: Tensor, weight: Weight, bias: Tensor, residual: Tensor) -> Tensor:
    """residual + x @ weight.T + bias: out_proj and c_proj. x: [..., K]; weight: [C, K]; bias: [C]; residual: [..., C]."""
    return residual + linear(x, weight, bias)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    starts: Tensor | None = None,
    ends: Tensor | None = None,
    k_cache: Tensor | None = None,
    v_cache: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """Causal attention of T new tokens to what a cache holds and to themselves, without the 1/sqrt(D) factor.

    Scores and softmax are float32 (the unscaled scores overflow float16); the weights are cast to v's dtype. A query of
    token t sees tokens t - window + 1 ... t, or 0 ... t where window is 0. A query that sees nothing gives zeros.

    Args:
        q, k, v: [B, H, T, D], of any strides.
        window: keys a query sees, itself included; 0 for all.
        starts: int32 [B], columns of left padding; None for none.
        ends: int32 [B], one past the last column that may be a key (right padding); None for T.
        k_cache, v_cache: [B, H, R, D]; given together with `lengths`, or None.
        lengths: int32 [B], tokens that the cache holds.

    Returns:
        [B, T, H * D], heads merged.
    """
    T = q.shape[2]
    columns = torch.arange(T, device=q.device)
    tokens = columns[None] - (0 if starts is None else starts[:, None])  # [1 or B, T]
    held = tokens >= 0  # which columns may be keys
    if ends is not None:
        held = held & (columns < ends[:, None])
    past = 0
    if k_cache is not None and v_cache is not None and lengths is not None:
        past = k_cache.shape[2]
        tokens = tokens + lengths[:, None]
        old = lengths[:, None] - past + torch.arange(past, device=q.device)  # [B, R], in order of age
        slots = old.remainder(past)[:, None, :, None].expand_as(k_cache)
        k, v = torch.cat([k_cache.gather(2, slots), k], 2), torch.cat([v_cache.gather(2, slots), v], 2)
        held = torch.cat([old >= 0, held.expand(len(old), T)], 1)  # [B, R + T]
        tokens = torch.cat([old, tokens], 1)
    ragged = starts is not None or ends is not None or past > 0
    out = []
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or not isinstance(T, int)
    size = T if traced else _QUERY_BLOCK  # a loop over T would fix it
    for i in (0,) if traced else range(0, T, size):
        j = min(i + size, T)
        first = 0 if window == 0 or past else max(0, i - window + 1)  # keys before it are out of the window
        query, key = tokens[:, past + i : past + j, None], tokens[:, None, first : past + j]
        visible = _visible(query, key, window)
        if ragged:
            visible = visible & held[:, None, first : past + j]
        keys, values = k[:, :, first : past + j], v[:, :, first : past + j]
        out.append(_attend(q[:, :, i:j], keys, values, visible[:, None], empty_rows=ragged))
    return _merge_heads(out[0] if len(out) == 1 else torch.cat(out, 2))


def decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, window: int, starts: Tensor | None = None
) -> Tensor:
    """Attention of T new tokens that the cache already holds (`kv_append` came first), read straight from its slots.

    A ring of R slots serves this for window - 1 + T <= R. Semantics as in `attention`.

    Args:
        q: [B, H, T, D].
        k_cache, v_cache: [B, H, R, D]; a view of the first slots will do while the cache has not wrapped.
        lengths: int32 [B], tokens held before the T new ones.
        window: keys a query sees; 0 for all.
        starts: int32 [B], columns of left padding; None for none.

    Returns:
        [B, T, H * D]
    """
    T, R = q.shape[2], k_cache.shape[2]
    first = lengths[:, None] if starts is None else (lengths - starts)[:, None]  # token of column 0
    query = first + torch.arange(T, device=q.device)  # [B, T]
    last = first + T - 1
    key = last - (last - torch.arange(R, device=q.device)).remainder(R)  # [B, R]: the newest token of each slot
    visible = _visible(query[:, :, None], key[:, None], window) & (key >= 0)[:, None]
    return _merge_heads(_attend(q, k_cache, v_cache, visible[:, None], empty_rows=starts is not None))


def kv_append(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, lengths: Tensor, starts: Tensor | None = None) -> None:
    """Write the newest tokens of each row into their slots, token t into slot t mod R; the cache is changed in place.

    Columns before `starts` and tokens that newer ones of the same call would overwrite are not written.

    Args:
        k_cache, v_cache: [B, H, R, D], changed.
        k, v: [B, H, T, D], of any strides.
        lengths: int32 [B], tokens held before. starts: int32 [B] or None.
    """
    B, _, T, _ = k.shape
    R = k_cache.shape[2]
    columns = torch.arange(max(0, T - R), T, device=k.device).expand(B, -1)  # the last R columns
    tokens = lengths[:, None] + columns
    if starts is not None:
        # A padding column repeats the row's first token, so that no index depends on data; a row of nothing but
        # padding rewrites what the slot before its next one holds.
        columns = torch.maximum(columns, starts[:, None]).clamp(max=T - 1)
        tokens = lengths[:, None] + columns - starts[:, None]
    rows, slots = torch.arange(B, device=k.device)[:, None], tokens.remainder(R)
    for cache, new in ((k_cache, k), (v_cache, v)):
        value = new.transpose(1, 2)[rows, columns]  # [B, T', H, D]
        if starts is not None:
            value = torch.where((starts < T)[:, None, None, None], value, cache[rows, :, slots])
        cache[rows, :, slots] = value


def norm_qkv_append(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    wq: Weight,
    wk: Weight,
    wv: Weight,
    eps: float,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    starts: Tensor | None = None,
) -> Tensor:
    """`norm_qkv`, with k and v going straight into the cache as `kv_append` puts them there: how a step begins.

    Args:
        x: [B, T, C]. norm_weight, norm_bias: [C]. wq, wk, wv: [C, C].
        k_cache, v_cache: [B, H, R, D], the whole cache of a layer, changed.
        lengths: int32 [B], tokens held before. starts: int32 [B], columns of left padding; None for none.

    Returns:
        q: [B, T, C]
    """
    q, k, v = norm_qkv(x, norm_weight, norm_bias, wq, wk, wv, eps)
    heads = (k_cache.shape[1], k_cache.shape[3])
    k, v = (t.unflatten(-1, heads).transpose(1, 2) for t in (k, v))  # [B, H, T, D]
    kv_append(k_cache, v_cache, k, v, lengths, starts)
    return q


def lm_head(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Weight, eps: float) -> Tensor:
    """The final norm and the head, in the dtype that sampling works in.

    Args:
        x: [..., C], before the final norm. norm_weight, norm_bias: [C].
        weight: [V, C].

    Returns:
        Logits [..., V], float32 or wider. In memory a row takes V rounded up to a multiple of 8 (`LOGITS_ALIGN`), so
        that rows begin on 16 bytes whatever V is; what stands after column V - 1 means nothing.
    """
    logits = linear(layer_norm(x, norm_weight, norm_bias, eps), weight)
    logits = logits.to(torch.promote_types(x.dtype, torch.float32))
    return F.pad(logits, (0, -weight.shape[0] % LOGITS_ALIGN))[..., : weight.shape[0]]


def logprob(x: Tensor, weight: Weight, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the head's distribution over the vocabulary says of one token of each row.

    Args:
        x: [N, C], after the final norm. weight: [V, C].
        targets: int64 [N].

    Returns:
        As `statistics` of the logits.
    """
    return statistics(linear(x, weight), targets)


def statistics(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(log-probability of the target, its rank, entropy, variance of the log-probability), each [N].

    The rank, int64, is how many tokens are likelier, among equals those of lower ids: 0 for what greedy decoding takes. The
    entropy, in nats, is minus the mean of the log-probability under the distribution; the variance is that about it, as in
    Min-K%++ (Zhang et al. 2024, equation 3). float32, or wider where logits [N, V] are.
    """
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    own = x.gather(1, targets[:, None])
    ids = torch.arange(x.shape[1], device=x.device)
    rank = ((x > own) | ((x == own) & (ids < targets[:, None]))).sum(-1)
    x = x.log_softmax(-1)
    p = x.exp()
    mean = (p * x).sum(-1)
    variance = (p * (x - mean[:, None]).square()).sum(-1)
    return x.gather(1, targets[:, None])[:, 0], rank, -mean, variance


def attention_weights(q: Tensor, k: Tensor, mask: Tensor | None, window: int, seen: Tensor | None = None) -> Tensor:
    """What attention multiplies the values with, under any mask: [B, H, T, S], float32 or wider; it is no op and has no kernel.

    Args:
        q: [B, H, T, D], the last T of the S columns. k: [B, H, S, D].
        mask: [B or 1, H or 1, T or 1, S], boolean (True: may be seen) or additive; None for none. The causal window
            holds besides.
        window: columns a query sees; 0 for all.
        seen: boolean [1, 1, T, S], in the place of the causal window.

    Returns:
        Rows that sum to one, or to zero for a query that sees nothing.
    """
    T, S = q.shape[2], k.shape[2]
    columns = torch.arange(S, device=q.device)
    visible = _visible(columns[S - T :, None], columns[None], window) if seen is None else seen  # [T, S]
    bias = None
    if mask is not None and mask.dtype == torch.bool:
        visible = visible & mask
    elif mask is not None:
        visible = visible & (mask > torch.finfo(mask.dtype).min)
        bias = mask
    return _weights(q, k, visible, empty_rows=True, bias=bias)


def _visible(query: Tensor, key: Tensor, window: int) -> Tensor:
    """Whether token `key` is neither after token `query` nor before its window."""
    visible = key <= query
    return visible & (key > query - window) if window else visible


def _weights(q: Tensor, k: Tensor, visible: Tensor, empty_rows: bool, bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T + bias) over the visible keys, in float32 or wider; zeros for a row that sees none."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(dtype) @ k.to(dtype).transpose(-1, -2)
    if bias is not None:
        scores = scores + bias
    weights = F.softmax(scores.masked_fill(~visible, float("-inf")), dim=-1)  # by the name that transformers calls
    return weights.masked_fill(~visible, 0) if empty_rows else weights  # softmax of nothing is NaN


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, empty_rows: bool) -> Tensor:
    return _weights(q, k, visible, empty_rows).to(v.dtype) @ v  # [B, H, T, D]


def _merge_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)  # [B, H, T, D] -> [B, T, H * D]
