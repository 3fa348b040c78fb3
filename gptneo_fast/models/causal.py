"""GPTNeoForCausalLM: arguments, outputs, losses and defaults of transformers 5.23."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import GPTNeoConfig
from ..generation import GenerationConfig, GenerationMixin, TextMixin
from ..network.cache import KVCache
from ..network.inputs import check_labels, check_unknown, select_positions
from ..network.masks import Rows
from ..network.outputs import CausalLMOutputWithPast
from ..ops import backends
from ..ops.constants import LOGITS_ALIGN
from .model import GPTNeoModel
from .pretrained import GPTNeoPreTrainedModel, returns_output


class GPTNeoForCausalLM(GPTNeoPreTrainedModel, GenerationMixin, TextMixin):
    """The language model, its head tied to the token embedding.

    Args:
        config: shapes and constants.
        backend: "auto", "triton" or "reference".
        early_launch: in steps of generation let each kernel start before the one before it has ended, and load weights
            while it waits (programmatic dependent launch; GPUs of capability 9.0 and up). Off until a committed result
            shows it right and faster; may be set on a model, too, before its first step.
    """

    def __init__(self, config: GPTNeoConfig, *, backend: str = "auto", early_launch: bool = False) -> None:
        super().__init__(config, backend=backend)
        self.early_launch = early_launch
        self.transformer = GPTNeoModel(config, backend=backend)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._init_weights(self.lm_head)
        self.tie_weights()
        self.generation_config = GenerationConfig.from_model_config(config)

    @returns_output
    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        **unknown: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits, and with labels the loss; the other arguments are GPTNeoModel's.

        Args:
            labels: integer [B, T], shifted inside: position i is compared with label i + 1. -100 is ignored.
            logits_to_keep: how many of the last positions to give logits for, 0 for all; or positions: [n] for every
                row, [B, n] for each, or a boolean [B, T] (then the logits are [number of True, V]).
            num_items_in_batch: divide the summed loss by this instead of averaging it.
        """
        check_unknown(unknown, type(self))
        out = self.transformer(
            input_ids=input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        logits = self._logits(select_positions(out.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            labels = check_labels(labels.to(logits.device), self.config.vocab_size)
            shifted = F.pad(labels, (0, 1), value=-100)[..., 1:].flatten()
            loss = F.cross_entropy(
                logits.float().view(-1, logits.shape[-1]),
                shifted,
                ignore_index=-100,
                reduction="mean" if num_items_in_batch is None else "sum",
            )
            loss = loss if num_items_in_batch is None else loss / num_items_in_batch
        return CausalLMOutputWithPast(loss=loss, logits=logits, **out.beside("last_hidden_state"))

    def _logits(self, hidden: Tensor) -> Tensor:
        """lm_head(hidden). Where the kernels compute, a row of the result takes V rounded up to a multiple of `LOGITS_ALIGN`,
        as in `step`: with an odd V the rows begin where the library can store one element at a time only.
        """
        head = self.lm_head
        kernels = not torch.is_grad_enabled() and self.backend.name == "triton"
        traced = torch.compiler.is_compiling() or torch.is_autocast_enabled(hidden.device.type)
        if not kernels or traced or not _untouched(head):
            return head(hidden)
        V = head.weight.shape[0]
        logits = hidden.new_empty(*hidden.shape[:-1], V + -V % LOGITS_ALIGN)
        torch.mm(hidden.flatten(0, -2), head.weight.t(), out=logits.view(-1, logits.shape[-1])[:, :V])  # [M, C] x [C, V]
        return logits.narrow(-1, 0, V)

    def step(
        self,
        ids: Tensor,
        position_ids: Tensor,
        token_type_ids: Tensor | None,
        cache: KVCache,
        keep: int = 1,
        rows: Rows = Rows(),  # noqa: B008 (frozen)
    ) -> Tensor:
        """Logits [B, keep, V], float32 or wider, of the last columns of a step of generation; nothing is checked.

        Args:
            ids: int64 [B, T]. position_ids: [B or 1, T]. token_type_ids: [B, T] or None.
            cache: of the columns before; appended to.
            rows: which columns are tokens.
        """
        trunk, norm, T = self.transformer, self.transformer.ln_f, ids.shape[1]
        with backends.early_launches(self.backend) if self.early_launch else nullcontext():
            x = trunk.run(ids, position_ids, token_type_ids, rows, cache, final_norm=False).narrow(1, T - keep, keep)
            return trunk.functions(x).lm_head(x, norm.weight, norm.bias, self.lm_head.weight, norm.eps)


def _untouched(head: nn.Module) -> bool:
    """Whether a head is a plain linear layer without bias that nobody hooked into or replaced a part of."""
    if (
        type(head) is not nn.Linear
        or type(head.weight) is not nn.Parameter
        or head._parameters["bias"] is not None
        or "forward" in vars(head)
    ):
        return False
    return not (head._forward_hooks or head._forward_pre_hooks or nn.modules.module._has_any_global_hook())
