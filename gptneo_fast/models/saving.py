"""A model to a folder, and to transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import checkpoint
from ..errors import InputError, SetupError, UnknownOptionError, warn_once
from ..generation.config import GenerationConfig
from ..network import quantized
from ..ops import tiles
from . import quantizing


def save(
    model: Any,
    folder: Path,
    others: dict[str, Any],
    *,
    is_main_process: bool,
    state_dict: dict[str, Tensor] | None,
    max_shard_size: int | str,
) -> None:
    """As `save_pretrained`. others: keywords that mean something to transformers."""
    for name in ("push_to_hub", "variant"):
        if others.pop(name, None):
            raise UnknownOptionError(
                f"save_pretrained does not offer {name}; save to a folder, then huggingface_hub.upload_folder"
            )
    if not others.pop("safe_serialization", True):
        warn_once("safe_serialization=False would write a pickle: safetensors are written, as transformers does from 5 on")
    if unknown := others.keys() - {"token", "save_peft_format", "use_auth_token", "repo_id", "private"}:
        raise UnknownOptionError(f"save_pretrained has no option {sorted(unknown)[0]!r}")
    if not is_main_process:
        return
    if getattr(model, "_hf_peft_config_loaded", False):  # by `add_adapter`: the adapter is written, as transformers does
        _save_adapter(model, folder, state_dict)
        return
    tensors = dict(state_dict if state_dict is not None else model.state_dict())
    heads = [name for name in tensors if name.startswith("lm_head.weight")]  # or of that its integers and scales
    wte = [tensors.get(f"transformer.wte.{name.removeprefix('lm_head.')}") for name in heads]
    tied = model.config.tie_word_embeddings
    if tied and all(own is not None and _is_same(tensors[name], own) for name, own in zip(heads, wte, strict=True)):
        for name in heads:
            tensors.pop(name)
    config = model.config.replace(
        architectures=[type(model).__name__],
        dtype=str(model.dtype),
        tie_word_embeddings=tied and not any(name in tensors for name in heads),
    )
    how = quantized.format_of(model)
    vars(config).pop("quantization_config", None)
    if how is not None:
        for name, module in quantized.places(model):
            if name not in quantized.weights(model):
                raise InputError(
                    f"{name} is a {type(module).__name__} among layers in {how}: such a mixture would not load again"
                )
        config.quantization_config = quantizing.described(how)
        for name in [name for name in tensors if name.endswith(".weight.values")]:
            scales = name.removesuffix("values") + "scales"
            if scales not in tensors:
                raise InputError(f"state_dict has {name}, but not {scales}, without which they mean nothing; give both")
            tensors[name], tensors[scales] = tiles.row_by_row(tensors[name], tensors[scales], how.dtypes[0])
    texts = {"config.json": config.to_json_string()}
    if (generation := getattr(model, "generation_config", None)) is not None:
        texts["generation_config.json"] = GenerationConfig.like(generation).file_text()
    checkpoint.save(tensors, folder, max_shard_size, texts)


def _save_adapter(model: Any, folder: Path, state_dict: dict[str, Tensor] | None) -> None:
    """The active adapter's files, which peft and transformers load."""
    from safetensors.torch import save_file

    names = model.active_adapters()
    if len(names) > 1:
        raise InputError(f"{len(names)} adapters are active; set_adapter(one of {', '.join(names)}), then save")
    weights = model.get_adapter_state_dict(state_dict=state_dict)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {f"base_model.model.{name}": weight.contiguous() for name, weight in weights.items()},
        folder / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    model.peft_config[names[0]].save_pretrained(folder)


def as_transformers(model: Any) -> Any:
    """As `to_transformers`."""
    try:
        import transformers
    except ImportError as error:
        raise SetupError(f"to_transformers needs transformers ({error}); pip install transformers") from error
    if not type(model).__module__.startswith(f"{__package__}."):
        raise InputError(f"to_transformers knows our five classes and no {type(model).__name__}; save its weights instead")
    if how := quantized.format_of(model):
        raise InputError(f"the model is {how}, which transformers has no layers for; model.dequantize_() first")
    config = transformers.GPTNeoConfig.from_dict(model.config.to_dict())
    with torch.device("meta"):
        made = getattr(transformers, type(model).__name__)._from_config(config, attn_implementation="eager")
    weights = model.state_dict()
    if differing := sorted(weights.keys() ^ made.state_dict().keys()):
        raise InputError(
            f"to_transformers takes over weights, and {len(differing)} are of replaced layers ({differing[0]!r}, ...); merge "
            "adapters first, or wrap what it gives"
        )
    if any(vars(m)["_forward_hooks"] or vars(m)["_forward_pre_hooks"] or "forward" in vars(m) for m in model.modules()):
        warn_once("to_transformers takes over weights; hooks and patched forwards stay with this model")
    made.load_state_dict(weights, assign=True)
    for block, own in zip(made.base_model.h, model.base_model.h, strict=True):
        block.attn.attention.bias = own.attn.attention.visible()  # the one thing besides weights that a block holds
    made.tie_weights()
    if made.can_generate() and (generation := getattr(model, "generation_config", None)) is not None:
        made.generation_config = transformers.GenerationConfig.from_dict(generation.to_dict())
    return made.train(model.training)


def _is_same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same numbers, which they do at once where they share memory."""
    return a.shape == b.shape and (a.data_ptr() == b.data_ptr() or torch.equal(a, b))
