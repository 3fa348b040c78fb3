"""Everything is declared in pyproject.toml; this file will build the CUDA C++ extension once `csrc/` exists."""

from setuptools import setup

setup()
