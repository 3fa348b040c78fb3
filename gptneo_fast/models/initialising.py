"""Fresh weights: what is initialised and when, and which parameters are one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import nn

from ..config import GPTNeoConfig
from ..errors import InputError
from ..network.activations import XIELU
from ..network.touch import Watched
from ..ops.quantized import QuantizedWeight

INITIALIZED = "_is_hf_initialized"  # in the `vars` of a module whose weights are set: transformers' name, which it asks for


class Initialising(Watched):
    """Initialisation and tying, under the names of transformers."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {}
    config: GPTNeoConfig
    base_model: Any
    get_output_embeddings: Any

    def post_init(self) -> None:
        """The end of an `__init__`: `init_weights`."""
        self.init_weights()

    def init_weights(self) -> None:
        """Initialise the modules that were not yet, nor loaded, and tie the head."""
        self.apply(self._init_once)
        self.tie_weights()

    def _init_once(self, module: nn.Module) -> None:
        if vars(module).get(INITIALIZED):
            return
        self._init_weights(module)
        if not any(p is not None and p.is_meta for p in module._parameters.values()):  # which are to get memory first
            vars(module)[INITIALIZED] = True  # not by an attribute's setting, which counts as a touch

    def _init_missing(self, names: Iterable[str]) -> None:
        """Initialise what a checkpoint had nothing for, by `_init_weights` of its module, whose other tensors stay."""
        fresh = set(names)
        for path in {name.rpartition(".")[0] for name in fresh}:
            module = self.get_submodule(path)
            held = {f"{path}.{own}" if path else own: t for own, t in (module._parameters | module._buffers).items()}
            loaded = [(t, t.detach().clone()) for name, t in held.items() if t is not None and name not in fresh]
            self._init_weights(module)
            with torch.no_grad():
                for tensor, value in loaded:
                    tensor.copy_(value)

    @property
    def all_tied_weights_keys(self) -> dict[str, str]:
        """Parameters that are tied -> those that they are tied to."""
        return dict(self._tied_weights_keys) if self.config.tie_word_embeddings else {}

    def tie_weights(self, **how: Any) -> None:
        """Make the head share the embedding's weight where the configuration ties them."""
        head = self.get_output_embeddings()
        weight = getattr(getattr(self.base_model, "wte", None), "weight", None)
        if head is not None and self.config.tie_word_embeddings and isinstance(weight, nn.Parameter | QuantizedWeight):
            head.weight = weight

    def _init_weights(self, module: nn.Module) -> None:
        """The initialisation of transformers: normal weights, zero biases, ones for norms."""
        if isinstance(weight := getattr(module, "weight", None), QuantizedWeight):
            raise InputError(f"weights in {weight.how} cannot be initialised afresh; build another model")
        if isinstance(module, (nn.Linear, nn.Embedding)) and not module.weight.is_meta:
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm | nn.PReLU | XIELU) and not any(p.is_meta for p in module.parameters()):
            module.reset_parameters()
