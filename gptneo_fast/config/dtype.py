"""The field `dtype` of a configuration: kept by its name, as config.json has it, and read as torch's."""

from __future__ import annotations

from typing import Any


class Dtype:
    """Gives the torch dtype of the name that a configuration keeps; torch is imported by the first who reads it."""

    def __get__(self, config: Any, owner: type | None = None) -> Any:
        name = None if config is None else vars(config).get("dtype")
        if not isinstance(name, str):
            return name
        import torch

        found = getattr(torch, name, None)
        return found if isinstance(found, torch.dtype) else name

    def __set__(self, config: Any, value: Any) -> None:
        vars(config)["dtype"] = name_of(value)


def name_of(dtype: Any) -> Any:
    """The name of a torch dtype; what is none as it is."""
    known = type(dtype).__name__ in ("dtype", "str")  # without an import of torch
    return str(dtype).removeprefix("torch.") if known else dtype
