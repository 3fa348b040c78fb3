"""A model whose layers are in 8 or 4 bits: made of one of floats, loaded as one, told in config.json, and back again."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any, Self

from torch import Tensor, nn

from ..config import GPTNeoConfig
from ..errors import ConfigError, InputError, short
from ..network import decoding, quantized
from ..ops import quantized as ops
from ..ops.quantized import GROUPS, Format, QuantizedWeight
from . import calibration

METHOD, VERSION = "gptneo_fast", 1  # of `quantization_config`


class Quantizing(nn.Module):
    """What a model holds, in how many bits, and putting it into fewer."""

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Number of parameters, tied ones counted once."""
        model: Any = self
        embeddings = {id(model.base_model.wte.weight), id(model.base_model.wpe.weight)} if exclude_embeddings else set()
        found = sum(p.numel() for p in self.parameters() if (p.requires_grad or not only_trainable) and id(p) not in embeddings)
        packed = {id(weight): weight for weight in quantized.weights(self).values()}  # which nobody trains
        return found + sum(w.shape.numel() for w in packed.values() if not only_trainable and id(w) not in embeddings)

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of the parameters, and of buffers."""
        held = [*self.parameters(), *(self.buffers() if return_buffers else ())]
        return sum(t.nelement() * t.element_size() for t in held)

    def quantize_(
        self, quantize: str = "int4", group: int = 64, calibrate: Iterable[str | list[int] | Tensor] | None = None
    ) -> Self:
        """Put the linear layers of all blocks, the token embedding and lm_head into 8 or 4 bits, in place.

        A weight's numbers become integers times a scale, that of the least squared error: one a row in 8 bits, one for each
        `group` numbers of it in 4. Layers stay the modules they are, with their hooks; their `weight` is a QuantizedWeight
        then, which nothing trains or changes. Norms, biases, positions and the heads of classifiers stay as they are.

        Args:
            quantize: "int8" or "int4".
            group: 32, 64 or 128, in 4 bits.
            calibrate: texts, or token ids, on which layers of blocks are rounded so that errors cancel (GPTQ); some thousand
                tokens will do.

        Raises:
            InputError: no such format; a layer that is none of ours, in few bits already or not finite; no texts.
        """
        quantize_model(self, Format.of(quantize, group), calibrate)
        return self

    def dequantize_(self) -> Self:
        """The reverse of `quantize_`: layers of floats, in the model's dtype, with the numbers that they had come to."""
        dequantize_model(self)
        return self

    @property
    def is_quantized(self) -> bool:
        """Whether layers are in few bits, which transformers' Trainer asks: it trains adapters on them and nothing else."""
        return bool(quantized.weights(self))

    @property
    def hf_quantizer(self) -> Any:
        """What Trainer asks next: that adapters on such layers may be trained; None where they are floats."""
        if not self.is_quantized:
            return None
        named = SimpleNamespace(quant_method=METHOD)
        return SimpleNamespace(is_trainable=True, is_qat_trainable=False, quantization_config=named)


def described(how: Format) -> dict[str, Any]:
    """What config.json says of a format: `quantization_config`, where other libraries have theirs."""
    return {"quant_method": METHOD, "version": VERSION, "bits": how.bits, "group_size": how.group}


def told(config: GPTNeoConfig) -> Format | None:
    """The format that config.json says its weights are in; None for floats.

    Raises:
        ConfigError: another library's, a later version's, or none that there is.
    """
    said = vars(config).get("quantization_config")
    if said is None:
        return None
    if not isinstance(said, dict) or said.get("quant_method") != METHOD:
        method = said.get("quant_method") if isinstance(said, dict) else said
        raise ConfigError(
            f"quantization_config is of {short(method)}, whose weights gptneo_fast does not read; load the model as it was "
            "before, with quantize='int8' or 'int4'"
        )
    if (version := said.get("version")) != VERSION:
        raise ConfigError(
            f"quantization_config has version {short(version)}, and this gptneo_fast reads {VERSION}; install the one that "
            "wrote it"
        )
    bits, group = said.get("bits"), said.get("group_size")
    if not (bits == 8 and group is None) and not (bits == 4 and type(group) is int and group in GROUPS):
        raise ConfigError(
            f"quantization_config has bits {short(bits)} and group_size {short(group)}; there are 8 with null, and 4 with "
            f"{', '.join(map(str, GROUPS))}"
        )
    return Format(bits, group)


def asked(config: GPTNeoConfig, quantize: str | None) -> tuple[Format | None, Format | None]:
    """(the format that weights are in, the format to put them into), at most one of them.

    Raises:
        InputError: both, or no such format. ConfigError: as of `told`.
    """
    said, wanted = told(config), None if quantize is None else Format.of(quantize)
    if said is not None and wanted is not None:
        raise InputError(
            f"the checkpoint is {said} already; load the model as it was before, or leave out quantize={quantize!r}"
        )
    return said, wanted


def prepare(model: Any, how: Format, device: str = "meta") -> None:
    """Have a model without memory wait for weights in few bits."""
    for old, modules in _by_weight(model):
        weight = QuantizedWeight.empty(old.shape, how, device)
        for module in modules:
            quantized.convert(module, weight)


def quantize_model(model: Any, how: Format, calibrate: Iterable[str | list[int] | Tensor] | None) -> None:
    """As `quantize_`."""
    for name, module in quantized.places(model):
        kind = nn.Embedding if name.endswith("wte") else nn.Linear
        if isinstance(weight := getattr(module, "weight", None), QuantizedWeight):
            raise InputError(f"{name} is {weight.how} already; load the model as it was before")
        if type(module) is not kind or not isinstance(weight, nn.Parameter):
            raise InputError(
                f"{name} is a {type(module).__name__} and no plain {kind.__name__}; quantise first and change layers then "
                "(adapters go on top), or merge what was added"
            )
        if getattr(module, "max_norm", None) is not None:
            raise InputError(
                f"{name} has max_norm={module.max_norm}, which changes rows and those in few bits cannot; set it to None"
            )
        if not bool(weight.isfinite().all()):
            raise InputError(f"{name}.weight has NaN or infinite numbers, which integers cannot stand for; mend it first")
    decoding.forget(model.base_model)
    if calibrate is not None:
        calibration.quantize_blocks(model, how, calibrate)
    plain = _by_weight(model)[::-1]
    memory = _memory([old for old, _ in plain], how)
    while plain:
        (old, modules), weight = plain.pop(), memory.pop()
        for module in modules:
            quantized.convert(module, weight)
        weight.fill(old)
        del old  # which nothing holds any more
    model.config.quantization_config = described(how)


def _memory(plain: list[nn.Parameter], how: Format) -> list[QuantizedWeight]:
    """For these, in that order."""
    found: list[Any] = []
    for device, some in itertools.groupby(plain, lambda weight: weight.device):
        found += ops.memory((QuantizedWeight.empty(weight.shape, how, "meta") for weight in some), device)
    return found


def dequantize_model(model: Any) -> None:
    """As `dequantize_`."""
    decoding.forget(model.base_model)
    dtype = model.dtype
    modules: dict[QuantizedWeight, list[nn.Module]] = {}
    for name, weight in quantized.weights(model).items():
        modules.setdefault(weight, []).append(model.get_submodule(name))
    for weight, sharing in modules.items():
        plain = nn.Parameter(weight.dequantize(dtype))
        for module in sharing:
            quantized.revert(module, plain)
    vars(model.config).pop("quantization_config", None)


def _by_weight(model: Any) -> list[tuple[nn.Parameter, list[nn.Module]]]:
    """The weights that are to be kept in few bits and are floats yet, each with the layers that share it."""
    found: dict[int, tuple[nn.Parameter, list[nn.Module]]] = {}
    for _, module in quantized.places(model):
        if isinstance(weight := module.weight, nn.Parameter):
            found.setdefault(id(weight), (weight, []))[1].append(module)
    return list(found.values())
