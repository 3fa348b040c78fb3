"""Classes of ours that are transformers' to `isinstance`, where transformers is imported.

Trainer, peft, evaluate and pipelines ask for PreTrainedModel and ModelOutput before they save a configuration, leave the head
out of "all-linear" or index an output. The type is put behind `object` in the method resolution order, so that every name that
we have, and every one of torch's, is ours and torch's: of transformers' come those only that neither has.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def make_kin(ours: type, module: str, name: str) -> None:
    """Make `ours` a subclass of what a module of another library calls `name`: now, or once that module is imported."""
    if (found := sys.modules.get(module)) is not None and hasattr(found, name):
        _join(ours, found, name)
    else:
        sys.meta_path.insert(0, _Watch(ours, module, name))


def _join(ours: type, module: ModuleType, name: str) -> None:
    class Behind(type):
        def mro(cls) -> list[type]:
            return [*super().mro(), getattr(module, name)]

    try:
        ours.__bases__ = (Behind(name, (ours.__base__ or object,), {}), *ours.__bases__)
    except TypeError:  # a subclass of the user's has bases that allow no such order: all stay what they are
        return


class _Watch:
    """A finder that waits for one module and goes."""

    def __init__(self, ours: type, module: str, name: str) -> None:
        self.ours, self.module, self.name = ours, module, name

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        if name != self.module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def then_join(module: ModuleType) -> None:
                execute(module)
                _join(self.ours, module, self.name)

            spec.loader.exec_module = then_join  # type: ignore[method-assign]
        return spec
