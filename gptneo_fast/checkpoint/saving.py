"""Writing a checkpoint: safetensors, and the texts that belong to them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from ..config import is_int
from ..errors import CheckpointError, InputError, short
from ..files.atomic import appearing, write_into

_OURS = r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?"


def save(
    tensors: dict[str, Tensor], folder: Path, max_shard_size: int | str = "50GB", texts: dict[str, str] | None = None
) -> None:
    """Write safetensors into `folder`, in shards where they exceed `max_shard_size`; all files appear, or none.

    Safetensors of an earlier save that are no part of this one are removed, since a single file would win over new shards.

    Args:
        texts: other files of the checkpoint, name -> contents.

    Raises:
        InputError: no such size. CheckpointError: the folder cannot be written to, or the disk is full; what was there
            still is.
    """
    size: Any = max_shard_size
    good = (
        re.fullmatch(r"\d+(\.\d+)? *[KMGT]B", size.strip(), re.IGNORECASE)
        if isinstance(size, str)
        else is_int(size) and size > 0
    )
    if not good:
        raise InputError(f"max_shard_size {short(max_shard_size)} is no size; give bytes above 0, or a text such as '5GB'")
    from huggingface_hub import save_torch_state_dict
    from safetensors import SafetensorError

    with appearing(folder, CheckpointError, stale=_OURS) as part:
        whole = {k: t.detach().contiguous() for k, t in tensors.items()}
        try:
            save_torch_state_dict(whole, part, max_shard_size=max_shard_size, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(str(error)) from error
        write_into(part, texts or {})
