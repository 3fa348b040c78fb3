"""Triton kernels, installed as `gptneo_fast.kernels`: tensors in, tensors out, no knowledge of the model.

A launcher bears the name of its op and has the signature of its reference, so that this package can be handed to a model
as the namespace that computes: on CUDA tensors, or with TRITON_INTERPRET=1 set before the import on CPU tensors too.
"""

from .append import kv_append
from .attention import attention
from .decode_attention import decode_attention
from .embedding import embed
from .linear import linear_add, lm_head, norm_linear, norm_qkv, norm_qkv_append
from .logprob import logprob
from .norms import layer_norm
from .packed import Packed
from .sampling import sample

__all__ = [
    "Packed",
    "attention",
    "decode_attention",
    "embed",
    "kv_append",
    "layer_norm",
    "linear_add",
    "lm_head",
    "norm_linear",
]
__all__ += ["logprob", "norm_qkv", "norm_qkv_append", "sample"]
