"""Many requests at once: rows of one bounded cache that requests join and leave between steps."""

from .engine import Engine, ManyMixin
from .job import Job

__all__ = ["Engine", "Job", "ManyMixin"]
