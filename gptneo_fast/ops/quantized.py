"""Weights in 8 and 4 bits: how they are rounded, how they lie in memory, and what they stand for.

A weight [N, K] is kept as integers and scales; number k of row n is integer[n, k] * scale[n, k // group], which `dequantize`
gives: the definition that every product is held to. Rows go on with zeros to a multiple of 64 numbers, and of the group.

- 8 bits: int8 [N, K padded], from -127 to 127, and one float32 scale a row: [N, 1].
- 4 bits: uint8 [N, K padded / 2], from -8 to 7, and a bfloat16 scale for each `group` numbers of a row: [N, K padded / group].
  64 numbers are 16 little-endian words of 16 bits; word j holds numbers j, 16 + j, 32 + j and 48 + j in four bits each, from
  its lowest up, every one made 8 larger.

So weights lie in files and on GPUs. On a CPU, whose vectors hold numbers of several rows, the same bytes are int32 [N, words]
of 32 bits, and the words of 16 rows lie side by side: in the place of rows [16, words] stands [words, 16], of fewer rows at the
end [words, rows]. Their scales lie likewise, as [N * groups]. `tiles` has that order.

There are no zero points: they lower the error of normal weights by 5 %, and groups of 32 in place of 64, which cost as many
bytes, by 10 %.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import is_int
from ..errors import InputError, short
from ..forks import new_lock
from . import extension, tiles

BLOCK = 64  # numbers of a row that lie together
GROUPS = (32, 64, 128)
_TRIED, _LEAST = 12, 0.6  # scales of a group in 4 bits: as many, from the one that cuts nothing off down to this share of it
_PIECE = 1 << 18  # numbers that are rounded at one time, in a cache
_arranging = new_lock()


@dataclass(frozen=True)
class Format:
    """How a weight is kept.

    bits: 8 or 4. group: numbers that share a scale, 32, 64 or 128; None in 8 bits, where a row does.
    """

    bits: int
    group: int | None = None

    @staticmethod
    def of(name: Any, group: Any = 64) -> Format:
        """The format of a name, "int8" or "int4".

        Raises:
            InputError: no such format, or no such group.
        """
        if name not in ("int8", "int4"):
            raise InputError(f"quantize={short(name)} is unknown; use 'int8' or 'int4', or None for weights as they are")
        if name == "int8":
            return Format(8)
        if not is_int(group) or group not in GROUPS:
            raise InputError(
                f"group={short(group)} is not offered; numbers that share a scale are {', '.join(map(str, GROUPS))}"
            )
        return Format(4, int(group))

    def __str__(self) -> str:
        return f"int{self.bits}" + (f" in groups of {self.group}" if self.group else "")

    @property
    def range(self) -> tuple[int, int]:
        """The smallest and the largest integer."""
        return (-127, 127) if self.bits == 8 else (-8, 7)

    @property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """Of the integers, row by row, and of the scales."""
        return (torch.int8, torch.float32) if self.bits == 8 else (torch.uint8, torch.bfloat16)

    def shapes(self, N: int, K: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Of the integers, row by row, and of the scales, for a weight [N, K]."""
        unit = max(BLOCK, self.group or 0)
        padded = -(-K // unit) * unit
        return (N, padded * self.bits // 8), (N, padded // self.group if self.group else 1)


class QuantizedWeight(nn.Module):
    """What stands in the place of a weight [N, K]. It is no tensor, so that nothing can change it without a word.

    Args:
        values, scales: as in this module's first lines, in either order; may be on the meta device.
        K: numbers of a row.
        how: the format.
    """

    values: Tensor
    scales: Tensor

    def __init__(self, values: Tensor, scales: Tensor, K: int, how: Format) -> None:
        super().__init__()
        self.register_buffer("values", values)
        self.register_buffer("scales", scales)
        self.shape, self.how = torch.Size((len(values), K)), how

    @staticmethod
    def of(weight: Tensor, how: Format) -> QuantizedWeight:
        """The weight [N, K] rounded, see `quantize`."""
        return QuantizedWeight.empty(weight.shape, how, weight.device).fill(weight)

    @staticmethod
    def empty(shape: Sequence[int], how: Format, device: torch.device | str) -> QuantizedWeight:
        """The memory of a weight [N, K], row by row."""
        N, K = shape
        values, scales = (torch.empty(s, dtype=d, device=device) for s, d in zip(how.shapes(N, K), how.dtypes, strict=True))
        return QuantizedWeight(values, scales, K, how)

    def fill(self, weight: Tensor) -> QuantizedWeight:
        """Become the weight [N, K] rounded, see `quantize`, in its own memory, which lies row by row; returns itself."""
        quantize(weight, self.how, (self.values, self.scales))
        return self.arrange_()

    def arrange_(self) -> QuantizedWeight:
        """Bring it into the CPU's order if it is there, in its own memory, which nobody else may have; returns itself."""
        if self.device.type == "cpu" and not self.is_side_by_side:
            self._set(*tiles.side_by_side_(self.values, self.scales))
        return self

    @property
    def is_side_by_side(self) -> bool:
        """Whether words of 16 rows lie side by side, as on a CPU."""
        return tiles.is_side_by_side(self.values)

    def row_by_row(self) -> tuple[Tensor, Tensor]:
        """(integers, scales) as in files and on GPUs; copies where they lie otherwise."""
        return tiles.row_by_row(self.values, self.scales, self.how.dtypes[0])

    def side_by_side(self) -> tuple[Tensor, Tensor]:
        """(words, scales) as a CPU multiplies them; brought into that order, in memory of its own, where it came otherwise."""
        own: dict[str, Any] = self._buffers  # no attributes of modules, for each layer asks in each call
        if not tiles.is_side_by_side(own["values"]):
            with _arranging, torch.inference_mode(False):
                if not tiles.is_side_by_side(own["values"]):  # another thread may have been here
                    self._set(*tiles.side_by_side(self.values, self.scales))
        return own["values"], own["scales"]

    def _set(self, values: Tensor, scales: Tensor) -> None:
        self.scales = scales  # first, since who sees words looks no further
        self.values = values

    def __getattr__(self, name: str) -> Any:
        """As torch's, with the way out: libraries ask a weight for `data` to change it."""
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            raise AttributeError(
                f"a weight in 8 or 4 bits has no {name!r}, since nothing can change it; weight.dequantize() is it as a tensor, "
                "and model.dequantize_() makes plain layers"
            ) from error

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.values.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the integers as they lie in memory: no floating-point one."""
        return self.values.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of integers and scales."""
        return self.values.nbytes + self.scales.nbytes

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [N, K] that it stands for; a copy."""
        return dequantize(self.values, self.scales, self.shape[1], self.how, dtype)

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows [..., K] of that, for ids [...]."""
        flat = ids.flatten()
        if self.is_side_by_side:
            words, scales = (tiles.rows(t, flat, self.shape[0]) for t in (self.values, self.scales))
            found = _scaled(tiles.integers(words, self.how.bits), scales, self.shape[1], dtype)
        else:
            values, scales = (t.index_select(0, flat) for t in (self.values, self.scales))  # refuses ids below 0, too
            found = dequantize(values, scales, self.shape[1], self.how, dtype)
        return found.view(*ids.shape, self.shape[1])

    def extra_repr(self) -> str:
        """For print(model)."""
        return f"{list(self.shape)}, {self.how}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """As torch's, for devices, of which the CPU has its own order: scales keep their dtype whatever that of the model
        becomes, since they are half of what the integers mean."""
        as_int = {torch.bfloat16: torch.int16, torch.float32: torch.int32}
        scales = self.scales

        def kept(t: Tensor) -> Tensor:
            moved = fn(t)
            if moved.dtype is not t.dtype:
                raise InputError(
                    f"weights in {self.how} are integers and scales, of which .type({moved.dtype}) would make other numbers; "
                    "use .to(), which leaves them, or dequantize_() first"
                )
            return moved

        super()._apply(lambda t: kept(t.view(as_int[t.dtype])).view(t.dtype) if t is scales else kept(t), recurse)
        if self.device.type != "cpu":
            self._set(*self.row_by_row())
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """As torch's, from either order."""
        own, (values, scales) = self.how.dtypes[0], (state_dict.get(f"{prefix}{name}") for name in ("values", "scales"))
        if isinstance(values, Tensor) and isinstance(scales, Tensor) and values.dim() == 2:
            if self.is_side_by_side and values.dtype is own and scales.dim() == 2 and values.shape[1] % 4 == 0:
                values, scales = tiles.side_by_side(values, scales)
            elif not self.is_side_by_side and tiles.is_side_by_side(values) and scales.numel() % len(values) == 0:
                values, scales = tiles.row_by_row(values, scales, own)
            state_dict = state_dict | {f"{prefix}values": values, f"{prefix}scales": scales}
        super()._load_from_state_dict(state_dict, prefix, *args)


def memory(like: Iterable[Tensor | QuantizedWeight], device: torch.device) -> list[Tensor | QuantizedWeight]:
    """Of tensors and of weights in few bits as these on the meta device, without values; as `extension.memory`."""
    wanted = list(like)
    parts = [t for one in wanted for t in ([one] if isinstance(one, Tensor) else one.buffers())]
    made = iter(extension.memory(parts, device))
    return [
        next(made) if isinstance(one, Tensor) else QuantizedWeight(next(made), next(made), one.shape[1], one.how)
        for one in wanted
    ]


Weight = Tensor | QuantizedWeight  # what the ops take where a linear layer or an embedding has its weight


def plain(weight: Weight, dtype: torch.dtype) -> Tensor:
    """A weight as a tensor: as it is, or what it stands for in a dtype."""
    return weight if isinstance(weight, Tensor) else weight.dequantize(dtype)


class _Linear(torch.autograd.Function):
    """x @ weight.T, which keeps for its backward pass the integers and not the weight that they stand for."""

    @staticmethod
    def forward(x: Tensor, values: Tensor, scales: Tensor, how: Format) -> Tensor:
        return F.linear(x, dequantize(values, scales, x.shape[-1], how, x.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, values, scales, ctx.how = inputs
        ctx.save_for_backward(values, scales)
        ctx.K = x.shape[-1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        values, scales = ctx.saved_tensors
        return grads[0] @ dequantize(values, scales, ctx.K, ctx.how, grads[0].dtype), None, None, None


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, with gradients of x and bias. x: [..., K]; weight: [N, K]; bias: [N]; returns [..., N]."""
    if isinstance(weight, Tensor):
        return F.linear(x, weight, bias)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    kept = torch.is_grad_enabled() and x.requires_grad and not torch.compiler.is_compiling()
    if not kept or torch._C._functorch.peek_interpreter_stack() is not None:
        return F.linear(x, weight.dequantize(x.dtype), bias)
    y: Tensor = _Linear.apply(x, weight.values, weight.scales, weight.how)
    return y if bias is None else y + bias.to(y.dtype)


def quantize(weight: Tensor, how: Format, out: tuple[Tensor, Tensor]) -> None:
    """Round a weight [N, K] into `out`, integers row by row and scales: each group's of the least squared error.

    Raises:
        InputError: NaN or infinite numbers.
    """
    N, K = weight.shape
    values, scales = out
    for i in range(0, N, step := max(1, _PIECE // max(1, K))):
        part = grouped(weight[i : i + step].detach().float(), how)
        if not bool(part.isfinite().all()):
            raise InputError("a weight has NaN or infinite numbers, which integers cannot stand for; mend it first")
        scale = best_scales(part, how)
        values[i : i + step] = pack(rounded(part, scale, how), how)
        scales[i : i + step] = scale


def grouped(weight: Tensor, how: Format) -> Tensor:
    """[N, groups, numbers of each], padded with zeros, of a weight [N, K]."""
    N, K = weight.shape
    (_, width), (_, groups) = how.shapes(N, K)
    padded = width * 8 // how.bits
    return F.pad(weight, (0, padded - K)).view(N, groups, padded // groups)


def best_scales(x: Tensor, how: Format) -> Tensor:
    """Scales [N, groups] of float32 numbers [N, groups, G], in the dtype they are kept in."""
    low, high = x.amin(-1), x.amax(-1)
    least, most = how.range
    whole = torch.maximum(high / most, low / least)
    if how.bits == 8:  # others lower the error by 0.2 %
        return whole.to(how.dtypes[1])
    # the largest number on -8, where there is one integer more: a scale below zero where it is positive
    other = torch.where(high > -low, high, low) / least
    best, found = torch.full_like(low, float("inf")), whole.to(how.dtypes[1])
    for top in (whole, other):
        for i in range(_TRIED):
            scale = (top * (1 - (1 - _LEAST) * i / (_TRIED - 1))).to(how.dtypes[1])
            error = (rounded(x, scale, how) * scale.float()[..., None]).sub_(x).square_().sum(-1)
            found = torch.where(error < best, scale, found)
            best = torch.minimum(error, best)
    return found


def rounded(x: Tensor, scale: Tensor, how: Format) -> Tensor:
    """The integers, as float32 [N, groups, G], that are nearest to x / scale; zeros where the scale is."""
    wide = scale.float()[..., None]
    return (x / torch.where(wide == 0, 1.0, wide)).round_().clamp_(*how.range) * (wide != 0)


def pack(integers: Tensor, how: Format) -> Tensor:
    """Integers [N, groups, G] as they lie row by row."""
    flat = integers.flatten(1)
    if how.bits == 8:
        return flat.to(torch.int8)
    words = (flat + 8).to(torch.uint8).view(len(flat), -1, 4, BLOCK // 4)  # [N, blocks, place in a word, word]
    return torch.stack([words[:, :, 0] | words[:, :, 1] << 4, words[:, :, 2] | words[:, :, 3] << 4], -1).flatten(1)


def unpack(values: Tensor, how: Format) -> Tensor:
    """int8 [N, K padded] of what `pack` gave."""
    if how.bits == 8:
        return values
    low, high = values.reshape(len(values), values.shape[1] * 2 // BLOCK, BLOCK // 4, 2).unbind(-1)
    words = torch.stack([low & 15, low >> 4, high & 15, high >> 4], 2)
    return words.flatten(1).to(torch.int8) - 8


def dequantize(values: Tensor, scales: Tensor, K: int, how: Format, dtype: torch.dtype) -> Tensor:
    """The weight [N, K] that integers and scales stand for: products in float32, or in float64, rounded once to `dtype`."""
    if tiles.is_side_by_side(values):
        return _scaled(tiles.all_integers(values, how.bits), tiles.scales_of(scales, len(values)), K, dtype)
    values, scales = tiles.row_by_row(values, scales, how.dtypes[0])
    return _scaled(unpack(values, how), scales, K, dtype)


def _scaled(integers: Tensor, scales: Tensor, K: int, dtype: torch.dtype) -> Tensor:
    """[n, K] of integers [n, K padded] and scales [n, groups], row by row."""
    wide = torch.promote_types(dtype, torch.float32)
    parts = integers.unflatten(1, (scales.shape[1], integers.shape[1] // scales.shape[1]))
    return (parts.to(wide) * scales.to(wide)[..., None]).flatten(1)[:, :K].to(dtype)
