"""Other tiles for the kernels of a step and of a prompt, timed at the shapes of the models; winners as rows of their tables.

Stages "tiles 1/8" ... compile the candidates side by side and hold their results against float64; then "sweeps" times them
alone, one table row after another, and holds each winner against float64 once more. A table is replaced as a whole while a
candidate stands in it, and a candidate that no kernel has looked up counts as a fault.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.kernel_times import Args, Shapes, Work, exact
from benchmarks.gpu.stage import Case, LeftOut, Setting
from benchmarks.gpu.timing import per_call, rotating
from benchmarks.static.counting import swapped
from gptneo_fast import kernels
from gptneo_fast.kernels import gemm, gemv, linear, skinny

# The package's names for these are launchers.
attention, decode_attention = (importlib.import_module(f"gptneo_fast.kernels.{x}") for x in ("attention", "decode_attention"))
WORTH_IT = 0.98  # of the present tile's time: above it the present one stays


class NotAskedError(AssertionError):
    """No kernel has looked up the row that a candidate stood in."""


class Asked(dict[Any, Any]):
    """A tile table, or a function in place of one, that counts how often the row of `key` is looked up."""

    def __init__(self, rows: dict[Any, Any], key: Any) -> None:
        super().__init__(rows)
        self.key, self.times = key, 0

    def __getitem__(self, key: Any) -> Any:
        self.times += key == self.key
        return super().__getitem__(key)

    def get(self, key: Any, default: Any = None) -> Any:
        """As a dict's."""
        self.times += key == self.key
        return super().get(key, default)

    def __call__(self, *shape: Any) -> Any:
        return self[self.key]


@dataclass(frozen=True)
class Sweep:
    """One row of a tile table and what else could stand there.

    shape, work: the model, and the op at which it is timed. owner, table: the module and its table's name. key: of the row.
    present, others: tiles; where a rule chooses among several, tuples of them.
    library: of arguments, the same work by cuBLAS, where there is a choice.
    """

    shape: str
    work: Work
    owner: Any
    table: str
    key: Any
    present: Any
    others: list[Any]
    library: Callable[..., Any] | None = None

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.shape} {self.owner.__name__.rpartition('.')[2]}.{self.table}: {self.work.name}"

    @contextlib.contextmanager
    def standing(self, tile: Any) -> Iterator[None]:
        """Within it, `tile` stands in the table.

        Raises:
            NotAskedError: on leaving, where no kernel has looked it up.
        """
        before = getattr(self.owner, self.table)
        table = Asked((before if isinstance(before, dict) else {}) | {self.key: tile}, self.key)
        _forget()
        try:
            with swapped(self.owner, self.table, lambda _: table):
                yield
        finally:
            _forget()
        if not table.times:
            raise NotAskedError(f"{self.name}: no kernel has looked up row {self.key}")

    def row(self, tile: Any) -> str:
        """What can be pasted into the table."""
        return f"{self.key!r}: {tile!r},"


def _forget() -> None:
    """Drop what the kernels' modules remember of tiles."""
    for name, module in list(sys.modules.items()):
        if name.startswith("gptneo_fast.kernels"):
            for value in list(vars(module).values()):
                if callable(clear := getattr(value, "cache_clear", None)):
                    clear()


def compile_cases(setting: Setting, part: int, parts: int) -> Iterator[Case]:
    """Every `parts`th candidate, compiled and held against float64."""
    candidates = [(s, tile) for s in sweeps(setting) for tile in (s.present, *s.others)]
    for sweep, tile in itertools.islice(candidates, part, None, parts):
        yield Case(f"{sweep.name}, {tile}", lambda sweep=sweep, tile=tile: _fits(sweep, tile), 3)


def _fits(sweep: Sweep, tile: Any) -> dict[str, Any]:
    """Its error; a tile that the card has no room for is left out."""
    try:
        return _held(sweep, tile)
    except AssertionError:
        raise
    except Exception as error:
        raise LeftOut(f"this GPU cannot run the tile: {type(error).__name__}: {str(error)[:200]}") from error


def _held(sweep: Sweep, tile: Any) -> dict[str, Any]:
    """Its error as a share of what it may be; raises where that is more than one."""
    with sweep.standing(tile), _triton_alone():
        return exact(sweep.work)


def cases(setting: Setting) -> Iterator[Case]:
    """One case for each row of a table."""
    for sweep in sweeps(setting):
        yield Case(sweep.name, lambda sweep=sweep: measure(setting, sweep), 3)


@torch.no_grad()
def measure(setting: Setting, sweep: Sweep) -> dict[str, Any]:
    """Microseconds with each tile, and the row to paste where one of them wins."""
    sets, function = rotating(sweep.work.make, sweep.work.moved, setting.tiny), sweep.work.function()
    times: dict[Any, float] = {}
    failed = {}
    for tile in (sweep.present, *sweep.others):
        try:
            with sweep.standing(tile), _triton_alone():
                times[tile] = _us(function, sets, setting)
        except Exception as error:  # a tile that does not fit the card
            failed[repr(tile)] = f"{type(error).__name__}: {str(error)[:200]}"
    if sweep.present not in times:
        raise RuntimeError(f"the present tile cannot be timed: {failed.get(repr(sweep.present))}")
    best, now = _best(sweep, times, failed), times[sweep.present]
    row = {
        "now us": now,
        "best us": times[best],
        "row": sweep.row(best),
        "changes": best != sweep.present,
        "tried us": {repr(tile): us for tile, us in times.items()},
        "failed": failed,
    }
    if sweep.library is not None:
        row["library us"] = _us(sweep.library, sets, setting)
        row["faster"] = "Triton" if times[best] <= row["library us"] else "cuBLAS"
    return row


def _best(sweep: Sweep, times: dict[Any, float], failed: dict[str, str]) -> Any:
    """The fastest tile that is worth a change and keeps to the budget; the present one where there is none."""
    for tile, us in sorted(times.items(), key=lambda item: item[1]):
        if tile == sweep.present or us > WORTH_IT * times[sweep.present]:
            break
        try:
            _held(sweep, tile)
            return tile
        except AssertionError as fault:
            failed[repr(tile)] = str(fault)
    return sweep.present


def _us(function: Callable[..., Any], sets: list[Args], setting: Setting) -> float:
    return per_call([lambda args=args: function(*args) for args in sets], setting.device, rounds=5).seconds * 1e6


@contextlib.contextmanager
def _triton_alone() -> Iterator[None]:
    """Products of many rows that a GPU's library would take go to our kernel."""

    def ours(rows: Tensor, weight: Tensor, bias: Tensor, gelu: bool, y: Tensor) -> None:
        gemm.run(rows, (weight,), (y,), bias=bias, gelu=gelu)

    with swapped(linear, "by_library", lambda _: ours):
        yield


def sweeps(setting: Setting) -> Iterator[Sweep]:
    """All of them, the first model's first: gemv, attention of a step, skinny; then products and attention of a prompt."""
    for shape in setting.shapes if setting.mode == "full" else setting.shapes[:1]:
        shapes = Shapes(setting, shape)
        for sweep in (_gemvs(shapes), _decode_attentions(shapes), _skinnies(shapes), _prompts(shapes)):
            yield from sweep


def _first(setting: Setting, tiles: list[Any], most: int) -> list[Any]:
    return list(dict.fromkeys(tiles))[: 1 if setting.tiny else most]


def _kernel(work: Work) -> tuple[str, int]:
    """The name that gemv and skinny have for an op, and K."""
    name = {"norm_qkv_append": "qkv"}.get(work.op, work.op)
    inner = work.make(0)[1 if work.op == "linear_add" else 3].shape[-1]
    return name, inner


def _gemvs(shapes: Shapes) -> Iterator[Sweep]:
    """Granules of a program, how many are in flight, warps; then rows and columns of a load."""
    for work in (*shapes.linears("norm_qkv_append", 1, 1), shapes.head(1)):
        key = name, K = _kernel(work)
        t = gemv.tile(name, K, 2)
        others = [t._replace(granules=g, ahead=min(a, g)) for g in (1, 2, 3, 4, 6, 8) for a in (1, 2)]
        others += [t._replace(warps=w) for w in (2, 4, 8)]
        others += [t._replace(rows=t.rows * 2, BK=t.BK // 2), t._replace(rows=max(1, t.rows // 2), BK=min(K, t.BK * 2))]
        others = [o for o in others if o != t and o.rows * K * o.ahead / (64 * o.warps) <= 96]  # registers of a thread
        yield Sweep(shapes.shape, work, gemv, "TILES", key, t, _first(shapes.setting, others, 8))


def _decode_attentions(shapes: Shapes) -> Iterator[Sweep]:
    """Keys of a load, loads of a split, warps; one row for every batch, context and layer, see the module."""
    size = shapes.setting.dtype.itemsize
    t = decode_attention.ONE[size]
    others = [
        t._replace(BS=BS, steps=n, warps=w) for BS, n, w in ((32, 4, 2), (32, 16, 2), (32, 8, 4), (64, 4, 4), (16, 16, 1))
    ]
    for (batch, context), kind in itertools.product(shapes.setting.points[:3], shapes.layers):
        work = shapes.decode_attention(batch, context, kind)
        tiles = _first(shapes.setting, [o for o in others if o != t], 5)
        yield Sweep(shapes.shape, work, decode_attention, "ONE", size, t, tiles)


def _skinnies(shapes: Shapes) -> Iterator[Sweep]:
    """Shares of K, warps, stages, for 8 rows."""
    for work in shapes.linears("norm_qkv_append", 8, 1):
        key = _kernel(work)
        t = skinny.TILES.get(key, skinny.Tile(16, 4, 64, 1, 4, 3))
        others = [t._replace(splits=s) for s in (1, 2, 4, 8)] + [t._replace(stages=s) for s in (2, 3, 5)]
        others += [t._replace(SK=t.SK // 2, warps=t.warps // 2), t._replace(BM=32), t._replace(BK=128, stages=2)]
        yield Sweep(shapes.shape, work, skinny, "TILES", key, t, _first(shapes.setting, [o for o in others if o != t], 8))


def _prompts(shapes: Shapes) -> Iterator[Sweep]:
    """Products of a prompt beside cuBLAS, and its attention."""
    dtype, M = shapes.setting.dtype, 136 if shapes.setting.tiny else shapes.prompt  # fewer rows go to other kernels
    for work in shapes.linears("norm_qkv", 1, M):
        t = gemm.TILES[dtype.itemsize]
        others = [(gemm.Tile(*sizes),) for sizes in _GEMM]
        library = _LIBRARY[work.op]
        yield Sweep(shapes.shape, work, gemm, "TILES", dtype.itemsize, t, _first(shapes.setting, others, 9), library=library)
    for kind in shapes.layers:
        work, key = shapes.attention(kind), (dtype.itemsize, max(16, shapes.D))
        t = attention.TILES[key]
        others = [o for sizes in _ATTENTION if (o := attention.Tile(*sizes)) != t]
        yield Sweep(shapes.shape, work, attention, "TILES", key, t, _first(shapes.setting, others, 7))


_GEMM = [
    *((128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (128, 128, 64, 8, 3), (128, 128, 64, 4, 3), (128, 128, 64, 8, 4)),
    *((256, 128, 64, 8, 3), (64, 256, 64, 8, 4), (128, 128, 32, 4, 5), (64, 128, 64, 4, 4)),
]
_ATTENTION = [
    *((128, 128, 8, 2), (128, 64, 8, 2), (128, 64, 4, 3), (64, 64, 4, 3), (128, 128, 8, 3)),
    *((128, 32, 4, 3), (64, 128, 4, 2)),
]


def _qkv_by_library(
    x: Tensor, gamma: Tensor, beta: Tensor, q: Tensor, k: Tensor, v: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    y = kernels.layer_norm(x, gamma, beta, eps)
    return y @ q.t(), y @ k.t(), y @ v.t()


def _add_by_library(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    return torch.addmm(bias, x.flatten(0, -2), weight.t()).view_as(residual).add_(residual)


def _fc_by_library(x: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor, bias: Tensor, eps: float, gelu: bool) -> Tensor:
    y = kernels.layer_norm(x, gamma, beta, eps)
    return torch._addmm_activation(bias, y.flatten(0, -2), weight.t(), use_gelu=gelu)


_LIBRARY = {"norm_qkv": _qkv_by_library, "linear_add": _add_by_library, "norm_linear": _fc_by_library}
