"""What a user's functions give back during a generation: a value that can be gone on with, or an error naming the function.

An error that a function raises itself passes as it is.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError, short
from ..network.cache import kind


def check_functions(name: str, given: Any) -> Sequence[Callable[..., Any]]:
    """The functions of an argument, a list of them.

    Raises:
        InputError: no list, or something in it that cannot be called.
    """
    if given is None:
        return ()
    if not isinstance(given, (list, tuple)):
        raise InputError(f"{name} is a {type(given).__name__}; give a list of functions")
    for function in given:
        if not callable(function):
            raise InputError(f"{name} holds {short(function)}, which cannot be called")
    return given


def scores_of(processor: Callable[[Tensor, Tensor], Any], input_ids: Tensor, scores: Tensor) -> Tensor:
    """What a processor makes of scores [B, V]: floating-point, as many, on their device.

    Raises:
        InputError: something else.
    """
    found = processor(input_ids, scores)
    if not isinstance(found, Tensor) or found.shape != scores.shape or not found.is_floating_point():
        wanted = f"scores {list(scores.shape)}"
        raise InputError(f"logits processor {named(processor)} returned {kind(found)}; it must return {wanted}")
    if found.device != scores.device:
        raise InputError(f"logits processor {named(processor)} returned scores on {found.device}, not on {scores.device}")
    return found


def ended_of(criterion: Callable[..., Any], input_ids: Tensor, scores: Any, **more: Any) -> Tensor | bool:
    """What a stopping criterion says of texts input_ids [B, T]: one truth for all, or boolean [B].

    Raises:
        InputError: something else, as a number that is neither 0 nor 1.
    """
    found, B = criterion(input_ids, scores, **more), len(input_ids)
    if isinstance(found, (bool, np.bool_)) or (isinstance(found, int) and found in (0, 1)):
        return bool(found)
    flags = torch.as_tensor(found) if isinstance(found, (list, tuple, np.ndarray)) else found
    if isinstance(flags, Tensor) and tuple(flags.shape) in ((), (B,)) and not (flags.is_floating_point() or flags.is_complex()):
        return flags.to(input_ids.device, torch.bool)
    raise InputError(
        f"stopping criterion {named(criterion)} returned {kind(found) if isinstance(found, Tensor) else short(found)}; it must "
        f"return True or False, or a boolean tensor [{B}]"
    )


def tokens_of(allowed: Callable[[int, Tensor], Any], row: int, ids: Tensor, vocabulary: int) -> list[int]:
    """The tokens that `prefix_allowed_tokens_fn` lets follow ids [T].

    Raises:
        InputError: none, or something else than ids from 0 to vocabulary - 1.
    """
    found = allowed(row, ids)
    try:
        listed = found.tolist() if isinstance(found, (Tensor, np.ndarray)) else list(found)
        tokens = [operator.index(token) for token in listed if not isinstance(token, bool)]
    except TypeError:
        listed, tokens = [found], []
    if not listed:
        raise InputError(f"prefix_allowed_tokens_fn allows no token for row {row} after {len(ids)} tokens")
    if len(tokens) != len(listed) or not all(0 <= token < vocabulary for token in tokens):
        raise InputError(
            f"prefix_allowed_tokens_fn returned {short(found)} for row {row}; give token ids from 0 to {vocabulary - 1}"
        )
    return tokens


def named(function: Any) -> str:
    """A function's name, or its class's."""
    return str(getattr(function, "__name__", type(function).__name__))


_NOT_CALLED = (
    *("_sample", "_beam_search", "_assisted_decoding", "_prefill", "_get_logits_processor", "_get_stopping_criteria"),
    *("_prepare_attention_mask_for_generation", "_prepare_position_ids_for_generation", "_prepare_cache_for_generation"),
    *("_prepare_generation_config", "_prepare_generated_length", "_prepare_model_inputs", "_expand_inputs_for_generation"),
)


def check_methods(model: Any) -> None:
    """Refuse what somebody put in the place of a part of transformers' `generate`, and would see dropped.

    Raises:
        InputError: such a method.
    """
    for name in _NOT_CALLED:
        if hasattr(type(model), name) or name in vars(model):
            owner = next((c for c in type(model).__mro__ if name in vars(c)), None)
            if owner is None or name in vars(model) or not owner.__module__.startswith("transformers."):
                raise InputError(
                    f"{type(model).__name__}.{name} is a part of transformers' generate, which this one does not call; "
                    "override generate, forward or prepare_inputs_for_generation, or pass logits_processor or "
                    "stopping_criteria"
                )
