"""Lines of text, or of JSON, to scores of each: what `gptneo-fast score` does."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import GPTNeoFastError, InputError, short
from ..scoring import Score

_BEGINS = b'{"line": '  # each line of a result
_BLOCK = 256  # lines that are scored together, and written


def score_lines(
    model: Any, lines: Iterable[str], want: Sequence[str] = (), *, is_json: bool = False, first: int = 1
) -> Iterator[list[dict[str, Any]]]:
    """Of each line what the model says of it, in blocks that are done, in order.

    Args:
        model: a GPTNeoForCausalLM with a tokenizer.
        lines: texts; or with `is_json` each a JSON string, or an object with "text" and, where one is, "context".
        want: as of `model.score`: what is given of every token, beside the total.
        first: the number of the first line.

    Returns:
        Dictionaries of "line", "tokens" (how many have a score), "logprob" (their sum), and what was wanted under its name
        with an s; of a line that cannot be scored "line" and "error".
    """
    numbered = enumerate(lines, first)
    while block := list(itertools.islice(numbered, _BLOCK)):
        texts, found = dict[int, tuple[str, str | None]](), dict[int, dict[str, Any]]()
        for number, line in block:
            try:
                texts[number] = _text_of(line, is_json)
            except GPTNeoFastError as error:
                found[number] = {"error": str(error)}
        by_context: dict[str | None, list[int]] = {}
        for number, (_, context) in texts.items():
            by_context.setdefault(context, []).append(number)
        for context, numbers in by_context.items():
            found |= zip(numbers, _scored(model, [texts[n][0] for n in numbers], context, want), strict=True)
        yield [{"line": number} | found[number] for number, _ in block]


def lines_done(path: Path) -> int:
    """The number of the last line that a file of results has; 0 of none. What was cut off behind it is removed.

    Raises:
        InputError: it holds something else.
    """
    done, whole = 0, 0
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n") and _BEGINS.startswith(line[: len(_BEGINS)]):
                break  # cut off
            try:
                number = json.loads(line)["line"]
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(
                    f"{path} line {done + 1} is {short(line)} and no result of `score`; give another file"
                ) from error
            done, whole = number, whole + len(line)
    with path.open("r+b") as file:
        file.truncate(whole)
    return done


def _text_of(line: str, is_json: bool) -> tuple[str, str | None]:
    """(text, context or None) of a line."""
    line = line.rstrip("\r\n")
    if not is_json:
        return line, None
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{short(line)} is not JSON: {error}") from error
    text, context = (value.get("text"), value.get("context")) if isinstance(value, dict) else (value, None)
    if not isinstance(text, str) or not isinstance(context, str | None):
        raise InputError(f'{short(value)} is neither a string nor an object with a string under "text" (and "context")')
    return text, context


def _scored(model: Any, texts: list[str], context: str | None, want: Sequence[str]) -> list[dict[str, Any]]:
    try:
        scores: list[Score] = model.score(texts, context, list(want), progress=False)
    except GPTNeoFastError as error:
        if len(texts) == 1:
            return [{"error": str(error).replace("text 0", "the text")}]
        return [found for text in texts for found in _scored(model, [text], context, want)]
    return [
        {"tokens": len(score.tokens), "logprob": score.total} | {f"{name}s": getattr(score, name).tolist() for name in want}
        for score in scores
    ]
