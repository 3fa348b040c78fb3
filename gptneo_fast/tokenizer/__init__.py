"""GPT-2's tokenizer: text to ids and back, whole or one token at a time."""

from .gpt2 import BatchEncoding, GPT2Tokenizer
from .stream import StreamDecoder

__all__ = ["BatchEncoding", "GPT2Tokenizer", "StreamDecoder"]
