"""`load`: a name to a model that is ready to use, on the device where it is fastest, with its tokenizer."""

from __future__ import annotations

import os
from typing import Any

import torch

from .classifiers import GPTNeoForQuestionAnswering, GPTNeoForSequenceClassification, GPTNeoForTokenClassification
from .device import as_device, as_dtype
from .errors import InputError, TokenizerError, nearest
from .heads import GPTNeoForCausalLM, GPTNeoModel
from .hub import Source
from .tokenizer import GPT2Tokenizer

TASKS: dict[str, Any] = {
    "causal-lm": GPTNeoForCausalLM,
    "sequence-classification": GPTNeoForSequenceClassification,
    "token-classification": GPTNeoForTokenClassification,
    "question-answering": GPTNeoForQuestionAnswering,
    "base": GPTNeoModel,
}


def load(
    name_or_path: str | os.PathLike[str],
    task: str = "causal-lm",
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    backend: str = "auto",
) -> Any:
    """A model in eval mode with `model.tokenizer` attached (None where the checkpoint has no tokenizer).

    Args:
        name_or_path: a folder, or a hub id such as "EleutherAI/gpt-neo-1.3B"; only the files needed are downloaded.
        task: "causal-lm", "sequence-classification", "token-classification", "question-answering" or "base".
        dtype: a floating-point dtype, its name, or "auto": bfloat16 on CUDA (float16 before capability 8.0), and
            elsewhere the checkpoint's own.
        device: None for CUDA where there is a device, else the CPU.
        revision: branch, tag or commit of the repository. token: of the hub. cache_dir: where downloads are kept.
        local_files_only: use the cache and no network.
        backend: "auto", "triton" or "reference".

    Raises:
        InputError, ModelNotFoundError, CheckpointError, ConfigError, DeviceError, SetupError: each says what to do.
    """
    if task not in TASKS:
        raise InputError(f"task {task!r} is unknown{nearest(task, TASKS)}; use one of {', '.join(TASKS)}")
    place = as_device("auto" if device is None else device)
    wanted = as_dtype(dtype)
    if wanted is None and place.type == "cuda":
        wanted = torch.bfloat16 if torch.cuda.get_device_capability(place) >= (8, 0) else torch.float16
    where: dict[str, Any] = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    model = TASKS[task].from_pretrained(
        name_or_path, dtype="auto" if wanted is None else wanted, device_map=place, backend=backend, **where
    )
    try:
        model.tokenizer = GPT2Tokenizer.from_pretrained(Source.of(name_or_path, **where))
    except TokenizerError as error:
        if "looked for" not in str(error):
            raise
    return model
