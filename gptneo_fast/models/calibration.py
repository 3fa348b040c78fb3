"""Rounding that makes up for itself: GPTQ (Frantar et al. 2023, algorithm 1).

What rounding one column of a weight adds to a layer's output is taken back by the columns that are not rounded yet, as well as
the inputs that the layer had on some texts allow. Blocks go one after the other, each on what the rounded ones before it give.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..network import quantized
from ..ops.quantized import Format, QuantizedWeight, best_scales, grouped, pack, rounded
from ..scoring.batches import ids_of, texts_of

_DAMPED = 0.01  # of the mean of the diagonal, added to it
_COLUMNS = 128  # that are rounded before the others hear of it


def quantize_blocks(model: Any, how: Format, texts: Iterable[str | list[int] | Tensor]) -> None:
    """Put the linear layers of a model's blocks into few bits, in place.

    Raises:
        InputError: no texts, or one that is none.
    """
    trunk, config, training = model.base_model, model.config, model.training
    kept = {module for _, module in quantized.places(model)}
    pieces = []
    for text in texts_of(texts)[0]:
        ids = torch.as_tensor(ids_of(model.tokenizer, text, config.vocab_size, "calibrate"), device=model.device)
        pieces += [piece[None] for piece in ids.split(config.max_position_embeddings) if len(piece)]
    if not pieces:
        raise InputError("calibrate holds no texts; give strings or token ids, some thousand tokens in all")
    model.eval()
    floats: list[tuple[nn.Linear, Any]] = []  # weights of layers that are converted
    try:
        with torch.no_grad():
            states = [trunk.drop(trunk.wte(ids) + trunk.wpe(torch.arange(ids.shape[1], device=ids.device))) for ids in pieces]
            for block in trunk.h:
                products = {
                    layer: _Products(layer) for layer in block.modules() if layer in kept and isinstance(layer, nn.Linear)
                }
                try:
                    for x in states:
                        block(x)
                finally:
                    for seen in products.values():
                        seen.handle.remove()
                for layer, seen in products.items():
                    if not seen.sum.isfinite().all():
                        raise InputError(
                            f"calibrate: what a layer [{layer.out_features}, {layer.in_features}] gets is not finite; "
                            "calibrate in float32, or leave it out"
                        )
                    few = compensated(layer.weight, seen.sum, how)
                    floats.append((layer, layer.weight))
                    quantized.convert(layer, few)
                states = [block(x)[0] for x in states]
    except BaseException:  # nothing is half done
        for converted, weight in floats:
            quantized.revert(converted, weight)
        raise
    finally:
        model.train(training)


class _Products:
    """The sum of x x^T [K, K] over all inputs x that a layer gets."""

    def __init__(self, layer: nn.Linear) -> None:
        K = layer.in_features
        self.sum = torch.zeros(K, K, device=layer.weight.device)
        self.handle = layer.register_forward_pre_hook(self._see)

    def _see(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].flatten(0, -2).float()
        self.sum.addmm_(x.T, x)


def compensated(weight: Tensor, products: Tensor, how: Format) -> QuantizedWeight:
    """A weight [N, K] in few bits for inputs whose products [K, K] were added up."""
    N, K = weight.shape
    inverse = _inverse(products)  # [K, K], upper triangular
    w = weight.detach().float().clone()
    parts = partial(grouped, how=how)
    size = parts(w).shape[2]
    scales = best_scales(parts(w), how)
    integers = torch.zeros(N, scales.shape[1] * size, device=w.device)
    for first in range(0, K, _COLUMNS):
        last = min(K, first + _COLUMNS)
        errors = torch.zeros(N, last - first, device=w.device)
        for k in range(first, last):
            group = k // size
            if k % size == 0 and how.group is not None:  # for the numbers as they are now
                scales[:, group] = best_scales(parts(w[:, k : k + size])[:, :1], how)[:, 0]
            scale = scales[:, group : group + 1]
            integers[:, k] = rounded(w[:, k : k + 1, None], scale, how)[:, 0, 0]
            error = (w[:, k] - integers[:, k] * scale[:, 0].float()) / inverse[k, k]
            w[:, k:last] -= error[:, None] * inverse[k, k:last]
            errors[:, k - first] = error
        w[:, last:] -= errors @ inverse[first:last, last:]
    return QuantizedWeight(pack(integers.view(N, scales.shape[1], size), how), scales, K, how).arrange_()


def _inverse(products: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of `products`, damped as much as that needs."""
    diagonal = products.diagonal()
    diagonal[diagonal == 0] = 1  # of an input that is always zero nothing is known
    damp = _DAMPED * diagonal.mean()
    while True:
        factor, failed = torch.linalg.cholesky_ex(products + damp * torch.eye(len(products), device=products.device))
        if not failed:
            found: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True)
            return found
        damp = damp * 10
