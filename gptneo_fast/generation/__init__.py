"""Text generation: settings, the distribution of the next token, the decoding loop, and strings in and out."""

from .config import GenerationConfig
from .mixin import GenerationMixin

__all__ = ["GenerationConfig", "GenerationMixin"]
