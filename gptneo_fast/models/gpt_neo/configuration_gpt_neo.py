"""The class that `transformers.models.gpt_neo.configuration_gpt_neo` has."""

from ...config import GPTNeoConfig

__all__ = ["GPTNeoConfig"]
