"""Linear layers and embeddings whose weight is in 8 or 4 bits; what a model has of them, and making them in place.

They are nn.Linear and nn.Embedding by class, with the same names and meaning, but `weight` is a QuantizedWeight: what would
change it, or train it, fails instead of being lost. Gradients flow through them to x and to bias.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..ops import backends, cpu, quantized
from ..ops.quantized import Format, QuantizedWeight
from . import touch
from .touch import Watched

_LINEARS = (
    *("attn.attention.q_proj", "attn.attention.k_proj", "attn.attention.v_proj", "attn.attention.out_proj"),
    *("mlp.c_fc", "mlp.c_proj"),
)


class QuantizedLinear(nn.Linear):
    """x @ weight.T + bias for a QuantizedWeight.

    Args:
        weight: [N, K].
        bias: [N], or None.
    """

    weight: Any  # a QuantizedWeight, or what somebody put in its place

    def __init__(self, weight: QuantizedWeight, bias: nn.Parameter | None = None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight = weight
        self.register_parameter("bias", bias)

    def forward(self, input: Tensor) -> Tensor:
        """[..., K] to [..., N]."""
        if isinstance(self.weight, Tensor):  # somebody's own in its place
            return super().forward(input)
        grad = torch.is_grad_enabled() and (input.requires_grad or (self.bias is not None and self.bias.requires_grad))
        on_cpu = input.device.type == "cpu" and not backends.why_no_extension("cpu")
        if grad or not on_cpu or not touch.is_readable() or touch.observed(input.device):
            return quantized.linear(input, self.weight, self.bias)
        y = cpu.linear(input.contiguous(), self.weight)
        return y if self.bias is None else y + self.bias

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """As torch's; weights in few bits are not trained, which libraries that copy a layer to train it are to hear."""
        if requires_grad and not isinstance(self.weight, Tensor):
            raise InputError(f"weights in {self.weight.how} cannot be trained; dequantize_() the model, or train an adapter")
        return super().requires_grad_(requires_grad)

    def extra_repr(self) -> str:
        """For print(model)."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class QuantizedEmbedding(nn.Embedding):
    """Rows of a QuantizedWeight, in the dtype of the model.

    Args:
        weight: [V, C].
        dtype: of the rows; `.to(dtype)` changes it.
    """

    weight: Any  # a QuantizedWeight, or what somebody put in its place
    dtype_of: Tensor  # [0], which moves with the model

    def __init__(self, weight: QuantizedWeight, dtype: torch.dtype = torch.float32) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = weight.shape
        self.padding_idx = self.max_norm = None
        self.norm_type, self.scale_grad_by_freq, self.sparse = 2.0, False, False
        self.weight = weight
        self.register_buffer("dtype_of", torch.empty(0, dtype=dtype), persistent=False)

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """As torch's; weights in few bits are not trained, which libraries that copy a layer to train it are to hear."""
        if requires_grad and not isinstance(self.weight, Tensor):
            raise InputError(f"weights in {self.weight.how} cannot be trained; dequantize_() the model, or train an adapter")
        return super().requires_grad_(requires_grad)

    def forward(self, input: Tensor) -> Tensor:
        """Ids [...] to [..., C]."""
        if isinstance(self.weight, Tensor):  # somebody's own in its place
            return super().forward(input)
        if self.max_norm is not None:
            raise InputError(f"max_norm={self.max_norm} changes rows, which those of {self.weight.how} cannot; leave it None")
        return self.weight.rows(input, self.dtype_of.dtype)


touch.ours(QuantizedLinear, QuantizedEmbedding)


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a linear layer, of floats or in few bits, is exactly that."""
    return touch.is_plain(module, nn.Linear) or touch.is_plain(module, QuantizedLinear)


def is_plain_embedding(module: nn.Module) -> bool:
    """Whether looking rows up is all that an embedding does."""
    return touch.is_plain_embedding(module) or (touch.is_plain(module, QuantizedEmbedding) and module.max_norm is None)


def dtype_of(wte: nn.Module | None) -> torch.dtype | None:
    """Of the rows of a token embedding; None where it is another module."""
    if isinstance(wte, QuantizedEmbedding) and isinstance(wte.weight, QuantizedWeight):
        return wte.dtype_of.dtype
    return wte.weight.dtype if isinstance(wte, nn.Embedding) else None


def places(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of each layer that is kept in few bits where a model is: linear layers of blocks, embedding, head."""
    trunk = model.base_model
    prefix = "" if trunk is model else f"{model.base_model_prefix}."
    yield f"{prefix}wte", trunk.wte
    for i in range(len(trunk.h)):
        for name in _LINEARS:
            yield f"{prefix}h.{i}.{name}", trunk.h[i].get_submodule(name)
    if (head := getattr(model, "lm_head", None)) is not None:
        yield "lm_head", head


def weights(model: nn.Module) -> dict[str, QuantizedWeight]:
    """Name and weight of each layer in few bits; tied ones are there twice."""
    return {
        name: module.weight
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, QuantizedLinear | QuantizedEmbedding) and isinstance(module.weight, QuantizedWeight)
    }


def format_of(model: nn.Module) -> Format | None:
    """How a model's layers are kept; None for floats.

    Raises:
        InputError: some in one way, some in another.
    """
    found = {weight.how for weight in weights(model).values()}
    if len(found) > 1:
        raise InputError(f"layers are in different formats: {', '.join(sorted(map(str, found)))}; keep to one")
    return found.pop() if found else None


def convert(module: nn.Module, weight: QuantizedWeight) -> None:
    """Make a linear layer or an embedding one in few bits, in place: who holds it, its hooks and its bias stay."""
    embedding = isinstance(module, nn.Embedding)
    if embedding:
        old = cast(Tensor, module.weight)
        module.register_buffer("dtype_of", torch.empty(0, dtype=old.dtype, device=old.device), persistent=False)
    module._parameters.pop("weight", None)
    module._modules.pop("weight", None)
    module.__class__ = QuantizedEmbedding if embedding else QuantizedLinear
    module.add_module("weight", weight)
    Watched.changes += 1


def revert(module: Any, weight: nn.Parameter) -> None:
    """The reverse of `convert`."""
    embedding = isinstance(module, nn.Embedding)
    module._modules.pop("weight")
    module._buffers.pop("dtype_of", None)
    module._non_persistent_buffers_set.discard("dtype_of")
    module.__class__ = nn.Embedding if embedding else nn.Linear
    module.weight = weight
    Watched.changes += 1
