"""Generation whose steps, drawing of tokens included, run on the device without the host looking."""

from .pool import Pool
from .strategy import captured, why_not

__all__ = ["Pool", "captured", "why_not"]
