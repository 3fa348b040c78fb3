"""Weight files: which of them a source holds, opening them, and that shards and index agree."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError, InputError, UnsafeCheckpointError, UnsafePathError, short, warn_once
from ..files.hub import Source
from ..files.strict_json import read_object
from . import msgpack, pickled, safetensors
from .shapes import some
from .weight_file import Stored, WeightFile

SAFETENSORS, PICKLE, FLAX = "model.safetensors", "pytorch_model.bin", "flax_model.msgpack"
MAX_INDEX, MAX_KEYS, MAX_SHARDS = 8 << 20, 65536, 4096  # bytes; 256 layers have 3332 keys
_READERS: dict[str, Callable[[WeightFile], list[Stored]]] = {
    SAFETENSORS: safetensors.stored_in,
    PICKLE: pickled.stored_in,
    FLAX: msgpack.stored_in,
}


@dataclass(frozen=True)
class WeightFiles:
    """The weight files of one checkpoint: one file, or shards with the index that says which tensors each holds.

    kind: the name that a single file has, which says how all are read. weight_map: tensor -> file name, of an index.
    """

    paths: tuple[Path, ...]
    kind: str
    index: Path | None = None
    weight_map: dict[str, str] | None = None

    @contextmanager
    def open(self) -> Iterator[list[Stored]]:
        """Every tensor's place, all headers screened; files stay open until the end and may not have changed then.

        Raises:
            CheckpointError: a file that cannot be read, a name in two files, shards unlike their index.
            UnsafeCheckpointError: a pickle that would run code or claims more than it holds.
        """
        with ExitStack() as stack:
            files = []
            for path in self.paths:
                files.append(WeightFile(path))
                stack.callback(files[-1].close)
            tensors = [tensor for file in files for tensor in _READERS[self.kind](file)]
            self._check_names(tensors)
            yield tensors
            for file in files:
                file.check_unchanged()

    def _check_names(self, tensors: list[Stored]) -> None:
        seen: dict[str, Stored] = {}
        for tensor in tensors:
            if (other := seen.setdefault(tensor.name, tensor)) is not tensor:
                raise CheckpointError(
                    f"tensor {tensor.name[:200]!r} stands both in {other.file.path.name} and in {tensor.file.path.name}"
                )
        if self.weight_map is None:
            return
        for name, shard in self.weight_map.items():
            if name not in seen:
                raise CheckpointError(f"{self.index} says that {shard!r} holds tensor {name[:200]!r}; no shard does")
            if (holds := seen[name].file.path.name) != shard:
                raise CheckpointError(f"{self.index} says that {shard!r} holds tensor {name[:200]!r}; {holds!r} does")
        if extra := sorted(seen.keys() - self.weight_map.keys()):
            raise CheckpointError(
                f"{seen[extra[0]].file.path} holds tensor {extra[0][:200]!r}, which {self.index} does not list"
            )


def find(
    source: Source, use_safetensors: bool | None = None, allow_pickle: bool = True, from_flax: bool = False
) -> WeightFiles:
    """The weight files that a source holds: safetensors first, then pickles, then Flax's, each as one file or as shards.

    Args:
        source: folder or repository.
        use_safetensors: True for safetensors only, False for `pytorch_model.bin` only, None for any.
        allow_pickle: False refuses `pytorch_model.bin`.
        from_flax: `flax_model.msgpack` only.

    Raises:
        CheckpointError: none of the files is there; lists those looked for.
        UnsafeCheckpointError: only a `pytorch_model.bin` is there, and `allow_pickle` is False.
    """
    looked: list[str] = []
    if use_safetensors not in (True, False, None):
        raise InputError(f"use_safetensors is {short(use_safetensors)}; use True, False, or None for either kind of file")
    wanted = {True: (SAFETENSORS,), False: (PICKLE,), None: (SAFETENSORS, PICKLE, FLAX)}[use_safetensors]
    if from_flax and use_safetensors is not None:
        raise InputError(f"from_flax=True and use_safetensors={use_safetensors} ask for different files; leave one out")
    for kind in (FLAX,) if from_flax else wanted:
        looked += [kind, f"{kind}.index.json"]
        path = source.file(kind)
        found = path or source.file(f"{kind}.index.json")
        if found is None:
            continue
        if kind == PICKLE:  # refused even where msgpack stands beside it: what is loaded must not hang on this flag
            _about_pickle(source, allow_pickle)
        return WeightFiles((found,), kind) if path else _shards(source, found, kind)
    raise CheckpointError(f"{source.name!r} holds no weights; looked for {', '.join(looked)} ({source.holdings()})")


def _about_pickle(source: Source, allow_pickle: bool) -> None:
    convert = "model.save_pretrained(folder) writes safetensors"
    if not allow_pickle:
        raise UnsafeCheckpointError(f"{source.name!r} holds {PICKLE} only, and allow_pickle=False refuses it; {convert}")
    warn_once(f"{source.name!r} holds {PICKLE} only: its tensors are read and no code in it is run; {convert}")


def _shards(source: Source, index: Path, kind: str) -> WeightFiles:
    weight_map = read_object(index, CheckpointError, MAX_INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} is no index of shards: it needs a 'weight_map' from tensor to file")
    if len(weight_map) > MAX_KEYS:
        raise CheckpointError(f"{index} lists {len(weight_map)} tensors, of at most {MAX_KEYS}")
    if bad := [type(v).__name__ for v in weight_map.values() if not isinstance(v, str)]:
        raise CheckpointError(f"{index}: weight_map names a {bad[0]} as a shard; it maps tensor to file name")
    names = sorted(set(weight_map.values()))
    if len(names) > MAX_SHARDS:
        raise CheckpointError(f"{index} lists {len(names)} shards, of at most {MAX_SHARDS}")
    for name in names:
        check_name(name, index)
    paths = source.files(names)
    if absent := [name for name, path in paths.items() if path is None]:
        there = [name for name in names if name not in absent]
        raise CheckpointError(
            f"{some(absent)} named by {index} {'is' if len(absent) == 1 else 'are'} missing; present: {some(there) or 'none'}"
            + (f" ({source.holdings()})" if source.offline else "")
        )
    if kind == FLAX:  # its index has the tree's paths
        weight_map = {msgpack.torch_name(name): shard for name, shard in weight_map.items()}
    return WeightFiles(tuple(path for path in paths.values() if path), kind, index, weight_map)


def check_name(name: str, index: Path) -> None:
    """Refuse a shard's name that is not that of a file beside its index.

    Raises:
        UnsafePathError: a path, a name that no file system takes, or one with characters that are not printed.
    """
    plain = name == os.path.basename(name) and name not in ("", ".", "..") and "\\" not in name and name.isprintable()
    if not plain or len(name.encode("utf-8", "surrogatepass")) > 255:
        raise UnsafePathError(f"{index} names the shard {name[:80]!r}; a shard is a file beside its index")
