"""GPTNeoForCausalLM: arguments, outputs, losses and defaults of transformers 5.23 and 5.24."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import GPTNeoConfig, is_int, is_number
from ..engine import ManyMixin
from ..errors import InputError, short
from ..generation import GenerationConfig, GenerationMixin, TextMixin
from ..network import decoding, quantized, touch
from ..network.cache import KVCache
from ..network.decoding import Several
from ..network.fused import OURS
from ..network.inputs import check_labels, check_unknown, select_positions
from ..network.masks import Rows
from ..network.outputs import CausalLMOutputWithPast
from ..ops import backends, cpu, reference, vocabulary
from ..ops.constants import LOGITS_ALIGN
from ..ops.quantized import QuantizedWeight
from ..scoring import EmbeddingMixin, ScoringMixin
from .model import GPTNeoModel
from .pretrained import GPTNeoPreTrainedModel, returns_output

_ROWS = 256  # of logits that exist at one time where a head is somebody's own


class GPTNeoForCausalLM(GPTNeoPreTrainedModel, GenerationMixin, TextMixin, ManyMixin, ScoringMixin, EmbeddingMixin):
    """The language model, its head tied to the token embedding.

    Args:
        config: shapes and constants.
        backend: "auto", "triton" or "reference".
        early_launch: in steps of generation let each kernel start before the one before it has ended, and load weights
            while it waits (programmatic dependent launch; GPUs of capability 9.0 and up). None: in steps of one token of one
            text through untouched blocks, which it makes 7 to 19 % faster on an H200 (`benchmarks/results/gpu_h200.json`);
            more rows lose by it or win nothing. Tokens are the same. May be set on a model, too, before its first step.
    """

    accepts_loss_kwargs: ClassVar[bool] = True
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "transformer.wte.weight"}
    loss_type: ClassVar[str] = "ForCausalLM"  # by which Trainer counts the shifted labels

    def __init__(self, config: GPTNeoConfig, *, backend: str = "auto", early_launch: bool | None = None) -> None:
        super().__init__(config, backend=backend)
        config = self.config
        self.early_launch = early_launch
        self.transformer = GPTNeoModel(config, backend=backend)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.init_weights()
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
            input_ids: one text [T] gives logits [T, V], as transformers 4 did.
            logits_to_keep: how many of the last positions to give logits for, 0 for all; or positions: [n] for every
                row, [B, n] for each, or a boolean [B, T] (then the logits are [number of True, V]).
            num_items_in_batch: divide the summed loss by this instead of averaging it.
            unknown: shift_labels and ignore_index, see `loss_function`; others are refused.
        """
        loss_options = {name: unknown.pop(name) for name in ("shift_labels", "ignore_index") if name in unknown}
        check_unknown(unknown, type(self), position_ids)
        single = isinstance(input_ids, Tensor) and input_ids.dim() == 1
        out = self.transformer(
            input_ids.unsqueeze(0) if single and input_ids is not None else input_ids,
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
            V = logits.shape[-1]
            items = num_items_in_batch
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=V, num_items_in_batch=items, **loss_options)
        logits = logits.squeeze(0) if single else logits
        return CausalLMOutputWithPast(loss=loss, logits=logits, **out.beside("last_hidden_state"))

    def loss_function(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: int | Tensor | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **others: Any,
    ) -> Tensor:
        """Mean cross-entropy of labels [B, T], shifted inside, under logits [B, T, V]; `forward` calls what stands here.

        Args:
            num_items_in_batch: divide the summed loss by this instead.
            ignore_index: a label that is not to be learnt. shift_labels: [B, T], shifted already, in the place of labels.
        """
        if not is_int(ignore_index) or not -(2**63) <= ignore_index < 2**63:
            raise InputError(f"ignore_index {short(ignore_index)} is not an integer of 64 bits")
        if not (num_items_in_batch is None or hasattr(num_items_in_batch, "item") or is_number(num_items_in_batch)):
            raise InputError(f"num_items_in_batch {short(num_items_in_batch)} is not a number; leave it out for the mean")
        given = labels if shift_labels is None else shift_labels
        shifted = check_labels(given, logits.shape[:-1], vocab_size, ignore_index, logits.device)
        if shift_labels is None:
            shifted = F.pad(shifted, (0, 1), value=ignore_index)[..., 1:]
        how = "mean" if num_items_in_batch is None else "sum"
        loss = F.cross_entropy(logits.float().view(-1, vocab_size), shifted.flatten(), ignore_index=ignore_index, reduction=how)
        return loss if num_items_in_batch is None else loss / num_items_in_batch

    def _logits(self, hidden: Tensor) -> Tensor:
        """lm_head(hidden). Where the kernels compute, a row of the result takes V rounded up to a multiple of `LOGITS_ALIGN`,
        as in `step`: with an odd V the rows begin where the library can store one element at a time only.
        """
        head: Any = self.lm_head
        name = "reference" if torch.is_grad_enabled() or not touch.is_readable() else self.backend.name
        if name == "reference" or touch.observed(hidden.device) or not _is_plain_head(head):
            logits: Tensor = head(hidden)
            return logits
        if name == "cpu":
            return cpu.linear(hidden, head.weight)
        if isinstance(head.weight, QuantizedWeight):
            logits = head(hidden)
            return logits
        V = head.weight.shape[0]
        logits = hidden.new_empty(*hidden.shape[:-1], V + -V % LOGITS_ALIGN)
        vocabulary.logits(hidden.flatten(0, -2), head.weight, logits.view(-1, logits.shape[-1])[:, :V])
        return logits.narrow(-1, 0, V)

    def logprobs(
        self, ids: Tensor, mask: Tensor, wanted: Tensor, targets: Tensor, past: KVCache | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the model's distributions say of one token a column, see `reference.statistics`; nothing is checked.

        Args:
            ids: int64 [B, T]. mask: [B, T], 0 for padding on the right.
            wanted: boolean [B, T], columns that are asked for. targets: int64 [their number], what follows each, row by row.
            past: one row that all texts continue; not changed.
        """
        cache = None
        if past is not None:
            cache = past.fork()
            cache.batch_repeat_interleave(len(ids))
        look = self.look()
        if past is not None and look.forward and all(look.blocks):  # which see nothing of padding on the right, and stay fused
            shown = None
        else:
            shown = mask if past is None else torch.cat([mask.new_ones(len(ids), past.get_seq_length()), mask], 1)
        asked = {"input_ids": ids, "attention_mask": shown, "past_key_values": cache, "use_cache": cache is not None}
        if not look.forward:  # somebody's own: its logits count
            logits: Tensor = self(**asked, return_dict=True).logits
            return reference.statistics(logits[wanted], targets)
        hidden = self.transformer(**asked, return_dict=True).last_hidden_state[wanted]  # [N, C]
        head: Any = self.lm_head
        if _is_plain_head(head) and _goes_with(head, hidden.dtype) and not touch.observed(hidden.device):
            return cast(
                tuple[Tensor, Tensor, Tensor, Tensor], self.transformer.functions(ids).logprob(hidden, head.weight, targets)
            )
        parts = [reference.statistics(head(x), t) for x, t in zip(hidden.split(_ROWS), targets.split(_ROWS), strict=True)]
        own, rank, entropy, variance = (torch.cat(t) for t in zip(*parts, strict=True))
        return own, rank, entropy, variance

    def look(self) -> touch.Look:
        """Which parts are untouched now."""
        head: Any = self.lm_head
        trunk: Any = self.transformer
        own = isinstance(trunk, GPTNeoModel)  # and no wrapper of somebody's
        return replace(
            trunk.look() if own else touch.Look((), False, False),
            head=_is_plain_head(head) and _goes_with(head, self.dtype) and head.weight.shape[0] == self.config.vocab_size,
            forward=touch.own_forward(self, GPTNeoForCausalLM) and own and touch.own_forward(trunk, GPTNeoModel),
            prepare=all(touch.has_own(self, GPTNeoForCausalLM, name) for name in _LOOP),
        )

    def looked(self, anew: bool = False) -> touch.Look:
        """The last look, taken again where a module may have been touched since then, or `anew`."""
        now = touch.stamp(), self.config.attention_layers
        last = vars(self).get("_last_look")
        if anew or last is None or last[0] != now:
            last = vars(self)["_last_look"] = now, self.look()  # no attribute that counts as a touch
        return last[1]

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool = False,
        **others: Any,
    ) -> dict[str, Any]:
        """Keywords of `forward` for a step of `generate`, which calls an override of this one, and forward with what it gives.

        Args:
            input_ids: [B, T], all so far. next_sequence_length: how many of them are new; None for those that the cache,
                by the attention mask where there is one, does not hold.
            inputs_embeds: of the prompt, which the first step takes in place of ids.
            others: handed on; position_ids and token_type_ids of the new columns, or of all.
        """
        found = {"past_key_values": past_key_values, "attention_mask": attention_mask} | others
        found = {name: value for name, value in found.items() if value is not None}
        if inputs_embeds is not None and is_first_iteration:
            return {"input_ids": None, "inputs_embeds": inputs_embeds} | found
        T = input_ids.shape[1]
        new = next_sequence_length
        if new is None and past_key_values is not None:
            columns = attention_mask.shape[1] if attention_mask is not None and attention_mask.dim() == 2 else T
            new = columns - int(past_key_values.get_seq_length())
        new = T if new is None or not 0 < new < T else new
        for name in ("position_ids", "token_type_ids"):
            if name in found and found[name].shape[1] > new:
                found[name] = found[name][:, -new:]
        return {"input_ids": input_ids[:, T - new :]} | found

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], is_encoder_decoder: bool = False, num_new_tokens: int = 1
    ) -> dict[str, Any]:
        """The keywords of a loop of one's own over `prepare_inputs_for_generation`, for so many columns more: as in
        transformers, where such loops have the name from."""
        new = num_new_tokens
        found = dict(model_kwargs)
        if outputs.get("past_key_values") is not None:
            found["past_key_values"] = outputs["past_key_values"]
        if (mask := found.get("attention_mask")) is not None:
            found["attention_mask"] = torch.cat([mask, mask.new_ones(len(mask), new)], 1)
        if (types := found.get("token_type_ids")) is not None:
            found["token_type_ids"] = torch.cat([types, types[:, -1:].expand(-1, new)], 1)
        if (places := found.get("position_ids")) is not None:
            more = places[:, -1:] + torch.arange(1, new + 1, device=places.device)
            found["position_ids"] = torch.cat([places, more], 1)
        return found

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
        look, trunk, T = self.looked(), self.transformer, ids.shape[1]
        head: Any = self.lm_head
        fusing = look.norm and look.head and not touch.observed(ids.device)
        call = partial(trunk.run, ids, position_ids, token_type_ids, rows, cache, look=look)
        early = self.early_launch
        if early is None:  # not beside others' kernels: what these write to a weight may be read too early
            early = fusing and all(look.blocks) and backends.gains_by_early_launches(self.backend, ids)
        with backends.early_launches(self.backend) if early else nullcontext():
            return call(head=head, keep=keep) if fusing else wide(head(call().narrow(1, T - keep, keep)))

    def several(self, ids: Tensor, position_ids: Tensor, cache: KVCache, how: Several) -> Tensor | None:
        """Tokens [B, n] of several steps of generation in one call, fewer than `how.steps` or none where one is for torch to
        draw; None where that cannot be had.

        Args:
            ids: int64 [B, 1]. position_ids: [B or 1, 1]. cache: of the columns before; appended to.
        """
        trunk, rows, head = self.transformer, Rows(), cast(nn.Linear, self.lm_head)
        if not self.looked() or touch.observed(ids.device) or not touch.has_own(self, GPTNeoForCausalLM, "step"):
            return None
        if not decoding.takes(trunk.functions(ids), ids, cache, rows):
            return None
        return decoding.Few(trunk, cache, rows, OURS).several(head, ids, position_ids, how)


_LOOP = ("prepare_inputs_for_generation", "_update_model_kwargs_for_generation")  # of transformers' loop: an override counts
touch.ours(GPTNeoForCausalLM, methods=("forward", "step", *_LOOP))


def _is_plain_head(head: Any) -> bool:
    """Whether a head is a linear layer without bias that nobody touched."""
    return quantized.is_plain_linear(head) and head.bias is None


def _goes_with(head: Any, dtype: torch.dtype) -> bool:
    """Whether the ops take a plain head for hidden states of a dtype."""
    return isinstance(head.weight, QuantizedWeight) or head.weight.dtype is dtype


def wide(logits: Tensor) -> Tensor:
    """Logits in float32 or wider, in which tokens are drawn."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
