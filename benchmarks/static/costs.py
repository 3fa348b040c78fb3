"""Bytes, FLOPs and launches of every op, of a prefill and of a decode step; floors on a given chip.

    python -m benchmarks.static.costs                                        # floors of the three models
    python -m benchmarks.static.costs --model 1.3B --batch 8 --context 1024  # every op of one step and one prefill

What is counted, and what is not:

- Weights are read once a step, cached keys and values once a step by the queries that see them, and each new key and value
  is written once. These two are the bytes of the floor. Activations are counted beside them and stay out of it: they fit
  into the L2 cache of the chips that this is for.
- A local layer reads at most its window, and never the rest of its ring.
- The head reads vocabulary rows in tiles of 64 (50304 for 50257), as every matrix kernel does.
- Of the embedding tables a step reads the rows of its tokens, which are counted as activations.
- A multiply and an add are two FLOPs. Only matrix products are counted: linear layers, scores and their sum over values, for
  the pairs of query and key that the mask leaves.
- The floor is the longer of bytes / bandwidth and FLOPs / rate of the whole, as if everything overlapped.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from benchmarks.models import DTYPES, SHAPES, config_of
from gptneo_fast import GPTNeoConfig
from gptneo_fast.network.cache import ring_slots
from gptneo_fast.ops.quantized import Format

BANDWIDTH, RATE = 3.0e12, 798e12  # B/s and FLOP/s of an H100 80GB HBM3: copy, read + write; bf16 matmul 8192^3
VOCABULARY_TILE = 64


@dataclass(frozen=True)
class Cost:
    """What one op, or a sum of ops, moves and computes.

    op: name. times: how often it occurs in the step; all other fields are of all occurrences together.
    weights, cache, activations: bytes, reads and writes together. flops: of matrix products. launches: of kernels.
    """

    op: str
    weights: int = 0
    cache: int = 0
    activations: int = 0
    flops: int = 0
    launches: int = 1
    times: int = 1

    @property
    def bytes(self) -> int:
        """What must cross the memory bus: weights and cache."""
        return self.weights + self.cache

    def __mul__(self, times: int) -> Cost:
        counts = (self.weights, self.cache, self.activations, self.flops, self.launches, self.times)
        return Cost(self.op, *(n * times for n in counts))

    def floor(self, bandwidth: float = BANDWIDTH, rate: float = RATE) -> float:
        """Seconds that no implementation can beat. bandwidth: bytes/s; rate: FLOP/s."""
        return max(self.bytes / bandwidth, self.flops / rate)


def total(costs: Iterable[Cost], op: str = "total") -> Cost:
    """The sum of costs."""
    rows = [dataclasses.astuple(c)[1:6] for c in costs]
    return Cost(op, *(sum(column) for column in zip(*rows, strict=True)))


def pairs(tokens: int, past: int, window: int) -> int:
    """Pairs of query and visible key of one row and head: `tokens` new ones after `past`, each seeing itself and what was
    before it, at most `window` keys where that is not 0."""
    first, last = past + 1, past + tokens
    if not window or last <= window:
        return (first + last) * tokens // 2
    ramp = max(0, window - first)  # queries that see less than a window
    return (first + first + ramp - 1) * ramp // 2 + (tokens - ramp) * window


@dataclass(frozen=True)
class Shape:
    """What the costs depend on. B rows of T new tokens each; every size in elements but `element`, which is bytes.

    how: the format of matrices in few bits; None where they are in the dtype of all else.
    """

    config: GPTNeoConfig
    B: int
    T: int
    element: int
    vocabulary_tile: int = VOCABULARY_TILE
    how: Format | None = None

    def matrix(self, out: int, inner: int) -> int:
        """Bytes of the weight of a linear layer, scales included."""
        if self.how is None:
            return out * inner * self.element
        return sum(math.prod(s) * d.itemsize for s, d in zip(self.how.shapes(out, inner), self.how.dtypes, strict=True))

    def linear(
        self, op: str, out: int, inner: int, *, bias: bool, norm: bool = False, extra: int = 0, launches: int = 1
    ) -> Cost:
        """[B * T, inner] times [out, inner] transposed. extra: elements a row that are read or written besides."""
        rows = self.B * self.T
        weights = self.matrix(out, inner) + ((out if bias else 0) + (2 * inner if norm else 0)) * self.element
        moved = rows * (inner + out + extra)
        return Cost(op, weights, 0, moved * self.element, 2 * rows * out * inner, launches)

    def embed(self) -> Cost:
        """Two rows read and one written for each token; int64 ids."""
        rows, C = self.B * self.T, self.config.hidden_size
        return Cost("embed", activations=rows * (3 * C * self.element + 16))

    def layer_norm(self) -> Cost:
        """Read and written once."""
        rows, C = self.B * self.T, self.config.hidden_size
        return Cost("layer_norm", 2 * C * self.element, 0, 2 * rows * C * self.element)

    def norm_qkv(self, op: str = "norm_qkv", launches: int = 1) -> Cost:
        """LayerNorm and three projections without bias. With the append folded in, keys and values go to the cache."""
        C = self.config.hidden_size
        cost = self.linear(op, 3 * C, C, bias=False, norm=True, launches=launches)
        if op == "norm_qkv":
            return cost
        stored = 2 * self.B * self.T * C * self.element
        return dataclasses.replace(cost, cache=stored, activations=cost.activations - stored)

    def norm_linear(self, launches: int = 1) -> Cost:
        """LayerNorm, c_fc, gelu_new."""
        return self.linear(
            "norm_linear", self.config.ffn_size, self.config.hidden_size, bias=True, norm=True, launches=launches
        )

    def linear_add(self, inner: int) -> Cost:
        """out_proj or c_proj, its bias and the residual."""
        C = self.config.hidden_size
        return self.linear("linear_add", C, inner, bias=True, extra=C)

    def attention(self, layer: int, past: int) -> Cost:
        """New tokens among themselves and over `past` cached ones, straight from q, k and v."""
        C, window = self.config.hidden_size, self.config.window(layer)
        flops = 4 * self.B * C * pairs(self.T, past, window)
        old = min(past, window - 1) if window else past
        cache = 2 * self.B * C * old * self.element
        return Cost("attention", 0, cache, 4 * self.B * self.T * C * self.element, flops)

    def decode_attention(self, layer: int, past: int) -> Cost:
        """New tokens over the cache, which holds them already."""
        C, window = self.config.hidden_size, self.config.window(layer)
        flops = 4 * self.B * C * pairs(self.T, past, window)
        keys = min(past + self.T, window - 1 + self.T) if window else past + self.T
        cache = 2 * self.B * C * keys * self.element
        return Cost("decode_attention", 0, cache, 2 * self.B * self.T * C * self.element, flops)

    def kv_append(self, layer: int) -> Cost:
        """The newest tokens, as many as the layer has slots."""
        columns = min(self.T, ring_slots(self.config, self.config.window(layer)))
        moved = 2 * self.B * columns * self.config.hidden_size * self.element
        return Cost("kv_append", 0, moved, moved)

    def head(self, rows: int, *, op: str = "lm_head", stored: bool = True) -> Cost:
        """ln_f and logits of `rows` positions, in float32 where they are stored at all."""
        C, V = self.config.hidden_size, self.config.vocab_size
        V = -(-V // self.vocabulary_tile) * self.vocabulary_tile
        moved = rows * (C * self.element + (V * 4 if stored else 4))
        return Cost(op, self.matrix(V, C) + 2 * C * self.element, 0, moved, 2 * rows * V * C)

    def sample(self) -> Cost:
        """One token a row out of float32 logits."""
        return Cost("sample", activations=self.B * (self.config.vocab_size * 4 + 8))


def decode_step(
    config: GPTNeoConfig,
    batch: int,
    context: int,
    dtype: torch.dtype,
    tokens: int = 1,
    tile: int = 64,
    how: Format | None = None,
) -> list[Cost]:
    """Costs by op of one step: 5 launches a layer and 3 around them.

    Args:
        context: keys that the last new token sees in a global layer, itself included.
        tokens: new tokens of each row.
        tile: rows of the vocabulary that the head reads at once; 1 for exactly what there is.
        how: the format of weights in few bits; None where they are in `dtype`.
    """
    s, past = Shape(config, batch, tokens, dtype.itemsize, tile, how), context - tokens
    attention = [s.decode_attention(layer, past) for layer in range(config.num_layers)]
    L = config.num_layers
    return [
        s.embed(),
        s.norm_qkv("norm_qkv_append") * L,
        dataclasses.replace(total(attention, "decode_attention"), times=L),
        s.linear_add(config.hidden_size) * L,
        s.norm_linear() * L,
        s.linear_add(config.ffn_size) * L,
        s.head(batch),
        s.sample(),
    ]


def prefill(
    config: GPTNeoConfig,
    batch: int,
    tokens: int,
    dtype: torch.dtype,
    *,
    cache: bool = True,
    past: int = 0,
    scoring: bool = False,
) -> list[Cost]:
    """Costs by op of a forward pass over `tokens` new tokens a row: at most 8 launches a layer with a cache, 7 without.

    Args:
        cache: whether keys and values are appended to one. past: tokens that it holds already.
        scoring: the log-probability of every token, without a tensor of logits, instead of the logits of the last one.
    """
    s, L = Shape(config, batch, tokens, dtype.itemsize), config.num_layers
    attention = [s.attention(layer, past) for layer in range(L)]
    append = [s.kv_append(layer) for layer in range(L)] if cache else []
    head = s.head(batch * tokens, op="logprob", stored=False) if scoring else s.head(batch)
    return [
        s.embed(),
        s.norm_qkv(launches=2) * L,
        dataclasses.replace(total(attention, "attention"), times=L),
        *([dataclasses.replace(total(append, "kv_append"), times=L)] if cache else []),
        s.linear_add(config.hidden_size) * L,
        s.norm_linear(launches=2) * L,
        s.linear_add(config.ffn_size) * L,
        s.layer_norm(),
        dataclasses.replace(head, weights=head.weights - 2 * config.hidden_size * dtype.itemsize),  # ln_f is counted above
    ]


WORK = {  # the columns of the table of floors
    "decode 1, ctx 128": lambda config, dtype: decode_step(config, 1, 128, dtype),
    "decode 8, ctx 1024": lambda config, dtype: decode_step(config, 8, 1024, dtype),
    "decode 64, ctx 2048": lambda config, dtype: decode_step(config, 64, 2048, dtype),
    "prefill 1x2048": lambda config, dtype: prefill(config, 1, 2048, dtype),
    "scoring 32x512": lambda config, dtype: prefill(config, 32, 512, dtype, cache=False, scoring=True),
}


def floors(shape: str, dtype: torch.dtype, bandwidth: float = BANDWIDTH, rate: float = RATE) -> dict[str, float]:
    """Seconds of each column of WORK for a released size."""
    config = config_of(shape)
    return {name: total(work(config, dtype)).floor(bandwidth, rate) for name, work in WORK.items()}


def as_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table with padded columns."""
    cells = [[str(c) for c in row] for row in ([*header], *rows)]
    width = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, width, strict=True)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in width) + "|", *lines[1:]])


def _floor_table(dtype: torch.dtype, bandwidth: float, rate: float) -> str:
    rows = []
    for shape in SHAPES:
        row = floors(shape, dtype, bandwidth, rate)
        first = next(iter(row.values()))
        rows.append([shape, *(f"{s * 1e3:.3f} ms" for s in row.values()), f"{1 / first:,.0f}"])
    return as_table(["model", *WORK, "tokens/s of the first"], rows)


def _op_table(costs: list[Cost], bandwidth: float, rate: float) -> str:
    def row(c: Cost) -> list[object]:
        sizes = (f"{n / 1e6:,.3f}" for n in (c.weights, c.cache, c.activations))
        return [c.op, c.times, c.launches, *sizes, f"{c.flops / 1e9:,.3f}", f"{c.floor(bandwidth, rate) * 1e6:,.1f}"]

    header = ["op", "times", "launches", "weights MB", "cache MB", "activations MB", "GFLOP", "floor us"]
    return as_table(header, [row(c) for c in [*costs, total(costs)]])


def main(argv: Sequence[str] | None = None) -> None:
    """Print the floors, or the ops of one model."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.static.costs", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", choices=SHAPES, help="show every op of this size instead of the floors of all")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int, default=128, help="keys that a decoded token sees; tokens of the prefill")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--bandwidth", type=float, default=BANDWIDTH, help="bytes/s of the chip")
    parser.add_argument("--rate", type=float, default=RATE, help="matrix FLOP/s of the chip")
    args = parser.parse_args(argv)
    dtype, chip = DTYPES[args.dtype], (args.bandwidth, args.rate)
    print(f"{args.dtype}, {args.bandwidth / 1e12:g} TB/s, {args.rate / 1e12:g} TFLOP/s\n")
    if args.model is None:
        print(_floor_table(dtype, *chip))
        return
    config = config_of(args.model)
    print(f"{args.model}, decode step, batch {args.batch}, context {args.context}\n")
    print(_op_table(decode_step(config, args.batch, args.context, dtype), *chip))
    print(f"\n{args.model}, prefill, {args.batch} x {args.context}\n")
    print(_op_table(prefill(config, args.batch, args.context, dtype), *chip))


if __name__ == "__main__":
    main()
