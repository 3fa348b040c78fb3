"""JSON files that strangers wrote: read whole and strictly, or refused with the file's name."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

MAX_BYTES = 32 << 20  # ten times what GPT-2's tokenizer.json has; parsed, it takes a multiple of memory
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_MAX_DIGITS = 64  # transformers writes a model_max_length of 31


def read_object(path: Path, error: type[Exception], limit: int = MAX_BYTES) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        path: of the file.
        error: raised with the file's name and the fault in one line.
        limit: bytes that the file may have.

    Raises:
        error: not a file, not UTF-8, not JSON, nested too deep, no object; a number that is not finite or has more than
            64 digits; a key given twice; half a surrogate pair.
    """
    try:
        if not path.is_file():
            raise ValueError("it is no regular file")
        with path.open("rb") as file:
            if (size := os.fstat(file.fileno()).st_size) > limit:
                raise ValueError(f"it has {size} bytes, of at most {limit}")
            data = file.read(limit)
    except (ValueError, OSError) as fault:
        raise error(f"{path} is not JSON that can be read: {fault}") from fault
    return parse_object(data, str(path), error)


def parse_object(data: bytes, what: str, error: type[Exception]) -> dict[str, Any]:
    """The JSON object in some bytes, as strictly as `read_object`; errors call them `what`."""
    try:
        values = json.loads(
            data.decode("utf-8"), object_pairs_hook=_unique, parse_int=_integer, parse_float=_finite, parse_constant=_not_finite
        )
        if _SURROGATE.search(data):  # escaped, and fine in pairs only
            json.dumps(values, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as fault:
        raise error(f"{what} escapes half a character: {fault.object[fault.start]!r} stands alone") from fault
    except UnicodeDecodeError as fault:
        raise error(f"{what} is not UTF-8: {fault}") from fault
    except RecursionError as fault:
        raise error(f"{what} is not JSON that can be read: nested too deep") from fault
    except ValueError as fault:
        raise error(f"{what} is not JSON that can be read: {fault}") from fault
    if not isinstance(values, dict):
        raise error(f"{what} holds a {type(values).__name__}, not an object")
    return values


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        seen = set[str]()
        twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
        raise ValueError(f"key {twice[:200]!r} is given twice")
    return values


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"the number {digits[:12]}... has {len(digits)} digits")
    return int(digits)


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {digits[:20]} is not finite")
    return value


def _not_finite(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")
