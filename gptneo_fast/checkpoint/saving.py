"""Writing a checkpoint: safetensors, and the texts that belong to them."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from ..errors import CheckpointError
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
        CheckpointError: the folder cannot be written to, or the disk is full; what was there still is.
    """
    from huggingface_hub import save_torch_state_dict
    from safetensors import SafetensorError

    with appearing(folder, CheckpointError, stale=_OURS) as part:
        whole = {k: t.detach().contiguous() for k, t in tensors.items()}
        try:
            save_torch_state_dict(whole, part, max_shard_size=max_shard_size, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(str(error)) from error
        write_into(part, texts or {})
