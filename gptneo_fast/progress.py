"""A bar on standard error of how much is done, where that is wanted."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def shown(items: Iterable[T], unit: str, total: int | None = None, size: Callable[[T], int] = lambda item: 1) -> Iterator[T]:
    """The items with a bar. total: what their sizes come to, None where nobody knows."""
    from tqdm import tqdm

    with tqdm(total=total, unit=unit) as bar:
        for item in items:
            yield item
            bar.update(size(item))


def of_batches(batches: list[list[int]], unit: str, progress: bool | None) -> Iterable[list[int]]:
    """The batches, with a bar of what they hold; None for where there are several and standard error is a terminal."""
    wanted = len(batches) > 1 and sys.stderr.isatty() if progress is None else progress
    return shown(batches, unit, sum(map(len, batches)), len) if wanted else batches
