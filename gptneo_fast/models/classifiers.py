"""The three classes that decide instead of generate: a label a sequence, a label a token, where an answer stands."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import GPTNeoConfig
from ..errors import InputError, warn_once
from ..network.cache import KVCache, kind
from ..network.inputs import check_labels, check_unknown
from ..network.outputs import QuestionAnsweringModelOutput, SequenceClassifierOutputWithPast, TokenClassifierOutput
from .model import GPTNeoModel
from .pretrained import GPTNeoPreTrainedModel, returns_output


class GPTNeoForSequenceClassification(GPTNeoPreTrainedModel):
    """One decision a sequence, read at its last token that is not padding."""

    def __init__(self, config: GPTNeoConfig, *, backend: str = "auto") -> None:
        super().__init__(config, backend=backend)
        config = self.config
        self.transformer = GPTNeoModel(config, backend=backend)
        self.num_labels = config.num_labels
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.init_weights()

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
        **unknown: Any,
    ) -> SequenceClassifierOutputWithPast | tuple[Any, ...]:
        """Logits [B, num_labels]; the other arguments are GPTNeoModel's.

        Args:
            labels: [B] integers (single label), [B, num_labels] floats (several), or [B] floats where num_labels is 1
                (regression); `config.problem_type` overrides the guess.

        Raises:
            InputError: more than one row and no `config.pad_token_id` to find their ends by.
        """
        check_unknown(unknown, type(self), position_ids)
        given = input_ids if input_ids is not None else inputs_embeds
        if isinstance(given, Tensor) and given.dim() > 1 and given.shape[0] != 1 and self.config.pad_token_id is None:
            raise InputError(
                f"{given.shape[0]} rows and no padding token: set model.config.pad_token_id "
                "(tokenizer.pad_token_id), or pass one row at a time"
            )
        out = self.transformer(
            input_ids,
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
        hidden = out.last_hidden_state  # [B, T, C]
        B, T = hidden.shape[:2]
        last: Tensor | int = T - 1
        if self.config.pad_token_id is not None and input_ids is not None:
            token = input_ids.view(B, T) != self.config.pad_token_id
            last = (torch.arange(T, device=hidden.device) * token).argmax(-1)  # the rightmost, whichever the side
        elif self.config.pad_token_id is not None:
            warn_once("padding cannot be told in inputs_embeds: the last position of each row is classified")
        logits = self.score(hidden)[torch.arange(B, device=hidden.device), last]
        loss = None if labels is None else self._loss(logits, labels)
        return SequenceClassifierOutputWithPast(loss=loss, logits=logits, **out.beside("last_hidden_state"))

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of the problem type, which is chosen by number of labels and label dtype and then kept."""
        if not isinstance(labels, Tensor):
            raise InputError(f"labels is {kind(labels)}; give a tensor")
        labels = labels.to(logits.device)
        if self.config.problem_type is None:
            if self.num_labels == 1:
                self.config.problem_type = "regression"
            elif labels.dtype in (torch.long, torch.int):
                self.config.problem_type = "single_label_classification"
            else:
                self.config.problem_type = "multi_label_classification"
        if self.config.problem_type == "regression":
            return F.mse_loss(logits.squeeze(), labels.squeeze()) if self.num_labels == 1 else F.mse_loss(logits, labels)
        if self.config.problem_type == "single_label_classification":
            return F.cross_entropy(
                logits.view(-1, self.num_labels), check_labels(labels, logits.shape[:1], self.num_labels).view(-1)
            )
        return F.binary_cross_entropy_with_logits(logits, labels)


class GPTNeoForTokenClassification(GPTNeoPreTrainedModel):
    """One decision a token."""

    def __init__(self, config: GPTNeoConfig, *, backend: str = "auto") -> None:
        super().__init__(config, backend=backend)
        config = self.config
        self.transformer = GPTNeoModel(config, backend=backend)
        self.num_labels = config.num_labels
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.init_weights()

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
        **unknown: Any,
    ) -> TokenClassifierOutput | tuple[Any, ...]:
        """Logits [B, T, num_labels], and with labels (integer [B, T], -100 ignored) the loss."""
        check_unknown(unknown, type(self), position_ids)
        out = self.transformer(
            input_ids,
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
        logits = self.classifier(self.dropout(out.last_hidden_state))
        loss = None
        if labels is not None:
            labels = check_labels(labels, logits.shape[:2], self.num_labels, device=logits.device)
            loss = F.cross_entropy(logits.view(-1, self.num_labels), labels.view(-1))
        return TokenClassifierOutput(loss=loss, logits=logits, **out.beside("last_hidden_state", "past_key_values"))


class GPTNeoForQuestionAnswering(GPTNeoPreTrainedModel):
    """Where an answer begins and ends in the text."""

    def __init__(self, config: GPTNeoConfig, *, backend: str = "auto") -> None:
        super().__init__(config, backend=backend)
        config = self.config
        self.transformer = GPTNeoModel(config, backend=backend)
        self.num_labels = config.num_labels  # for those who ask: an answer has two ends
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.init_weights()

    @returns_output
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        past_key_values: Any = None,
        **unknown: Any,
    ) -> QuestionAnsweringModelOutput | tuple[Any, ...]:
        """Start and end logits [B, T]; with both positions (integer [B], beyond the text ignored) the mean of both losses.

        Args:
            past_key_values: of the columns before, such as a learnt prefix; transformers' class takes none.
        """
        check_unknown(unknown, type(self), position_ids)
        out = self.transformer(
            input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=False,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        start, end = (t.contiguous() for t in self.qa_outputs(out.last_hidden_state).unbind(-1))  # [B, T]
        loss = None
        if start_positions is not None and end_positions is not None:
            T = start.shape[1]
            at_start, at_end = (p.to(start.device).view(-1).clamp(0, T) for p in (start_positions, end_positions))
            loss = (F.cross_entropy(start, at_start, ignore_index=T) + F.cross_entropy(end, at_end, ignore_index=T)) / 2
        return QuestionAnsweringModelOutput(
            loss=loss, start_logits=start, end_logits=end, **out.beside("last_hidden_state", "past_key_values")
        )
