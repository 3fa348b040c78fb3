"""Callables from texts to texts or labels, as model cards call them: `pipeline("text-generation", model=...)` and the like."""

from .classification import TextClassificationPipeline
from .generation import TextGenerationPipeline
from .pipeline import pipeline

__all__ = ["TextClassificationPipeline", "TextGenerationPipeline", "pipeline"]
