"""Callables from texts to texts or labels, as model cards call them: `pipeline("text-generation", model=...)` and the like."""

from .classification import TextClassificationPipeline
from .features import FeatureExtractionPipeline
from .generation import TextGenerationPipeline
from .pipeline import pipeline
from .questions import QuestionAnsweringPipeline

__all__ = [
    "FeatureExtractionPipeline",
    "QuestionAnsweringPipeline",
    "TextClassificationPipeline",
    "TextGenerationPipeline",
    "pipeline",
]
