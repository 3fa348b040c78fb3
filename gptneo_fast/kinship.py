"""Classes of ours that are transformers' to `isinstance`, where transformers is imported.

Trainer, peft, evaluate and pipelines ask for PreTrainedModel and ModelOutput before they save a configuration, leave the head
out of "all-linear" or index an output. The type is put behind `object` in the method resolution order, so that every name that
we have, and every one of torch's, is ours and torch's: of transformers' come those only that neither has.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def make_kin(ours: type, module: str, *names: str) -> None:
    """Make `ours` a subclass of what a module of another library calls so: now, or once that module is imported."""
    if (found := sys.modules.get(module)) is None:
        sys.meta_path.insert(0, _Watch(ours, module, names))
        return
    if getattr(found.__spec__, "_initializing", False):  # by another thread, which is waited for
        found = import_module(module)
    _join(ours, found, names)


def _join(ours: type, module: ModuleType, names: Sequence[str]) -> None:
    theirs = [kind for name in names if (kind := getattr(module, name, None)) is not None]
    if len(theirs) < len(names):  # a version that has them no more
        return
    properties = {name: _Read(x) for kind in theirs for name, x in vars(kind).items() if hasattr(type(x), "__set__")}

    try:
        named = {name: x for name, x in properties.items() if not hasattr(ours, name)} | {"_theirs": theirs}
        ours.__bases__ = (Behind(names[0], (ours.__base__ or object,), named), *ours.__bases__)
    except TypeError:  # a subclass of the user's has bases that allow no such order: all stay what they are
        return


class Behind(type):
    """The kind of a class that has `_theirs` behind `object`."""

    def mro(cls) -> list[type]:
        order = super().mro()
        place = order.index(object) + 1
        theirs: list[type] = vars(cls)["_theirs"]
        return [*order[:place], *theirs, *(kind for kind in order[place:] if kind not in theirs)]


class _Read:
    """A property of theirs that gives way to an attribute that an object of ours has under its name."""

    def __init__(self, their_property: Any) -> None:
        self.property = their_property

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self.property.__get__(instance, owner)


class _Watch:
    """A finder that waits until one module is imported, and goes."""

    def __init__(self, ours: type, module: str, names: Sequence[str]) -> None:
        self.ours, self.module, self.names, self.asks = ours, module, names, False

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        if name != self.module or self.asks:
            return None
        self.asks = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.asks = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def then_join(module: ModuleType) -> None:
                execute(module)
                if self in sys.meta_path and module.__name__ == self.module:
                    sys.meta_path.remove(self)
                    _join(self.ours, module, self.names)

            spec.loader.exec_module = then_join  # type: ignore[method-assign]
        return spec
