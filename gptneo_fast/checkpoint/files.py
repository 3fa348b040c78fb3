"""Weight files: which of them a source holds, reading their tensors one by one, writing them."""

from __future__ import annotations

import os
import pickle
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError, UnsafeCheckpointError, UnsafePathError
from ..hub import Source
from ..jsonfile import read_object

SAFETENSORS, PICKLE = "model.safetensors", "pytorch_model.bin"


@dataclass(frozen=True)
class WeightFiles:
    """The weight files of one checkpoint: one file, or shards with the index that names the tensors of each."""

    paths: tuple[Path, ...]
    safetensors: bool

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor with the name its file gives it, on the CPU, one at a time.

        Raises:
            CheckpointError: a file that cannot be read, or a name in two files.
            UnsafeCheckpointError: a pickle that would run code.
        """
        seen: dict[str, Path] = {}
        for path in self.paths:
            for name, tensor in _read_safetensors(path) if self.safetensors else _read_pickle(path):
                if name in seen:
                    raise CheckpointError(f"tensor {name!r} stands both in {seen[name].name} and in {path.name}")
                seen[name] = path
                yield name, tensor


def find(source: Source, use_safetensors: bool | None = None) -> WeightFiles:
    """The weight files that a source holds: safetensors first, then pickles, each as one file or as shards.

    Args:
        source: folder or repository.
        use_safetensors: True for safetensors only, False for `pytorch_model.bin` only, None for either.

    Raises:
        CheckpointError: none of the files is there; lists those looked for.
    """
    looked: list[str] = []
    for name, safetensors in ((SAFETENSORS, True), (PICKLE, False)):
        if use_safetensors is not None and use_safetensors != safetensors:
            continue
        if path := source.file(name):
            return WeightFiles((path,), safetensors)
        if index := source.file(f"{name}.index.json"):
            return WeightFiles(_shards(source, index), safetensors)
        looked += [name, f"{name}.index.json"]
    raise CheckpointError(f"{source.name!r} holds no weights; looked for {', '.join(looked)}")


def _shards(source: Source, index: Path) -> tuple[Path, ...]:
    weight_map = read_object(index, CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} is no index of shards: it needs a 'weight_map' from tensor to file")
    names = sorted({str(name) for name in weight_map.values()})
    paths = []
    for name in names:
        if name != os.path.basename(name) or name in ("", ".", "..") or "\0" in name:
            raise UnsafePathError(f"{index} names the shard {name!r}; a shard is a file beside its index")
        path = source.file(name)
        if path is None:
            there = sorted(n for n in names if source.file(n))
            raise CheckpointError(f"shard {name!r} named by {index} is missing; present: {', '.join(there) or 'none'}")
        paths.append(path)
    return tuple(paths)


def _read_safetensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                yield name, file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size if path.exists() else 0
        raise CheckpointError(f"{path} ({size} bytes) is not a safetensors file: {error}; interrupted download?") from error


def _read_pickle(path: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise UnsafeCheckpointError(f"{path} holds more than tensors and was not loaded: {error}") from error
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        raise CheckpointError(f"{path} is not a checkpoint that torch.save wrote: {error}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, not a map from names to tensors")
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"{path}: entry {name!r} is a {type(tensor).__name__}, not a tensor")
        yield name, tensor


def save(tensors: dict[str, Tensor], folder: Path, max_shard_size: int | str = "50GB") -> None:
    """Write safetensors into `folder`, in shards where they exceed `max_shard_size`; files appear whole or not at all."""
    from huggingface_hub import save_torch_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as part:
        whole = {k: t.detach().contiguous() for k, t in tensors.items()}
        save_torch_state_dict(whole, part, max_shard_size=max_shard_size, metadata={"format": "pt"})
        for file in sorted(Path(part).iterdir()):
            os.replace(file, folder / file.name)
