"""`pipeline("question-answering")`: a question and a text to the piece of the text that answers it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ...config import is_int
from ...errors import InputError, short
from ..classifiers import GPTNeoForQuestionAnswering
from .inputs import Pipeline, items

_LENGTHS = {"max_answer_len": 15, "max_seq_len": 384, "doc_stride": 128, "top_k": 1}  # tokens; of transformers' pipeline


class QuestionAnsweringPipeline(Pipeline):
    """Questions to answers, as the pipeline of transformers 4 gave them; see `pipeline`."""

    task = "question-answering"
    serves = GPTNeoForQuestionAnswering

    def __call__(self, inputs: Any = None, **options: Any) -> Any:
        """{"score", "start", "end", "answer"}: characters start to end of the context, and the model's probability of them.

        Args:
            inputs: {"question": ..., "context": ...}, a list of such, or an iterator.
            options: question and context, texts or lists of them, in the place of inputs. top_k: so many answers, the best
                first; a list where it is more than 1. max_answer_len: tokens [15]. max_seq_len: tokens of question and text
                that the model sees together [384, at most its positions]; a longer text is cut in pieces that share
                doc_stride tokens [128]. handle_impossible_answer: an empty answer of probability 0 is among them, for GPT-Neo
                has no token that stands for none. align_to_words: answers are whole words [True].

        Raises:
            InputError: no question or no context, or an option out of range.
        """
        settings, _ = self._settings(options)
        given = settings.pop("question", None), settings.pop("context", None)
        asked = inputs if inputs is not None else _together(*given)
        numbers = {name: settings.pop(name, value) for name, value in _LENGTHS.items()}
        if wrong := [name for name, value in numbers.items() if not (is_int(value) and value > 0)]:
            raise InputError(f"{wrong[0]}={short(numbers[wrong[0]])} is not an integer from 1")
        empty, words = settings.pop("handle_impossible_answer", False), settings.pop("align_to_words", True)
        if settings:
            raise InputError(f"{next(iter(settings))} is no option of question-answering")
        single = isinstance(asked, Mapping)
        found = (self._answers(item, numbers, empty, words) for item in ([asked] if single else items("inputs", asked)))
        if isinstance(asked, Iterator):
            return found
        return next(found) if single else list(found)

    def _answers(self, item: Any, numbers: dict[str, int], empty: bool, words: bool) -> Any:
        if not isinstance(item, Mapping) or not all(isinstance(item.get(k), str) and item[k] for k in ("question", "context")):
            raise InputError(f"{short(item)} is no question with its context; give {{'question': ..., 'context': ...}}")
        context, top_k = item["context"], numbers["top_k"]
        found: dict[str, dict[str, Any]] = {}  # of one text the first place, with the sum of all probabilities
        for start, end, score in self._spans(item["question"], context, numbers, words):
            answer = {"score": 0.0, "start": start, "end": end, "answer": context[start:end]}
            found.setdefault(answer["answer"].lower(), answer)["score"] += score
        answers = list(found.values())
        if empty:
            answers.append({"score": 0.0, "start": 0, "end": 0, "answer": ""})
        best = sorted(answers, key=lambda answer: -answer["score"])[:top_k]
        return best[0] if len(best) == 1 else best

    @torch.no_grad()
    def _spans(self, question: str, context: str, numbers: dict[str, int], words: bool) -> Iterator[tuple[int, int, float]]:
        """(first character, end, probability) of the best answers in each piece of the context."""
        most, top_k = min(numbers["max_seq_len"], self.model.config.max_position_embeddings), numbers["top_k"]
        tokenizer = self._present_tokenizer()
        behind = tokenizer.padding_side == "right"  # the context; else before the question, as in transformers
        pieces = tokenizer(
            question if behind else context,
            context if behind else question,
            truncation="only_second" if behind else "only_first",
            max_length=most,
            stride=min(numbers["doc_stride"], most // 2),
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        for i, ids in enumerate(pieces["input_ids"]):
            out = self.model(torch.tensor([ids], device=self.model.device))
            own = torch.tensor([part == int(behind) for part in pieces.sequence_ids(i)])  # the context's tokens
            begin, end = (
                logits[0].float().cpu().masked_fill(~own, -10000.0).softmax(0) for logits in (out.start_logits, out.end_logits)
            )
            both = torch.outer(begin, end).triu().tril(numbers["max_answer_len"] - 1)
            score, place = both.flatten().topk(min(2 * top_k + 10 if words else top_k, both.numel()))
            for value, at in zip(score.tolist(), place.tolist(), strict=True):
                first, last = divmod(at, len(ids))
                if own[first] and own[last]:
                    yield *_characters(pieces, i, (first, last), words), value


def _characters(pieces: Any, row: int, tokens: tuple[int, int], words: bool) -> tuple[int, int]:
    """Where the first and the last token of an answer stand in the context."""
    begin, end = (pieces["offset_mapping"][row][token][i] for i, token in enumerate(tokens))
    places = [pieces.token_to_word(row, token) for token in tokens] if words else [None]
    if None in places:
        return int(begin), int(end)
    part = pieces.sequence_ids(row)[tokens[0]]
    spans = [pieces.word_to_chars(row, word, sequence_index=part) for word in places]
    return int(spans[0][0]), int(spans[1][1])


def _together(question: Any, context: Any) -> Any:
    if question is None or context is None:
        raise InputError("question-answering needs question=... and context=..., or a mapping of both")
    if isinstance(question, str) and isinstance(context, str):
        return {"question": question, "context": context}
    questions = [question] if isinstance(question, str) else list(question)
    contexts = [context] * len(questions) if isinstance(context, str) else list(context)
    if len(questions) != len(contexts):
        raise InputError(f"there are {len(questions)} questions and {len(contexts)} contexts; give as many, or one context")
    return [{"question": q, "context": c} for q, c in zip(questions, contexts, strict=True)]
