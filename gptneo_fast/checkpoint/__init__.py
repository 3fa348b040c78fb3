"""A hub name or folder to tensors in a model, and back. Nothing else knows a file format or a foreign tensor name."""

from .assign import LoadReport, load_into
from .files import WeightFiles, find
from .saving import save

__all__ = ["LoadReport", "WeightFiles", "find", "load_into", "save"]
