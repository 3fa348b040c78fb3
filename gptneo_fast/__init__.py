"""GPT-Neo, exact past the window and near the limit of the chip.

    model = gptneo_fast.load("EleutherAI/gpt-neo-1.3B")
    print(model.generate_text("Once upon a time", max_new_tokens=50))

Public names stand in `__init__.pyi`. They are loaded when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

import ast
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

__version__ = "0.2.0"


def _homes() -> dict[str, str]:
    """The module of each public name, as the stub imports it."""
    stub = ast.parse(Path(__file__).with_name("__init__.pyi").read_text())
    imports = (node for node in stub.body if isinstance(node, ast.ImportFrom))
    return {alias.name: f".{node.module}" for node in imports for alias in node.names}


_HOME_OF = _homes()
__all__ = sorted(name for name, home in _HOME_OF.items() if "flax" not in home)  # no `import *` asks for jax


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        return _of_transformers(name)
    value = getattr(import_module(home, __name__), name)
    globals()[name] = value
    return value


def _of_transformers(name: str) -> Any:
    """What transformers has under a name that we have not, beside models: Trainer, collators, schedules, and what else a
    script imports from one place.

    Raises:
        AttributeError: nothing, or of another architecture; names what is near.
    """
    from .errors import nearest

    ours = name.startswith("_") or find_spec(f"{__name__}.{name}") is not None  # a room, which `from` imports next
    found = None
    if not ours and name != "GenerationMixin":  # which does not go with our models
        with suppress(Exception):  # not installed, or broken
            found = getattr(import_module("transformers"), name)
    if found is not None and not getattr(found, "__module__", "").startswith(
        ("transformers.models.", "transformers.utils.dummy_")
    ):
        return found
    raise AttributeError(f"module 'gptneo_fast' has no attribute {name!r}{nearest(name, list(_HOME_OF))}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF})
