"""Tensors of a checkpoint into the parameters of a model: foreign names, dtypes, what is missing and what is too much."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, warn_once

_MASK_BUFFERS = re.compile(r"h\.\d+\.attn\.attention\.(bias|masked_bias)")
_HEADS = ("lm_head.", "score.", "classifier.", "qa_outputs.")
_FIELDS = {  # parameter -> fields of the configuration that give its shape
    "wte.weight": "vocab_size, hidden_size",
    "wpe.weight": "max_position_embeddings, hidden_size",
}


@dataclass
class LoadReport:
    """What loading did, under transformers' names for it."""

    missing_keys: list[str] = field(default_factory=list)  # parameters that were freshly initialised
    unexpected_keys: list[str] = field(default_factory=list)  # tensors that no parameter took
    mismatched_keys: list[str] = field(default_factory=list)  # head parameters of another shape, initialised afresh


def canonical(name: str) -> str | None:
    """A tensor's name without the `transformer.` prefix, which base-model files lack; None for a mask buffer."""
    name = name.removeprefix("transformer.")
    return None if _MASK_BUFFERS.fullmatch(name) else name


def load_into(
    model: nn.Module,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    dtype: torch.dtype | None,
    device: torch.device,
    where: str,
    strict: bool = True,
    ignore_mismatched_sizes: bool = False,
) -> LoadReport:
    """Give every parameter of `model`, which may be on the meta device, its tensor.

    Args:
        model: its parameters are replaced. Shared parameters stay shared.
        tensors: names and values in any order.
        dtype: of the parameters; None for that of the first floating-point tensor.
        device: of the parameters.
        where: what errors call the checkpoint.
        strict: refuse tensors that nothing takes, and an lm_head that is not the embedding it is tied to.
        ignore_mismatched_sizes: start head parameters of another shape afresh.

    Raises:
        CheckpointError: a tensor of another shape or kind, one missing, one too many.
    """
    owners = _owners(model)
    tied = {k for k, places in owners.items() if "lm_head.weight" in places and k != "lm_head.weight"}
    report, loaded, too_much = LoadReport(), set[str](), list[str]()
    head: Tensor | None = None
    for name, tensor in tensors:
        key = canonical(name)
        if key is None:
            continue
        if key == "lm_head.weight" and tied:
            head = tensor
        elif key not in owners:
            (report.unexpected_keys if key.startswith(_HEADS) else too_much).append(name)
        elif not tensor.is_floating_point():
            raise CheckpointError(f"{where}: tensor {name!r} is {tensor.dtype}; weights are floating point")
        elif tensor.shape != (param := _first(owners, key, model)).shape:
            if not (ignore_mismatched_sizes and key.startswith(_HEADS)):
                raise _shape_error(where, name, key, tensor, param)
            report.mismatched_keys.append(name)
        else:
            dtype = dtype or tensor.dtype
            _place(model, owners[key], tensor.to(device=device, dtype=dtype, copy=True))
            loaded.add(key)
    if head is not None and "wte.weight" in loaded:
        _check_tied(head, _first(owners, "wte.weight", model), where, strict)
    if too_much and strict:
        raise CheckpointError(f"{where}: {_some(too_much)} fit no parameter; does config.json belong to these weights?")
    report.unexpected_keys += too_much
    missing = [k for k in owners if k not in loaded]
    if trunk := [k for k in missing if not k.startswith(_HEADS)]:
        raise CheckpointError(f"{where}: no tensor for {_some(trunk)}; does config.json belong to these weights?")
    for key in missing:
        empty = torch.empty_like(_first(owners, key, model), device=device, dtype=dtype)
        _place(model, owners[key], empty)
    report.missing_keys = missing
    if missing:
        warn_once(f"{where} has no weights for {_some(missing)}: freshly initialised, train them before use")
    return report


def _owners(model: nn.Module) -> dict[str, list[str]]:
    """Canonical name of each parameter -> every canonical place it has in the model (two where it is tied)."""
    owners: dict[str, list[str]] = {}
    first: dict[int, str] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        key = name.removeprefix("transformer.")
        owners.setdefault(first.setdefault(id(param), key), []).append(key)
    return owners


def _place(model: nn.Module, keys: list[str], tensor: Tensor) -> None:
    """Make `tensor` the parameter at each of these places."""
    param = nn.Parameter(tensor)
    for key in keys:
        module, _, name = _path(model, key).rpartition(".")
        model.get_submodule(module)._parameters[name] = param


def _first(owners: dict[str, list[str]], key: str, model: nn.Module) -> Tensor:
    return model.get_parameter(_path(model, owners[key][0]))


def _path(model: nn.Module, key: str) -> str:
    return f"transformer.{key}" if hasattr(model, "transformer") and not key.startswith(_HEADS) else key


def _check_tied(head: Tensor, wte: Tensor, where: str, strict: bool) -> None:
    if head.shape == wte.shape and torch.equal(head.to(device=wte.device, dtype=wte.dtype), wte):
        return
    message = (
        f"{where}: lm_head.weight {list(head.shape)} differs from wte.weight {list(wte.shape)} though "
        "tie_word_embeddings is true; set it to false in config.json"
    )
    if strict:
        raise CheckpointError(f"{message}, or pass strict=False to use wte.weight")
    warn_once(f"{message}; wte.weight is used")


def _shape_error(where: str, name: str, key: str, tensor: Tensor, param: Tensor) -> CheckpointError:
    about = _FIELDS.get(key, "num_labels" if key.startswith(_HEADS) else "hidden_size, intermediate_size")
    return CheckpointError(
        f"{where}: tensor {name!r} is {list(tensor.shape)}, config.json ({about}) asks for {list(param.shape)}"
        + ("; ignore_mismatched_sizes=True starts it afresh" if key.startswith(_HEADS) else "")
    )


def _some(names: list[str]) -> str:
    return ", ".join(sorted(names)[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
