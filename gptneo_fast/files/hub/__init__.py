"""A model's folder or its repository on the hub, behind one question: where is this file on the local disk?"""

from .source import Source

__all__ = ["Source"]
