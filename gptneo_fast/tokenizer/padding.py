"""Rows of different lengths to one length."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from torch import Tensor

from ..errors import InputError
from .arguments import Shape, as_ids, flag, listed, shape_of
from .encoding import BatchEncoding

_FILLERS = {"attention_mask": 0, "token_type_ids": 0, "special_tokens_mask": 1}


class Padding:
    """`pad`, which GPT2Tokenizer offers."""

    padding_side: str
    model_max_length: int
    pad_token_id: Any
    model_input_names: list[str]

    def pad(
        self,
        encoded_inputs: Any,
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: Literal["left", "right"] | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: Literal["pt", "np"] | None = None,
        verbose: bool = True,
        *,
        pad_token_id: int | None = None,
    ) -> BatchEncoding:
        """Encodings as a batch of one length, with their attention mask; a collator for DataLoaders as well.

        Args:
            encoded_inputs: an encoding, a list of encodings, or rows of ids; of lists, tensors or arrays.
            padding: True or "longest" to the longest row, "max_length" to max_length or model_max_length, False for none.
            pad_to_multiple_of: round the padded length up.
            padding_side: None for the tokenizer's own.
            return_attention_mask: None for yes.
            return_tensors: "pt" or "np"; None for what was given.
            pad_token_id: what to pad with; None for the tokenizer's own.

        Raises:
            InputError: no ids in it, rows of its entries that do not go together, or no pad token.
        """
        columns = _columns(encoded_inputs)
        kind = return_tensors if return_tensors is not None else _kind(columns["input_ids"])
        if len(columns["input_ids"]) == 0:
            wants_mask = return_attention_mask or return_attention_mask is None
            return BatchEncoding(columns | ({"attention_mask": []} if wants_mask else {}), tensor_type=kind)
        side = self.padding_side if padding_side is None else padding_side
        shape = shape_of(padding, False, max_length, 0, pad_to_multiple_of, side, self.model_max_length)
        pad = self.pad_token_id if pad_token_id is None else pad_token_id
        rows: dict[str, list[Any]] = {key: _lists(value) for key, value in columns.items()}
        if single := not isinstance(rows["input_ids"][0], list):
            rows = {key: [value] for key, value in rows.items()}
        if return_attention_mask is not None:
            return_attention_mask = flag("return_attention_mask", return_attention_mask)
        if return_attention_mask is None:
            return_attention_mask = "attention_mask" in self.model_input_names
        if not return_attention_mask:
            rows.pop("attention_mask", None)
        elif "attention_mask" not in rows:
            rows["attention_mask"] = [[1] * len(row) for row in rows["input_ids"]]
        out = _padded(rows, shape, pad)
        return BatchEncoding({k: v[0] for k, v in out.items()} if single else out, tensor_type=kind)


def _padded(rows: dict[str, list[Any]], shape: Shape, pad: int | None) -> dict[str, list[Any]]:
    lengths = [len(as_ids(row)) for row in rows["input_ids"]]
    for key, column in rows.items():
        if len(column) != len(lengths):
            raise InputError(f"{key!r} has {len(column)} rows and input_ids {len(lengths)}; give as many of each")
    if shape.padding == "do_not_pad":
        return rows
    length = max(lengths) if shape.padding == "longest" else shape.max_length
    assert length is not None
    if shape.multiple:
        length = -(-length // shape.multiple) * shape.multiple
    if pad is None and min(lengths) < length:
        raise InputError(no_pad_token())
    fillers = {"input_ids": pad, **_FILLERS}
    return {
        key: [_filled(row, length - n, fillers[key], shape.side) for row, n in zip(column, lengths, strict=True)]
        if key in fillers
        else column
        for key, column in rows.items()
    }


def no_pad_token() -> str:
    """What to do without one."""
    return (
        "padding needs a pad token, and the tokenizer has none: set tokenizer.pad_token = tokenizer.eos_token, "
        "or tokenizer.add_special_tokens({'pad_token': '<|pad|>'})"
    )


def _filled(row: list[Any], count: int, filler: Any, side: str) -> list[Any]:
    return [filler] * count + row if side == "left" else row + [filler] * count


def _columns(encoded: Any) -> dict[str, Any]:
    """One dict of columns from a dict, a list of dicts, or rows of ids."""
    if isinstance(encoded, Mapping):
        columns = dict(encoded)
    elif isinstance(encoded, (list, tuple)) and encoded and isinstance(encoded[0], Mapping):
        keys = list(encoded[0])
        if odd := next((i for i, e in enumerate(encoded) if not isinstance(e, Mapping) or set(keys) - set(e)), None):
            raise InputError(f"encoding {odd} lacks entries of the first one, which has {', '.join(map(str, keys))}")
        columns = {key: [e[key] for e in encoded] for key in keys}
    else:
        columns = {
            "input_ids": listed("encoded_inputs", encoded) if isinstance(encoded, (set, np.ndarray, Tensor)) else encoded
        }
    if "input_ids" not in columns or not hasattr(columns["input_ids"], "__len__"):
        raise InputError(f"there are no input_ids to pad, but {', '.join(map(str, columns)) or type(encoded).__name__}")
    return columns


def _kind(ids: Any) -> str | None:
    """The kind of tensors that hold the ids."""
    first = ids[0] if isinstance(ids, (list, tuple)) and len(ids) else ids
    return "pt" if isinstance(first, Tensor) else "np" if isinstance(first, np.ndarray) else None


def _lists(value: Any) -> Any:
    """Tensors and arrays as lists, at any depth."""
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        return value.tolist()
    return [_lists(v) for v in value] if isinstance(value, (list, tuple)) else value
