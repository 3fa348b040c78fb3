"""One batch of texts: options, the distribution of the next token, the strategies, and strings in and out."""

from .config import GenerationConfig, GenerationMode
from .generate import GenerationMixin
from .processors import LogitsProcessor, LogitsProcessorList
from .request import Generation
from .stopping import StoppingCriteria, StoppingCriteriaList
from .streamers import BaseStreamer, TextIteratorStreamer, TextStreamer
from .text import TextMixin

__all__ = [
    "BaseStreamer",
    "Generation",
    "GenerationConfig",
    "GenerationMixin",
    "GenerationMode",
    "LogitsProcessor",
    "LogitsProcessorList",
    "StoppingCriteria",
    "StoppingCriteriaList",
    "TextIteratorStreamer",
    "TextMixin",
    "TextStreamer",
]
