"""GPT-2's tokenizer: text to ids and back, whole or one token at a time."""

from .encoding import BatchEncoding
from .gpt2 import GPT2Tokenizer, GPT2TokenizerFast
from .stream import StreamDecoder

__all__ = ["BatchEncoding", "GPT2Tokenizer", "GPT2TokenizerFast", "StreamDecoder"]
