"""What a checkpoint says of itself: the fields of its `config.json` and which values they may have."""

from .config import GPTNeoConfig as GPTNeoConfig
from .rules import (
    ACTIVATIONS as ACTIVATIONS,
    GELU_NEW as GELU_NEW,
    GENERATION as GENERATION,
    LIMITS as LIMITS,
    is_int as is_int,
    is_number as is_number,
)
