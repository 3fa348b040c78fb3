"""What tests of the extension share: setup.py, and calls of kv_append with any bits in any layout, compared bit for bit."""

import importlib.util
import shutil
import sys
from pathlib import Path

import torch

from gptneo_fast.ops import reference

COMPILER = shutil.which("c++") or shutil.which("g++")

BITS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}
DTYPES = list(BITS)


def setup_py():
    """setup.py as a module; nothing is built by that."""
    spec = importlib.util.spec_from_file_location("gptneo_fast_setup", Path(__file__).parents[2] / "setup.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def noise(*shape, dtype=torch.float32, device="cpu"):
    """Any bits, NaNs and infinities included: an append copies, it does not compute."""
    bits = BITS[dtype]
    limits = torch.iinfo(bits)
    return torch.randint(limits.min, limits.max, shape, dtype=bits).view(dtype).to(device)


def projected(B, H, T, D, dtype=torch.float32, device="cpu"):
    """[B, H, T, D] as a projection gives it: a view of [B, T, H * D]."""
    return noise(B, T, H * D, dtype=dtype, device=device).unflatten(-1, (H, D)).transpose(1, 2)


def int32(values, device="cpu"):
    return torch.tensor(list(values), dtype=torch.int32, device=device)


def assert_like_reference(function, k_cache, v_cache, k, v, lengths, starts=None):
    """Both write the same bits into equal caches, the reference on the CPU."""
    want = [t.cpu().clone(memory_format=torch.contiguous_format) for t in (k_cache, v_cache)]
    reference.kv_append(*want, k.cpu(), v.cpu(), lengths.cpu(), starts if starts is None else starts.cpu())
    function(k_cache, v_cache, k, v, lengths, starts)
    for name, got, wanted in zip(("k_cache", "v_cache"), (k_cache, v_cache), want, strict=True):
        bits = BITS[got.dtype]
        different = (got.cpu().contiguous().view(bits) != wanted.view(bits)).nonzero()
        assert not len(different), f"{name} differs at {different[:5].tolist()}"


LAYOUTS = {
    "contiguous": lambda B, H, T, D, **kind: noise(B, H, T, D, **kind),
    "view of a projection": projected,
    "one element off alignment": lambda B, H, T, D, **kind: noise(B * H * T * D + 1, **kind)[1:].view(B, H, T, D),
    "odd row stride": lambda B, H, T, D, **kind: noise(B, H, T, D + 1, **kind)[..., :D],
    "head axis last": lambda B, H, T, D, **kind: noise(B, D, T, H, **kind).transpose(1, 3),
    "every second token": lambda B, H, T, D, **kind: noise(B, H, 2 * T, D, **kind)[:, :, ::2],
    "one head for all": lambda B, H, T, D, **kind: noise(B, 1, T, D, **kind).expand(B, H, T, D),
}
