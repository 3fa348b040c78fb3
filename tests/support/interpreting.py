"""The Triton interpreter as a test bench: bfloat16 put right, results poisoned, bytes around every tensor watched."""

from __future__ import annotations

import math
from contextlib import contextmanager

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from gptneo_fast.kernels import launch

MARGIN = 64  # elements before and after every tensor
_GARBAGE = 77  # below the largest integer of a dtype


def garbage(dtype: torch.dtype) -> float:
    """What nobody would compute with: NaN, or a number that no index may be."""
    return math.nan if dtype.is_floating_point else torch.iinfo(dtype).max - _GARBAGE


def fenced(x: Tensor) -> tuple[Tensor, Tensor]:
    """(a copy of x with its strides, the memory that it lies in, whose margins are NaN or a number no index may be)."""
    extent = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    memory = torch.full((extent + 2 * MARGIN,), garbage(x.dtype), dtype=x.dtype)
    copy = memory.as_strided(x.shape, x.stride(), MARGIN)
    if x.numel():
        copy.copy_(x)
    return copy, memory


def outside(x: Tensor, memory: Tensor) -> Tensor:
    """The bytes of `memory` that x does not cover."""
    covered = torch.zeros(len(memory), dtype=torch.bool)
    covered.as_strided(x.shape, x.stride(), MARGIN).fill_(True)
    return memory[~covered].view(torch.uint8).clone()


def watched(function, monkeypatch, mutates=()):
    """`function` so that reads and writes beside its tensors show, and results that it does not fill.

    Arguments lie between NaN and must come back bit for bit unless the op changes them; memory for results is NaN at first.
    """

    def call(*args):
        fences, results = [], []

        def empty(shape, like, dtype=None):
            x = like.new_empty(shape, dtype=dtype)
            x.fill_(garbage(x.dtype))
            copy, memory = fenced(x)
            results.append((copy, memory, outside(copy, memory)))
            return copy

        inner = []
        for i, x in enumerate(args):
            if not isinstance(x, Tensor):
                inner.append(x)
                continue
            copy, memory = fenced(x)
            fences.append((i, copy, memory, outside(copy, memory)))
            inner.append(copy)
        with monkeypatch.context() as patch:
            patch.setattr(launch, "empty", empty)
            out = function(*inner)
        for copy, memory, before in results:
            assert torch.equal(outside(copy, memory), before), "wrote beside a result"
        for i, copy, memory, before in fences:
            assert torch.equal(outside(copy, memory), before), f"wrote beside argument {i}"
            if i in mutates:
                args[i].copy_(copy)
            else:
                same = copy.contiguous().view(torch.uint8), args[i].contiguous().view(torch.uint8)
                assert torch.equal(*same), f"argument {i} was changed"
        return out

    return call


def _float32(handle):
    """The data of an operand, bfloat16 (which the interpreter keeps as the bits in uint16) as float32."""
    if handle.dtype.scalar == tl.bfloat16:
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    return handle.data


@contextmanager
def bfloat16(monkeypatch):
    """Let kernels take bfloat16 in the interpreter, which by itself multiplies its bits, and truncates to it from float32.

    Operands of dots are widened, and casts round to the nearest, as on a GPU.
    """
    cast_of_others = InterpreterBuilder.cast_impl

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        return TensorHandle(np.matmul(_float32(a), _float32(b), dtype=d.data.dtype) + d.data, d.dtype.scalar)

    def cast_impl(self, src, dst_type):
        kinds = src.dtype.scalar, dst_type.scalar
        if kinds == (tl.bfloat16, tl.float32):
            return TensorHandle(_float32(src), tl.float32)
        if kinds == (tl.float32, tl.bfloat16):
            bits = torch.from_numpy(np.ascontiguousarray(src.data)).bfloat16().view(torch.int16).numpy().view(np.uint16)
            return TensorHandle(bits, tl.bfloat16)
        return cast_of_others(self, src, dst_type)

    with monkeypatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_dot", create_dot)
        patch.setattr(InterpreterBuilder, "cast_impl", cast_impl)
        patch.setattr(launch, "INTERPRETED_DTYPES", launch.DTYPES)
        yield
