"""A hub name or folder to tensors in a model, and back. Nothing else knows a file format or a foreign tensor name."""

from .assign import LoadReport, dtype_of, load_into
from .files import WeightFiles, find
from .saving import save
from .weight_file import held

__all__ = ["LoadReport", "WeightFiles", "dtype_of", "find", "held", "load_into", "save"]
