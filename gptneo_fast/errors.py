"""One family of errors: each names the thing, its value, the limit and the way out, and derives from the natural builtin."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable
from typing import Any


class GPTNeoFastError(Exception):
    """Base of every error that gptneo_fast raises on purpose; docs/errors.md has cause and way out of each."""


class ModelNotFoundError(GPTNeoFastError, FileNotFoundError):
    """A folder, a repository or one of its files is not there."""


class CheckpointError(GPTNeoFastError, ValueError, RuntimeError):
    """Weight files that cannot be read, or that do not fit the configuration: of which torch and transformers raise a
    RuntimeError."""


class UnsafeCheckpointError(CheckpointError):
    """A weight file that would run code, or that asks for more memory than it holds."""


class UnsafePathError(CheckpointError):
    """A file name that leaves its folder."""


class ConfigError(GPTNeoFastError, ValueError):
    """A configuration that describes no GPT-Neo."""


class TokenizerError(GPTNeoFastError, ValueError):
    """Tokenizer files that cannot be read."""


class NoTokenizerError(TokenizerError):
    """A checkpoint that has no tokenizer."""


class InputError(GPTNeoFastError, ValueError):
    """An argument of a call is out of range or of the wrong kind."""


class UnknownOptionError(GPTNeoFastError, TypeError):
    """A keyword that does not exist."""


class CacheError(GPTNeoFastError, ValueError):
    """A cache that does not fit the call, or that no longer holds what is asked of it."""


class NonFiniteLogitsError(GPTNeoFastError, ArithmeticError):
    """Logits of some rows were NaN or infinite.

    rows: which. columns: tokens that each of those had, prompt included. sequences: int64 [B, T], what was generated; the
    other rows are complete. texts: of `generate_text`, all of them in its order, the broken ones up to there. scores: of
    `score`, all of them.
    """

    def __init__(
        self,
        message: str,
        rows: list[int],
        sequences: Any,
        columns: list[int],
        texts: list[str] | None = None,
        scores: list[Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.rows, self.sequences, self.columns, self.texts, self.scores = rows, sequences, columns, texts, scores


class SetupError(GPTNeoFastError, RuntimeError):
    """Something that the request needs is missing on this machine or in this version."""


class MissingExtraError(SetupError, ImportError):
    """A library that an optional part of gptneo_fast needs is not installed."""


class DeviceError(SetupError):
    """A device that is absent or cannot do what is asked of it."""


class OutOfMemoryError(DeviceError, MemoryError):
    """A request that the device's memory cannot hold."""


class BusyError(GPTNeoFastError, TimeoutError):
    """A queue that has no place for a request within the time that its caller gave."""


class GPTNeoFastWarning(UserWarning):
    """Base of every warning that gptneo_fast gives."""


_warned: set[str] = set()


def warn_once(message: str) -> None:
    """Give a warning the first time that this process meets it."""
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, GPTNeoFastWarning, stacklevel=3)


def nearest(name: object, options: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the option nearest to `name`, or nothing where none is near."""
    near = difflib.get_close_matches(name, list(options), n=1, cutoff=0.6) if isinstance(name, str) else []
    return f"; did you mean {near[0]!r}?" if near else ""


def short(value: Any) -> str:
    """A value for an error, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no integer of more than 4300 digits
        what = f"an integer of {value.bit_length()} bits" if isinstance(value, int) else f"a {type(value).__name__}"
        text = f"{what}, too long to write"
    return text if len(text) <= 100 else f"{text[:100]}..."
