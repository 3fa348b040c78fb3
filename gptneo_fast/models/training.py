"""What training asks of a model beside its forward pass: blocks computed again, inputs that pass gradients on, tags."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..errors import InputError, UnknownOptionError, short
from ..network.modules import GPTNeoBlock, checkpoints
from ..network.touch import Watched


class Training(Watched):
    """Gradient checkpointing and gradients of inputs, under the names of transformers."""

    model_tags: list[str] = []  # noqa: RUF012 (replaced, not changed)
    _require_grads_hook: Any = None
    base_model: Any

    @property
    def is_activation_checkpointing(self) -> bool:
        """Whether blocks are recomputed in the backward pass."""
        return any(block.recompute is not None for block in self.modules() if isinstance(block, GPTNeoBlock))

    is_gradient_checkpointing = is_activation_checkpointing

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, every_n_layers: int = 1, offload: bool = False
    ) -> None:
        """Recompute blocks in the backward pass instead of keeping their activations.

        Args:
            gradient_checkpointing_kwargs: of torch.utils.checkpoint.checkpoint; use_reentrant is False where it is not given.
            every_n_layers: recompute each n-th block, from the first on, and no other.
            offload: keep the inputs of those blocks in host memory.
        """
        given = gradient_checkpointing_kwargs or {}
        if unknown := given.keys() - {"use_reentrant", "preserve_rng_state", "context_fn", "determinism_check", "debug"}:
            raise UnknownOptionError(f"gradient_checkpointing_kwargs has no {sorted(unknown)[0]!r}; see torch.utils.checkpoint")
        if not isinstance(every_n_layers, int) or every_n_layers < 1:
            raise InputError(f"every_n_layers {short(every_n_layers)} is not a positive integer")
        blocks = [m for m in self.modules() if isinstance(m, GPTNeoBlock)]
        for i, block in enumerate(blocks):
            block.recompute = None if i % every_n_layers else checkpoints(offload, **given)
        if given.get("use_reentrant"):
            self.enable_input_require_grads()  # a reentrant block passes gradients on to an input that has some only

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, every_n_layers: int = 1, offload: bool = False
    ) -> None:
        """As gradient_checkpointing_enable."""
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs, every_n_layers, offload)

    def add_model_tags(self, tags: str | list[str]) -> None:
        """Labels for a model card, kept in `model_tags`."""
        new = [tags] if isinstance(tags, str) else tags
        self.model_tags = [*self.model_tags, *(tag for tag in new if tag not in self.model_tags)]

    def enable_input_require_grads(self) -> None:
        """Make the embeddings' output require gradients, so that they reach adapters over frozen weights."""
        if self._require_grads_hook is None:
            self._require_grads_hook = self.base_model.get_input_embeddings().register_forward_hook(_require_grads)

    def disable_input_require_grads(self) -> None:
        """Take that back."""
        if self._require_grads_hook is not None:
            self._require_grads_hook.remove()
        self._require_grads_hook = None

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations."""
        for module in self.modules():
            if isinstance(module, GPTNeoBlock):
                module.recompute = None
        self.disable_input_require_grads()

    def activation_checkpointing_disable(self) -> None:
        """As gradient_checkpointing_disable."""
        self.gradient_checkpointing_disable()


def _require_grads(module: nn.Module, args: Any, output: Tensor) -> None:
    """A hook that has gradients flow from here."""
    output.requires_grad_(True)
