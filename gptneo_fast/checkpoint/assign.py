"""Tensors of a checkpoint into a model's parameters and buffers: foreign names, dtypes, what is missing and what is too much.

Everything is held against the configuration before the first weight is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, warn_once
from ..network import quantized
from ..network.quantized import QuantizedEmbedding
from ..ops.quantized import Format, QuantizedWeight, memory
from .fill import Copier, copier_for
from .shapes import check_shapes, layers_hint, some
from .weight_file import Stored

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
TRUNK = ("wte.", "wpe.", "h.", "ln_f.")  # what names of the trunk's parameters begin with; others are of heads
_RELEASED = re.compile(  # parameters that every trunk has: what a subclass adds starts afresh
    r"(wte|wpe)\.weight|ln_f\.(weight|bias)|h\.\d+\.(ln_1|ln_2|mlp\.c_fc|mlp\.c_proj|attn\.attention\.out_proj)\.(weight|bias)"
    r"|h\.\d+\.attn\.attention\.[qkv]_proj\.weight"
)
HEADS = ("lm_head.", "score.", "classifier.", "qa_outputs.")
_READ = (".weight", ".weight.values", ".weight.scales")
_MASK_BUFFERS = re.compile(r"h\.\d+\.attn\.attention\.(bias|masked_bias)")


@dataclass
class LoadReport:
    """What loading did, under transformers' names for it."""

    missing_keys: list[str] = field(default_factory=list)  # what starts afresh
    unexpected_keys: list[str] = field(default_factory=list)  # tensors that nothing took
    mismatched_keys: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    # of those, parameters of another shape: name, shape in the file, shape of the model

    def as_info(self) -> dict[str, Any]:
        """The dictionary of transformers, where a parameter of another shape is not called missing."""
        mismatched = {name for name, _, _ in self.mismatched_keys}
        return {
            "missing_keys": set(self.missing_keys) - mismatched,
            "unexpected_keys": set(self.unexpected_keys),
            "mismatched_keys": set(self.mismatched_keys),
            "error_msgs": list[str](),
        }


def canonical(name: str, prefix: str = "") -> str | None:
    """A tensor's name without the `transformer.` prefix, or the model's own, which base-model files lack; None for a mask
    buffer."""
    name = name.removeprefix("transformer.").removeprefix(prefix)
    return None if _MASK_BUFFERS.fullmatch(name) else name


def dtype_of(tensors: Iterable[Stored]) -> torch.dtype | None:
    """Of the weights of a checkpoint: that of the first; None where it has none."""
    floats = (t for t in tensors if t.dtype in FLOATS and not t.name.endswith(".scales"))
    return next((t.dtype for t in floats if canonical(t.name) is not None), None)


def load_into(
    model: nn.Module,
    tensors: Iterable[Stored],
    *,
    device: torch.device,
    where: str,
    strict: bool = True,
    ignore_mismatched_sizes: bool = False,
    check_finite: bool = True,
    quantize: Format | None = None,
) -> LoadReport:
    """Give every parameter of `model`, and every buffer that it saves, its tensor; they may be on the meta device.

    Args:
        model: these are replaced, all or none, and keep their dtypes. Shared parameters stay shared.
        tensors: places of the weights, in the order to read them.
        device: of the parameters.
        where: what errors call the checkpoint.
        strict: refuse tensors that nothing takes, and an lm_head that is not the embedding it is tied to.
        ignore_mismatched_sizes: start what has another shape afresh.
        check_finite: refuse NaN, infinities and values that a parameter's dtype cannot hold.
        quantize: put linear layers and embedding into few bits, from what the file holds, one after the other.

    Raises:
        CheckpointError: tensors of another shape or kind, missing or too many; a value that is not finite.
    """
    held, owners = dict(_held(model)), _owners(model)
    packed = {f"{canonical(n, _prefix(model))}.weight.{own}" for n, w in quantized.weights(model).items() for own in w._buffers}
    plan = _Plan(where, {key: held[key] for key in owners}, packed, _tied_head(owners), _prefix(model))
    for tensor in tensors:
        plan.add(tensor)
    report = plan.check(strict, ignore_mismatched_sizes)
    copier = copier_for(device, check_finite)
    places = _places(model) if quantize else set()
    few = [key for key in plan.taken if not places.isdisjoint(owners[key])]
    read = [k for k, t in plan.taken.items() if len(t.shape) == 2 and k.endswith(_READ) and k != "wpe.weight"]  # by every step
    like = {
        key: QuantizedWeight.empty(tensor.shape, quantize, "meta")
        if quantize and key in few
        else torch.empty(tensor.shape, dtype=plan.held[key].dtype, device="meta" if key in read else device)
        for key, tensor in plan.taken.items()
    }
    new = like | dict(zip(read, memory((like[key] for key in read), device), strict=True))
    copier.fill_all((plan.taken[key], value) for key, value in new.items() if isinstance(value, Tensor))
    for key in few:
        stored = plan.taken[key]
        whole = torch.empty(stored.shape, dtype=stored.dtype, device=device)
        copier.fill_all([(stored, whole)])
        if key == "wte.weight":
            _check_tied(copier, plan.heads, {key: whole}, where, strict)
        if isinstance(weight := new[key], QuantizedWeight):
            weight.fill(whole)
    _check_tied(copier, plan.heads, new, where, strict)
    for key in report.missing_keys:
        made = held[key].detach()
        new[key] = torch.empty_like(made, device=device) if made.is_meta else made.to(device)
    for key, value in new.items():
        _place(model, owners[key], value)
    for module in model.modules():
        if isinstance(module, QuantizedEmbedding):
            module.dtype_of = torch.empty_like(module.dtype_of, device=device)
        if isinstance(module, QuantizedWeight):
            module.arrange_()
    report.missing_keys = [_path(model, key) for key in report.missing_keys]
    report.mismatched_keys = [(_path(model, key), has, wants) for key, has, wants in report.mismatched_keys]
    if report.mismatched_keys:
        sizes = [f"{key} {list(has)} and not {list(wants)}" for key, has, wants in report.mismatched_keys]
        warn_once(f"{where} has {some(sizes)}: freshly initialised, train them before use")
    if absent := sorted(report.as_info()["missing_keys"]):
        warn_once(f"{where} has no weights for {some(absent)}: freshly initialised, train them before use")
    if others := [name for name in report.unexpected_keys if canonical(name) != "lm_head.weight"]:
        warn_once(f"{where}: {some(others)} belong to another class than {type(model).__name__} and were not loaded")
    return report


@dataclass
class _Plan:
    """Which tensor goes where, and all that speaks against it."""

    where: str
    held: dict[str, Tensor]  # what the model has
    packed: set[str]  # integers and scales of weights in few bits
    tied_head: bool
    prefix: str
    taken: dict[str, Stored] = field(default_factory=dict)
    heads: dict[str, Stored] = field(default_factory=dict)  # lm_head where it is tied, by the key of what it is tied to
    surplus: list[str] = field(default_factory=list)
    other_heads: list[str] = field(default_factory=list)
    no_floats: list[Stored] = field(default_factory=list)
    other_bits: list[tuple[Stored, torch.dtype]] = field(default_factory=list)

    def add(self, tensor: Stored) -> None:
        """Find the parameter of one tensor."""
        key = canonical(tensor.name, self.prefix)
        if key is None:
            return
        if key in self.taken:
            raise CheckpointError(f"{self.where}: {tensor.name!r} and {self.taken[key].name!r} are one parameter; keep one")
        if self.tied_head and (own := key.replace("lm_head.", "wte.", 1)) != key and own in self.held:
            self.heads[own] = tensor
        elif key not in self.held:
            (self.other_heads if key.startswith(HEADS) else self.surplus).append(tensor.name)
        else:
            self.taken[key] = tensor
            if key in self.packed and key.endswith(".values") and tensor.dtype is torch.int32:  # of a CPU's state dict
                self.held[key] = self.held[key].view(torch.int32)
            elif key in self.packed and len(tensor.shape) == 1:
                self.held[key] = self.held[key].flatten()
            wanted = self.held[key].dtype
            if key in self.packed or not wanted.is_floating_point:  # taken as they are
                if tensor.dtype is not wanted:
                    self.other_bits.append((tensor, wanted))
            elif tensor.dtype not in FLOATS:
                self.no_floats.append(tensor)

    def check(self, strict: bool, ignore_mismatched_sizes: bool) -> LoadReport:
        """What will be loaded, or every reason why not.

        Raises:
            CheckpointError: names tensors and the fields of config.json that they do not fit.
        """
        shapes = {key: tuple(tensor.shape) for key, tensor in self.held.items()}
        mismatched = []
        if ignore_mismatched_sizes:
            mismatched = [k for k, t in self.taken.items() if t.shape != shapes[k] and k not in self.packed]
        others = [(key, tuple(self.taken.pop(key).shape), shapes[key]) for key in mismatched]
        missing = [key for key in self.held if key not in self.taken]
        faults = []
        if self.no_floats:
            kinds = ", ".join(f"{t.name[:200]!r} is {str(t.dtype).removeprefix('torch.')}" for t in self.no_floats[:4])
            faults.append(f"weights are float32, float16, bfloat16 or float64, but tensor {kinds}")
        if self.other_bits:
            stored, wanted = self.other_bits[0]
            has, wants = (str(dtype).removeprefix("torch.") for dtype in (stored.dtype, wanted))
            more = f"; so are {len(self.other_bits) - 1} more of another dtype" if len(self.other_bits) > 1 else ""
            asks = "quantization_config in config.json asks for" if self.packed else "the model's buffer is"
            faults.append(f"tensor {stored.name[:200]!r} is {has}, and {asks} {wants}{more}")
        for key in self.packed:
            values, scales = self.taken.get(key), self.taken.get(f"{key.removesuffix('values')}scales")
            if key.endswith(".values") and values and scales and (values.dtype is torch.int32) != (len(scales.shape) == 1):
                faults.append(f"{values.name[:200]!r} and {scales.name[:200]!r} lie in different orders")
        if fault := check_shapes(self.taken, shapes):
            faults.append(fault)
        if trunk := [k for k in missing if (_RELEASED.fullmatch(k) or k in self.packed) and k not in mismatched]:
            faults.append(f"no tensor for {some(trunk)}{layers_hint(self.taken, self.surplus, shapes)}")
        if self.surplus and strict:
            faults.append(f"{some(self.surplus)} fit no parameter{layers_hint(self.taken, self.surplus, shapes)}")
        bits = [name for name in self.surplus if name.endswith(".weight.scales")]
        if bits and not self.packed:
            faults.append("weights are in few bits, and config.json has no quantization_config that says so")
        if faults:
            raise CheckpointError(f"{self.where}: {'; '.join(faults)}; does config.json belong to these weights?")
        return LoadReport(missing, self.other_heads + self.surplus, others)


def _held(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Canonical name of each parameter, and of each buffer that is saved; what is tied comes twice."""
    for name, tensor in model.named_parameters(remove_duplicate=False):
        yield canonical(name, _prefix(model)) or name, tensor
    for path, module in model.named_modules(remove_duplicate=False):
        for own, buffer in module._buffers.items():
            if buffer is not None and own not in module._non_persistent_buffers_set:
                name = f"{path}.{own}" if path else own
                yield canonical(name, _prefix(model)) or name, buffer


def _owners(model: nn.Module) -> dict[str, list[str]]:
    """Canonical name of each of these tensors -> every canonical place it has in the model (two where it is tied)."""
    owners: dict[str, list[str]] = {}
    first: dict[int, str] = {}
    for key, tensor in _held(model):
        owners.setdefault(first.setdefault(id(tensor), key), []).append(key)
    return owners


def _places(model: nn.Module) -> set[str]:
    """Canonical names of the weights that are kept in few bits where a model is."""
    return {f"{canonical(name, _prefix(model))}.weight" for name, _ in quantized.places(model)}


def _tied_head(owners: dict[str, list[str]]) -> bool:
    return any(place.startswith("lm_head.weight") and key != place for key, places in owners.items() for place in places)


def _place(model: nn.Module, keys: list[str], value: Tensor | QuantizedWeight) -> None:
    """Make `value` the parameter at each of these places, or the buffer, or the weight in few bits."""
    param: nn.Parameter | None = None
    for key in keys:
        module_name, _, name = _path(model, key).rpartition(".")
        module = model.get_submodule(module_name)
        if isinstance(value, QuantizedWeight):
            quantized.convert(module, value)
        elif name in module._buffers:
            module._buffers[name] = value
        else:
            param = nn.Parameter(value) if param is None else param  # trained, whatever it was before, as in transformers
            module._parameters[name] = param


def _path(model: nn.Module, key: str) -> str:
    prefix = _prefix(model)
    return f"{prefix}{key}" if hasattr(model, prefix[:-1]) and key.startswith(TRUNK) else key


def _prefix(model: nn.Module) -> str:
    """What the names of the trunk's parameters begin with in a model with a head."""
    return f"{getattr(model, 'base_model_prefix', 'transformer')}."


def _check_tied(
    copier: Copier, heads: dict[str, Stored], new: Mapping[str, Tensor | QuantizedWeight], where: str, strict: bool
) -> None:
    """Refuse a head that is not what it is tied to. heads: by the key in `new` of what that is."""
    for key, head in heads.items():
        own = new.get(key)
        if not isinstance(own, Tensor) or copier.equal(head, own):
            continue
        message = (
            f"{where}: {head.name} {list(head.shape)} differs from {key} {list(own.shape)} though tie_word_embeddings is true; "
            "set it to false in config.json"
        )
        if strict:
            raise CheckpointError(f"{message}, or pass strict=False to use {key}")
        warn_once(f"{message}; {key} is used")
