"""A hub name or folder to tensors in a model, and back. Nothing else knows a file format or a foreign tensor name."""

from .files import WeightFiles, find, save
from .fit import LoadReport, load_into

__all__ = ["LoadReport", "WeightFiles", "find", "load_into", "save"]
