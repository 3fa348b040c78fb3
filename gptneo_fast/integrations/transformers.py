"""A live GPT-Neo of transformers that computes with our ops and our cache, and stays the PreTrainedModel that it is.

model = transformers.AutoModelForCausalLM.from_pretrained(...)
accelerate(model)            # the same object, the same weights
model.generate(...)          # of transformers, over fused blocks and a cache bounded at the window
undo(model)
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import GELUTanh, NewGELUActivation
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.gpt_neo import modeling_gpt_neo as theirs

from ..config import GPTNeoConfig
from ..errors import CacheError, InputError
from ..network import fused, touch, trunk
from ..network.cache import KVCache
from ..network.inputs import check_inputs
from ..network.masks import rows_of
from ..network.outputs import Trace
from ..ops import backends

touch.ours(theirs.GPTNeoSelfAttention, methods=("forward", "_attn", "_split_heads", "_merge_heads"))
touch.ours(theirs.GPTNeoAttention, theirs.GPTNeoMLP, theirs.GPTNeoBlock, theirs.GPTNeoModel, NewGELUActivation, GELUTanh)


# The name of a cache among arguments and outputs: "past_key_values" until transformers 5.23, "cache" from 5.24 on
_CACHE = "cache" if "cache" in inspect.signature(theirs.GPTNeoModel.forward).parameters else "past_key_values"


def _window(block: Any) -> int:
    attention = block.attn.attention
    return int(attention.config.window_size) if attention.attention_type == "local" else 0


KINDS = fused.Kinds(
    theirs.GPTNeoBlock,
    theirs.GPTNeoAttention,
    theirs.GPTNeoSelfAttention,
    theirs.GPTNeoMLP,
    (NewGELUActivation, GELUTanh),
    _window,
)


def accelerate(model: nn.Module, backend: str = "auto") -> nn.Module:
    """Give a GPT-Neo of transformers, of any class, our blocks and cache for inference; it shares its weights.

    A block that was touched (a hook, an adapter, a replaced layer), training, gradients, `output_attentions`, masks with holes
    and caches of other kinds run transformers' own code.

    Args:
        model: changed in place: its trunk gets a `forward`, which `undo` takes away.
        backend: "auto", "triton" or "reference".

    Returns:
        The model.

    Raises:
        InputError: no GPT-Neo of transformers, or one whose trunk has a `forward` of its own already, which would be lost.
        ConfigError: one that we do not compute.
    """
    found = _trunk(undo(model))
    if not touch.has_own(found, theirs.GPTNeoModel, "forward"):
        raise InputError(
            f"the {type(found).__name__} has a forward of its own (a subclass's, a patch, a hook of accelerate), which would "
            "be lost; take it away first"
        )
    backends.check(backend)
    found.forward = _Accelerated(found, backend).forward
    return model


def undo(model: nn.Module) -> nn.Module:
    """Take `accelerate` back. A cache that it made can be continued."""
    own = vars(_trunk(model))
    if isinstance(getattr(own.get("forward"), "__self__", None), _Accelerated):  # and not a patch that came later
        del own["forward"]
    return model


def _trunk(model: nn.Module) -> Any:
    found = model if isinstance(model, theirs.GPTNeoModel) else getattr(model, "transformer", None)
    if not isinstance(found, theirs.GPTNeoModel):
        raise InputError(
            f"accelerate takes a GPT-Neo of transformers, not a {type(model).__name__}; models of gptneo_fast need no help"
        )
    return found


class _Accelerated:
    """The forward pass of a trunk of transformers."""

    def __init__(self, model: Any, backend: str) -> None:
        self.trunk, self.backend = model, backend
        self.config = GPTNeoConfig.from_dict(model.config.to_dict())
        # Their window is a buffer that may be changed in place; it has the version that it was made with.
        self.masks = [block.attn.attention.bias for block in model.h]
        self.versions = [mask._version for mask in self.masks]

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Any = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> Any:
        """As GPTNeoModel.forward of transformers; `cache` is another name of past_key_values."""
        past_key_values = cache if past_key_values is None else past_key_values
        model, config = self.trunk, self.trunk.config
        given = input_ids if input_ids is not None else inputs_embeds
        look = self._look()
        if (
            given is None
            or model.training
            or _or(output_attentions, config.output_attentions)
            or not isinstance(attention_mask, Tensor | None)
            or not (past_key_values is None or isinstance(past_key_values, BoundedCache) or _is_fresh(past_key_values))
            or (torch.is_grad_enabled() and any(p.requires_grad for p in model.parameters()))
            or touch.observed(given.device)
            or not any(look.blocks)
        ):
            return type(model).forward(
                model,
                input_ids=input_ids,
                attention_mask=attention_mask,
                token_type_ids=token_type_ids,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                output_attentions=output_attentions,
                output_hidden_states=output_hidden_states,
                return_dict=return_dict,
                **{_CACHE: past_key_values},
                **kwargs,
            )
        first = next(model.parameters())
        past = past_key_values if isinstance(past_key_values, BoundedCache) else None
        if past is None and _or(use_cache, config.use_cache):
            past = BoundedCache(self._new_cache(len(given)))
        kv = None if past is None else past.kv
        if kv is not None and kv.windows != trunk.windows(model, KINDS):
            raise CacheError("past_key_values was made for other attention than the blocks have now; start a new cache")
        x, places, token_type_ids = check_inputs(
            self.config, first.device, input_ids, inputs_embeds, position_ids, token_type_ids, kv, model.wte
        )
        trace = Trace([] if _or(output_hidden_states, config.output_hidden_states) else None)
        hidden = trunk.run(
            model,
            x,
            places,
            token_type_ids,
            op=backends.choose(self.backend, first.device, first.dtype, x.requires_grad and torch.is_grad_enabled()).functions,
            look=look,
            rows=rows_of(attention_mask, x.shape[0], x.shape[1], kv, None if position_ids is None else places),
            cache=kv,
            trace=trace,
            kinds=KINDS,
        )
        out = BaseModelOutputWithPast(
            last_hidden_state=hidden,
            hidden_states=None if trace.hidden_states is None else tuple(trace.hidden_states),
            **{_CACHE: past},
        )
        return out if _or(return_dict, config.return_dict) else out.to_tuple()

    def _look(self) -> touch.Look:
        found = trunk.anew(self.trunk, KINDS)
        blocks = list(found.blocks)
        for i, block in enumerate(self.trunk.h):
            if blocks[i]:
                bias = block.attn.attention.bias
                known = i < len(self.masks) and bias is self.masks[i] and bias._version == self.versions[i]
                blocks[i] = known or any(bias is m and m._version == v for m, v in zip(self.masks, self.versions, strict=True))
        return touch.Look(tuple(blocks), found.embeddings, found.norm)

    def _new_cache(self, rows: int) -> KVCache:
        first = next(self.trunk.parameters())
        return KVCache(self.config, rows, dtype=first.dtype, device=first.device, windows=trunk.windows(self.trunk, KINDS))


class BoundedCache(Cache):
    """A KVCache as transformers knows caches: local layers keep their window, and its own blocks can go on with it."""

    def __init__(self, kv: KVCache) -> None:
        super().__init__(layers=[])
        self.kv = kv

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """As KVCache.update."""
        return self.kv.update(key_states, value_states, layer_idx)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen."""
        return self.kv.get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """(columns that a mask has, 0): `update` gives all, zeros where a ring dropped them."""
        return self.kv.get_seq_length(layer_idx) + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """The model's positions."""
        return self.kv.config.max_position_embeddings

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep these rows in this order."""
        self.kv.reorder_cache(beam_idx)

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row so many times."""
        rows = torch.arange(self.kv.batch_size, device=self.kv.lengths.device)
        self.kv.reorder_cache(rows.repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -tokens_to_remove columns; a positive number is a length, as in older releases.

        Raises:
            CacheError: the rings no longer hold what would be needed.
        """
        if tokens_to_remove:
            self.kv.crop(tokens_to_remove)

    def reset(self) -> None:
        """Forget everything."""
        self.kv.reset()

    @property
    def batch_size(self) -> int:
        """Rows."""
        return self.kv.batch_size

    max_batch_size = batch_size

    @property
    def is_initialized(self) -> bool:
        """Always."""
        return True

    @property
    def is_croppable(self) -> bool:
        """Within the slack of the rings."""
        return True

    @property
    def is_sliding(self) -> list[bool]:
        """None for transformers: masks cover every column."""
        return [False] * len(self.kv)

    def __len__(self) -> int:
        return len(self.kv)

    def __iter__(self) -> Any:
        return iter(self.kv)

    def __getitem__(self, layer_idx: int) -> Any:
        return self.kv[layer_idx]

    def __repr__(self) -> str:
        return f"BoundedCache({self.kv!r})"


def _is_fresh(cache: Any) -> bool:
    """Whether a cache is what transformers begins with, and holds nothing."""
    return type(cache) is DynamicCache and cache.get_seq_length() == 0


def _or(value: bool | None, otherwise: bool) -> bool:
    return otherwise if value is None else value
