"""GPTNeoModel, the trunk that all five classes share.

h = wte[ids] + wpe[positions]
per block:  h = h + out_proj(attention(ln_1(h)));  h = h + c_proj(gelu_new(c_fc(ln_2(h))))
h = ln_f(h)
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..config import GPTNeoConfig
from ..errors import ConfigError, warn_once
from ..network import touch, trunk
from ..network.cache import KVCache
from ..network.inputs import check_cache, check_inputs, check_unknown
from ..network.masks import Rows, rows_of
from ..network.modules import GPTNeoBlock, parameters
from ..network.outputs import BaseModelOutputWithPast, Trace
from ..ops import backends
from ..scoring import EmbeddingMixin
from .pretrained import GPTNeoPreTrainedModel, returns_output


class GPTNeoModel(GPTNeoPreTrainedModel, EmbeddingMixin):
    """The trunk: token ids to hidden states.

    Args:
        config: shapes and constants.
        backend: "auto", "triton" or "reference"; what it comes to depends on device, dtype and gradients.
    """

    def __init__(self, config: GPTNeoConfig, *, backend: str = "auto") -> None:
        super().__init__(config, backend=backend)
        config = self.config
        self.embed_dim = config.hidden_size
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.wpe = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.drop = nn.Dropout(config.embed_dropout)
        self.h = nn.ModuleList(GPTNeoBlock(config, layer) for layer in range(config.num_layers))
        self.ln_f = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.requested_backend = backend
        self._layers = config.attention_layers, config.window_size  # what the blocks are known to agree with
        self.init_weights()
        if vars(config).pop("gradient_checkpointing", False):  # of config.json files of old, which say it once
            self.gradient_checkpointing_enable()

    @returns_output
    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **unknown: Any,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """Hidden states of T new tokens.

        Args:
            input_ids: integer [B, T] (or [T]), from 0 to V - 1; or give inputs_embeds.
            past_key_values: what an earlier call returned; it is appended to.
            attention_mask: [B, past + T], zero for padding; or [B, 1, T, past + T], boolean or additive. None: no padding.
                Ranges (left and right padding) run on the fast path, holes and 4-D masks on the reference path.
            token_type_ids: integer [B, T]; they index the token embedding.
            position_ids: integer [B or 1, T]; None counts columns from the past length on, whatever the mask says. With no
                mask and no cache, a position that is not one more than that before it begins another text, which sees
                nothing of those before it in its row.
            inputs_embeds: [B, T, C] instead of input_ids.
            use_cache: return a KVCache; None takes the configuration's.
            output_attentions: return the weights [B, H, T, past + T] of each layer; runs on the reference path.
            output_hidden_states: return L + 1 states [B, T, C], the last one after ln_f.
            return_dict: False for a tuple.

        Raises:
            InputError: a shape, dtype, device or value out of range; more than max_position_embeddings positions.
            CacheError: a cache of another batch size or one that cannot be continued.
        """
        check_unknown(unknown, type(self), position_ids)
        past_key_values = check_cache(past_key_values, self, inputs_embeds if input_ids is None else input_ids)
        x, places, token_type_ids = check_inputs(
            self.config, self.device, input_ids, inputs_embeds, position_ids, token_type_ids, past_key_values, self.wte
        )
        B, T = x.shape[:2]
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if self.gradient_checkpointing and self.training and (use_cache or past_key_values is not None):
            warn_once("use_cache=True does not go with gradient checkpointing; no cache is kept")
            use_cache, past_key_values = False, None
        cache = past_key_values
        if use_cache and cache is None:
            cache = self.new_cache(B)
        trace = Trace(
            [] if (self.config.output_hidden_states if output_hidden_states is None else output_hidden_states) else None,
            [] if (self.config.output_attentions if output_attentions is None else output_attentions) else None,
        )
        rows = rows_of(attention_mask, B, T, cache, None if position_ids is None else places)
        hidden = self.run(x, places, token_type_ids, rows, cache, trace)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=cache,
            hidden_states=None if trace.hidden_states is None else tuple(trace.hidden_states),
            attentions=None if trace.attentions is None else tuple(trace.attentions),  # type: ignore[arg-type]
        )

    def run(
        self,
        x: Tensor,
        position_ids: Tensor,
        token_type_ids: Tensor | None = None,
        rows: Rows = Rows(),  # noqa: B008 (frozen)
        cache: Any = None,
        trace: Trace | None = None,
        look: touch.Look | None = None,
        head: nn.Linear | None = None,
        keep: int = 1,
    ) -> Tensor:
        """What `forward` computes of checked arguments: hidden states [B, T, C] after ln_f, or logits.

        Args:
            x: ids [B, T] int64, or embeddings [B, T, C].
            position_ids: [B or 1, T] int64. token_type_ids: [B, T] int64 or None.
            rows: which columns are tokens.
            cache: read, appended to and advanced by T columns: a KVCache, or what else has its `update`.
            trace: filled with what it has lists for.
            look: which modules are untouched; None to look now.
            head, keep: for logits, see `trunk.run`.
        """
        return trunk.run(
            self,
            x,
            position_ids,
            token_type_ids,
            op=self.functions(x),
            look=look or self.look(),
            rows=rows,
            cache=cache,
            trace=trace,
            head=head,
            keep=keep,
        )

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether any block is computed again in the backward pass; may be set."""
        return any(getattr(block, "recompute", None) is not None for block in self.h)

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on: bool) -> None:
        self.gradient_checkpointing_enable() if on else self.gradient_checkpointing_disable()

    def look(self) -> touch.Look:
        """Which parts are untouched now.

        Raises:
            ConfigError: the configuration was set to layers of another kind than those that were built.
        """
        if (self.config.attention_layers, self.config.window_size) != self._layers:
            self._check_layers(self.config.attention_layers)
        return trunk.anew(self)

    def _check_layers(self, layers: tuple[str, ...]) -> None:
        built = [getattr(getattr(getattr(block, "attn", None), "attention", None), "window", None) for block in self.h]
        wrong = f"has {len(layers)} layers, and the model {len(built)} blocks" if len(layers) != len(built) else ""
        for i, window in enumerate(built[: len(layers)]):
            if not wrong and window not in (None, self.config.window(i)):  # None: a block of the user's own
                said, was = (f"local, of window {w}" if w else "global" for w in (self.config.window(i), window))
                wrong = f"says that layer {i} is {said}, and the block was built {was}"
        if wrong:
            raise ConfigError(
                f"config.attention_layers {wrong}; blocks stay as they were built: set it back, or build another model of "
                "config.replace(attention_layers=...)"
            )
        if not torch.compiler.is_compiling():
            vars(self)["_layers"] = layers, self.config.window_size  # no attribute that counts as a touch

    def new_cache(self, batch_size: int, max_length: int | None = None) -> KVCache:
        """An empty cache for this model: bounded where a layer's attention is known to look no further than its window."""
        return KVCache(
            self.config, batch_size, dtype=self.dtype, device=self.device, max_length=max_length, windows=self.windows()
        )

    def windows(self) -> tuple[int, ...]:
        """Columns that a query of each block sees; 0 for all."""
        return trunk.windows(self)

    def functions(self, x: Tensor) -> ModuleType:
        """The namespace that computes a call with these inputs."""
        p = next(parameters(self))
        grad = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in parameters(self)))
        return backends.choose(self.requested_backend, p.device, p.dtype, grad).functions


touch.ours(GPTNeoModel)
