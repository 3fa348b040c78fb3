"""Checks of what a caller passes, on the host, before anything is computed: each error names value, place and limit."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..config import GPTNeoConfig
from ..errors import CacheError, InputError, UnknownOptionError, nearest, short
from . import quantized
from .cache import KVCache, kind
from .dynamic_cache import DynamicCache
from .touch import is_readable

# transformers' callers pass them to every class: positions are known here, and a class without cache keeps none
_HARMLESS = ("cache_position", "use_cache")

# where the texts of a packed row begin, for kernels that need it said so, too
_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


def check_unknown(keywords: dict[str, Any], owner: type, position_ids: Tensor | None = None) -> None:
    """Refuse keywords that no argument of `owner.forward` takes, with the nearest that one does."""
    for name, value in keywords.items():
        if name in _PACKED:
            if position_ids is None:
                raise InputError(f"{name} says where packed texts begin; give position_ids that begin anew with each instead")
            continue
        if name not in _HARMLESS and not (name == "head_mask" and value is None):  # None masks no head
            known = [k for k in inspect.signature(owner.forward).parameters if k not in ("self", "unknown")]  # type: ignore[attr-defined]
            raise UnknownOptionError(f"{owner.__name__}.forward has no argument {name!r}{nearest(name, known)}")


def check_ids(name: str, ids: Tensor, limit: int, device: torch.device) -> Tensor:
    """Integer ids as int64 [B, T] on the model's device.

    Args:
        ids: integer [B, T] or [T], of any strides, each from 0 to limit - 1; B may be 0.

    Raises:
        InputError: another kind, shape, device or value; names the first bad value and its place.
    """
    if not isinstance(ids, Tensor):
        raise InputError(f"{name} is a {type(ids).__name__}; give an integer tensor [B, T]")
    if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
        raise InputError(f"{name} is {ids.dtype}; give integers")
    if ids.dim() not in (1, 2) or ids.shape[-1] == 0:
        raise InputError(f"{name} has shape {list(ids.shape)}; expected [B, T] with T of at least 1")
    if ids.device != device:
        raise InputError(f"{name} is on {ids.device}, the model on {device}; move it with .to({str(device)!r})")
    ids = (ids.view(1, -1) if ids.dim() == 1 else ids).long()  # a small dtype may not hold the limit
    # Out of range, a gather is an assertion on the device that ends the process, or silent garbage.
    if is_readable() and bool(((ids < 0) | (ids >= limit)).any()):
        row, column = ((ids < 0) | (ids >= limit)).nonzero()[0].tolist()
        raise InputError(f"{name}[{row}, {column}] is {int(ids[row, column])}; it must be from 0 to {limit - 1}")
    return ids


def check_embeds(embeds: Any, config: GPTNeoConfig, dtype: torch.dtype | None) -> Tensor:
    """Embeddings of a prompt, floating point [B, T, C].

    Args:
        dtype: of the model, where it is known.

    Raises:
        InputError: something else, or float64 for a model that is not.
    """
    if (
        not isinstance(embeds, Tensor)
        or embeds.dim() != 3
        or embeds.shape[2] != config.hidden_size
        or not embeds.is_floating_point()
    ):
        raise InputError(f"inputs_embeds is {kind(embeds)}; expected floating point [B, T, {config.hidden_size}]")
    if embeds.dtype is torch.float64 and dtype not in (None, torch.float64):
        raise InputError(f"inputs_embeds is float64, the model {dtype}; cast it with .to({dtype})")
    return embeds


def check_labels(labels: Tensor, shape: Sequence[int], limit: int, ignore: int = -100, device: Any = None) -> Tensor:
    """Class labels as int64: each from 0 to limit - 1, or `ignore` for what is not to be learnt.

    Args:
        shape: that they have, ones aside.
        device: to have them on; None for theirs.

    Raises:
        InputError: no integer tensor, another number of labels, or another value; names the first and its place.
    """
    if not isinstance(labels, Tensor) or labels.dtype.is_floating_point or labels.is_complex() or labels.dtype == torch.bool:
        raise InputError(f"labels is {kind(labels)}; give an integer tensor {list(shape)}")
    labels = labels.to(device)
    if [n for n in labels.shape if n != 1] != [n for n in shape if n != 1]:
        raise InputError(f"labels has shape {list(labels.shape)}; expected {list(shape)}, one for each row of the logits")
    bad = (labels != ignore) & ((labels < 0) | (labels >= limit))
    if is_readable() and bool(bad.any()):  # the loss would end the process on a device
        place = bad.nonzero()[0].tolist()
        raise InputError(
            f"labels{place} is {labels[tuple(place)].item()}; it must be from 0 to {limit - 1}, or {ignore} to be ignored"
        )
    return labels.long()


def check_inputs(
    config: GPTNeoConfig,
    device: torch.device,
    ids: Tensor | None,
    embeds: Tensor | None,
    position_ids: Tensor | None,
    token_type_ids: Tensor | None,
    cache: Any,
    wte: nn.Module | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Checked ids [B, T] or embeddings [B, T, C], position ids [B or 1, T] and token type ids [B, T] of a forward call.

    Args:
        wte: what ids are looked up in; another one may have another number of rows than the configuration says.

    Raises:
        InputError, CacheError: what does not fit.
    """
    if (ids is None) == (embeds is None):
        raise InputError("give exactly one of input_ids and inputs_embeds")
    vocabulary = wte.num_embeddings if isinstance(wte, nn.Embedding) else config.vocab_size
    if ids is not None:
        x = check_ids("input_ids", ids, vocabulary, device)
    else:
        x = check_embeds(embeds, config, quantized.dtype_of(wte))
    B, T = x.shape[:2]
    past = 0
    if cache is not None:
        if isinstance(cache, KVCache) and cache.batch_size != B:
            raise CacheError(f"past_key_values holds {cache.batch_size} rows, the input has {B}")
        past = int(cache.get_seq_length())
    limit = config.max_position_embeddings
    if past + T > limit:
        raise InputError(f"{past} cached + {T} new tokens exceed the model's {limit} positions; shorten the input")
    if position_ids is None:
        position_ids = torch.arange(past, past + T, device=x.device)[None]
    else:
        position_ids = check_ids("position_ids", position_ids, limit, device)
        if position_ids.shape[0] not in (1, B) or position_ids.shape[1] != T:
            raise InputError(f"position_ids has shape {list(position_ids.shape)}; expected [{B} or 1, {T}]")
    if token_type_ids is not None:
        token_type_ids = check_ids("token_type_ids", token_type_ids, vocabulary, device)
        if token_type_ids.shape[0] not in (1, B) or token_type_ids.shape[1] != T:
            raise InputError(f"token_type_ids has shape {list(token_type_ids.shape)}; expected [{B} or 1, {T}]")
    return x, position_ids, token_type_ids


def check_cache(cache: Any, model: Any, given: Any) -> Any:
    """A cache that a trunk can continue; a tuple of (keys, values) [B, H, S, D] a layer becomes one.

    Args:
        given: ids or embeddings that are to continue it; a cache that has no shape yet takes theirs.

    Raises:
        CacheError: no cache, or made for another model, or for other attention than the blocks have now; says what differs.
    """
    if isinstance(cache, (tuple, list)):
        if len(cache) != len(model.h) or not all(_is_pair(entry) for entry in cache):
            raise CacheError(
                f"past_key_values is a {type(cache).__name__} that does not hold keys and values [B, H, S, D] for each of "
                f"{len(model.h)} layers; pass the KVCache that an earlier call returned"
            )
        made = model.new_cache(len(cache[0][0]))
        for layer, (keys, values) in enumerate(cache):
            made.update(keys, values, layer)
        return made
    if not isinstance(cache, KVCache):
        if cache is not None and not (hasattr(cache, "update") and hasattr(cache, "get_seq_length")):
            raise CacheError(f"past_key_values is a {type(cache).__name__}; pass the KVCache that an earlier call returned")
        if getattr(cache, "is_compileable", False):  # as a block's own mask does not know it
            raise CacheError(
                f"past_key_values is a {type(cache).__name__}, whose keys are as long as it may ever get; leave it out, or "
                "give a DynamicCache"
            )
        return cache
    if isinstance(cache, DynamicCache):
        rows = len(given) if isinstance(given, Tensor) and given.dim() > 1 else 1
        if not cache.fits(rows):
            cache.take(model.new_cache(rows))
    config, windows, keys = model.config, model.windows(), cache.keys[0]
    pairs = {
        "layers": (len(cache), len(windows)),
        "windows": (cache.windows, windows),
        "heads": (keys.shape[1], config.num_heads),
        "head_dim": (keys.shape[3], config.head_dim),
        "dtype": (keys.dtype, model.dtype),
        "device": (keys.device, model.device),
    }
    differing = [f"{name} {has} and not {wants}" for name, (has, wants) in pairs.items() if has != wants]
    if differing:
        raise CacheError(f"past_key_values was made for another model: {'; '.join(differing)}; start a new cache")
    return cache


def _is_pair(entry: Any) -> bool:
    """Whether an entry of a cache in tuples is (keys, values)."""
    if not isinstance(entry, (tuple, list)) or len(entry) != 2:
        return False
    return all(isinstance(t, Tensor) and t.dim() == 4 for t in entry) and entry[0].shape == entry[1].shape


def select_positions(hidden: Tensor, keep: Any) -> Tensor:
    """The positions of [B, T, C] that logits are wanted for.

    Args:
        keep: the last `keep` positions, 0 for all; [n] integer positions for every row; [B, n] for each row; or a boolean
            [B, T], whose result is [number of True, C].

    Raises:
        InputError: negative, or positions that there are not, or a tensor of another shape or dtype.
    """
    T = hidden.shape[1]
    if isinstance(keep, (list, tuple)):
        try:
            keep = torch.tensor(keep, device=hidden.device)
        except (OverflowError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(f"logits_to_keep {short(keep)} makes no tensor: {error}") from error
    if isinstance(keep, Tensor) and keep.dim() > 0:
        if keep.is_floating_point() or keep.is_complex():
            raise InputError(f"logits_to_keep is {keep.dtype}; give integers, or a boolean [B, T]")
        if keep.dtype != torch.bool and is_readable() and bool(((keep < -T) | (keep >= T)).any()):
            raise InputError(f"logits_to_keep names a position beyond the {T} of the input: {short(keep.tolist())}")
        if keep.dim() == 2 and keep.dtype == torch.bool:
            return hidden[keep]
        if keep.dim() == 2:
            return hidden.take_along_dim(keep.remainder(T)[..., None], 1)
        if keep.dim() == 1:
            return hidden[:, keep]
        raise InputError(f"logits_to_keep has shape {list(keep.shape)}; give an integer, [n], [B, n] or a boolean [B, T]")
    if not isinstance(keep, int):  # numpy's, or a tensor without dimensions
        try:
            keep = operator.index(keep)
        except TypeError as error:
            raise InputError(f"logits_to_keep {short(keep)} is no integer: how many of the last positions to keep") from error
    if keep < 0:
        raise InputError(f"logits_to_keep {short(keep)} is negative; 0 keeps all")
    return hidden[:, -keep:] if keep else hidden
