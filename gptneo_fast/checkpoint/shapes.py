"""Shapes of stored tensors against a configuration, told in the configuration's own fields."""

from __future__ import annotations

import re
from collections.abc import Iterable

from .weight_file import Stored

_DIMENSIONS = [  # parameter -> fields of config.json that give its sizes
    (r"wte\.weight|lm_head\.weight", ("vocab_size", "hidden_size")),
    (r"wpe\.weight", ("max_position_embeddings", "hidden_size")),
    (r"(h\.\d+\.ln_[12]|ln_f)\.(weight|bias)|.*(out_proj|c_proj)\.bias", ("hidden_size",)),
    (r".*\.[qkv]_proj\.weight|.*\.out_proj\.weight", ("hidden_size", "hidden_size")),
    (r".*\.c_fc\.weight", ("intermediate_size", "hidden_size")),
    (r".*\.c_fc\.bias", ("intermediate_size",)),
    (r".*\.c_proj\.weight", ("hidden_size", "intermediate_size")),
    (r"(score|classifier|qa_outputs)\.weight", ("num_labels", "hidden_size")),
    (r"(score|classifier|qa_outputs)\.bias", ("num_labels",)),
]
_LAYER = re.compile(r"(?:transformer\.)?h\.(\d+)\.")


def check_shapes(stored: dict[str, Stored], wanted: dict[str, tuple[int, ...]]) -> str | None:
    """What is wrong with the shapes, in one line that names the fields of config.json, or None.

    Args:
        stored: canonical name -> tensor. wanted: canonical name -> shape of the parameter.
    """
    wrong = [key for key, tensor in stored.items() if tensor.shape != wanted[key]]
    if not wrong:
        return None
    fields: dict[str, tuple[int, int]] = {}  # field -> its value in the weights and in config.json
    for key in wrong:
        for name, has, asked in zip(_fields(key), stored[key].shape, wanted[key], strict=False):
            if has != asked and len(stored[key].shape) == len(wanted[key]):
                fields.setdefault(name, (has, asked))
    told = ", ".join(f"{name} is {has} in the weights and {asked} in config.json" for name, (has, asked) in fields.items())
    first = stored[wrong[0]]
    line = f"tensor {first.name[:200]!r} is {list(first.shape)}, config.json asks for {list(wanted[wrong[0]])}"
    line += f" ({told})" if told else ""
    line += f"; so are {len(wrong) - 1} more of another shape" if len(wrong) > 1 else ""
    heads = [key for key in wrong if _fields(key)[:1] == ("num_labels",)]
    return line + ("; ignore_mismatched_sizes=True starts the head afresh" if heads == wrong else "")


def layers_hint(taken: Iterable[str], surplus: Iterable[str], wanted: Iterable[str]) -> str:
    """` (config.json: num_layers 4, the weights: 3)` where the layers differ, or nothing."""
    has, asked = _layers([*taken, *surplus]), _layers(wanted)
    return f" (num_layers is {asked} in config.json, the weights have {has} layers)" if has != asked else ""


def some(names: list[str]) -> str:
    """The first few names of a list."""
    shown = ", ".join(repr(name[:200])[1:-1] for name in sorted(names)[:8])
    return shown + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _fields(key: str) -> tuple[str, ...]:
    return next((fields for pattern, fields in _DIMENSIONS if re.fullmatch(pattern, key)), ())


def _layers(names: Iterable[str]) -> int:
    numbers = [int(found[1]) for name in names if (found := _LAYER.match(name)) and len(found[1]) < 6]
    return max(numbers) + 1 if numbers else 0
