"""Models of ours are PreTrainedModels to `isinstance` where transformers is imported.

Trainer, peft and evaluate ask for that type before they save a configuration, leave the head out of "all-linear" or make a
pipeline. The type is put behind `object` in the method resolution order, so that every name that we have, and every one of
torch's, is ours and torch's: of transformers' come those only that neither has.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_MODULE = "transformers.modeling_utils"


def make_kin(ours: type) -> None:
    """Make `ours` a subclass of transformers' PreTrainedModel: now, or once transformers is imported."""
    if (module := sys.modules.get(_MODULE)) is not None and hasattr(module, "PreTrainedModel"):
        _join(ours, module)
    else:
        sys.meta_path.insert(0, _Watch(ours))


def _join(ours: type, module: ModuleType) -> None:
    class Behind(type):
        def mro(cls) -> list[type]:
            return [cls, object, module.PreTrainedModel]

    class PreTrained(metaclass=Behind):
        """Has transformers' PreTrainedModel as its last base."""

    try:
        ours.__bases__ = (*ours.__bases__, PreTrained)
    except TypeError:  # a subclass of the user's has bases that allow no such order: it stays what it is
        return


class _Watch:
    """A finder that waits for one module and goes."""

    def __init__(self, ours: type) -> None:
        self.ours = ours

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        if name != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def then_join(module: ModuleType) -> None:
                execute(module)
                _join(self.ours, module)

            spec.loader.exec_module = then_join  # type: ignore[method-assign]
        return spec
