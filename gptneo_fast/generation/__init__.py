"""Text generation: options, the distribution of the next token, the strategies, and strings in and out."""

from .config import GenerationConfig
from .processors import LogitsProcessor, LogitsProcessorList
from .stopping import StoppingCriteria, StoppingCriteriaList
from .streamers import BaseStreamer, TextIteratorStreamer, TextStreamer
from .text import TextGenerationMixin

__all__ = [
    "BaseStreamer",
    "GenerationConfig",
    "LogitsProcessor",
    "LogitsProcessorList",
    "StoppingCriteria",
    "StoppingCriteriaList",
    "TextGenerationMixin",
    "TextIteratorStreamer",
    "TextStreamer",
]
