"""The engine: generation whose steps, drawing of tokens included, run on the device without the host looking."""

from .mixin import EngineMixin, Generation

__all__ = ["EngineMixin", "Generation"]
