"""Writing a checkpoint: every file appears whole or not at all."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from ..errors import CheckpointError

_OURS = r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?"


def save(
    tensors: dict[str, Tensor], folder: Path, max_shard_size: int | str = "50GB", texts: dict[str, str] | None = None
) -> None:
    """Write safetensors into `folder`, in shards where they exceed `max_shard_size`.

    Files are written whole beside the folder's own and then renamed; safetensors of an earlier save that are no part of
    this one are removed, since a single file would win over new shards.

    Args:
        texts: other files of the checkpoint, name -> contents.

    Raises:
        CheckpointError: the folder cannot be written to, or the disk is full; what was there still is.
    """
    from huggingface_hub import save_torch_state_dict

    with appearing(folder, _OURS) as part:
        whole = {k: t.detach().contiguous() for k, t in tensors.items()}
        save_torch_state_dict(whole, part, max_shard_size=max_shard_size, metadata={"format": "pt"})
        for name, text in (texts or {}).items():
            (part / name).write_text(text, encoding="utf-8")


@contextmanager
def appearing(folder: Path, ours: str) -> Iterator[Path]:
    """A folder to write into, whose files move into `folder` at the end, or vanish where something fails.

    Args:
        ours: pattern of the names that a save of this kind gives; files of an earlier one are removed.

    Raises:
        CheckpointError: `folder` cannot be written to, or the disk is full; what was there still is.
    """
    from safetensors import SafetensorError

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as part:
            yield Path(part)
            new = sorted(p.name for p in Path(part).iterdir())
            for name in new:
                os.replace(Path(part) / name, folder / name)
        for old in folder.iterdir():
            if re.fullmatch(ours, old.name) and old.name not in new:
                old.unlink()
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write to {folder}: {error}; give another folder") from error
