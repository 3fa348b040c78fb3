"""Launches every op at many sizes of a model's shape and prints, as JSON, how many binaries Triton would compile.

Usage: specialised.py MODEL DTYPE. Nothing is compiled: what Triton would look up stands in for it. Needs a process without
TRITON_INTERPRET.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict

import torch
from torch._subclasses import FakeTensorMode
from triton.runtime.jit import JITFunction

from benchmarks.models import DTYPES, config_of
from benchmarks.static.aot import Launchpad
from benchmarks.static.counting import swapped
from gptneo_fast import kernels
from gptneo_fast.kernels import launch

LENGTHS, BATCHES, SLOTS = (1, 2, 15, 16, 17, 32, 100, 2048), (1, 2, 3, 16, 17, 64), (16, 48, 130, 384, 2048)


def calls(shape, dtype):
    """(op, arguments) over lengths, batches and slots of the cache."""
    config = config_of(shape)
    C, F, V, H, D = config.hidden_size, config.ffn_size, config.vocab_size, config.num_heads, config.head_dim

    def new(*sizes, dtype=dtype):
        return torch.empty(*sizes, dtype=dtype, device="cuda")

    def heads(x):
        return x.unflatten(-1, (H, D)).transpose(1, 2)

    gamma, square, up, down = new(C), new(C, C), new(F, C), new(C, F)
    tables = new(V, C), new(2048, C)
    for B in BATCHES:
        lengths = new(B, dtype=torch.int32)
        for T in LENGTHS:
            x, ids = new(B, T, C), new(B, T + 3, dtype=torch.int64)
            q = heads(x)
            for taken in (ids.narrow(1, 0, T), ids.narrow(1, 3, T), new(B, T, dtype=torch.int64)):
                yield "embed", (taken, new(1, T, dtype=torch.int64), *tables)
            yield "layer_norm", (x, gamma, gamma, 1e-5)
            yield "norm_qkv", (x, gamma, gamma, square, square, square, 1e-5)
            yield "linear_add", (x, square, gamma, x)
            yield "norm_linear", (x, gamma, gamma, up, new(F), 1e-5, True)
            yield "linear_add", (new(B, T, F), down, gamma, x)
            for slots in SLOTS:
                cache = new(B, H, slots, D), new(B, H, slots, D)
                yield "kv_append", (*cache, q, q, lengths)
                yield "attention", (q, q, q, 256, None, None, *cache, lengths)
                if T <= 129:
                    yield "norm_qkv_append", (x, gamma, gamma, square, square, square, 1e-5, *cache, lengths)
                    yield "decode_attention", (q, *cache, lengths, 256)
                    yield "decode_attention", (q, *(c.narrow(2, 0, slots - 3) for c in cache), lengths, 0)
            yield "attention", (q, q, q, 0)
        yield "lm_head", (new(B, 1, C), gamma, gamma, new(V, C), 1e-5)
        for method in range(4):
            whole = new(4, dtype=torch.float32), new(3, dtype=torch.int32), new(V, dtype=torch.uint8)
            state, out = new(5, B, dtype=torch.int64), new(100 + B, B, dtype=torch.int64)
            logits = new(B, V + -V % 8, dtype=torch.float32).narrow(1, 0, V)
            yield "sample", (logits, *whole, new(B, dtype=torch.int64), None, state, out.t(), lengths, method)


def main(shape, dtype):
    binaries = defaultdict(set)

    def looked_up(_):
        def record(kernel, key, signature, device, constexprs, options, attrs, warmup):
            set_ = {p.name: str(constexprs[p.num,]) for p in kernel.params if p.is_constexpr}
            absent = [kernel.params[at].name for (at, *_), value in constexprs.items() if value is None]
            asked = json.dumps([kernel.__name__, set_, absent, options.num_warps, options.num_stages])
            binaries[asked].add(json.dumps([signature, sorted(map(str, attrs.items())), sorted(map(str, constexprs.items()))]))
            raise RuntimeError("looked up, not compiled")

        return record

    with Launchpad(90) as pad, FakeTensorMode(), swapped(JITFunction, "_do_compile", looked_up):
        for op, args in calls(shape, DTYPES[dtype]):
            getattr(kernels, op)(*args)
    assert all("looked up, not compiled" in made.fault for made in pad.launches), pad.launches[0].fault
    assert not launch.INTERPRETED
    rows = [[*json.loads(asked)[:2], len(found)] for asked, found in binaries.items()]
    print(json.dumps({"launches": len(pad.launches), "binaries": rows}))


if __name__ == "__main__":
    main(*sys.argv[1:])
