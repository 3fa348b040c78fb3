"""The Triton interpreter, quicker: for tests, and for a dry run of what a GPU will run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


@contextmanager
def quick_calls() -> Iterator[None]:
    """Interpreted functions that call others, at a fraction of the cost, which is the greater part of a test's time.

    The interpreter redirects triton's language anew for every call within a kernel; once for each launch is enough.
    """
    patch_lang = interpreter._patch_lang
    done: set[tuple[int, ...]] = set()

    class Scope(interpreter._LangPatchScope):
        def restore(self) -> None:
            super().restore()
            done.clear()  # the launch is over

    def patch_once(fn: Any) -> Any:
        languages = tuple(sorted({id(m) for m in fn.__globals__.values() if m in (tl, tl.core)}))
        if languages in done:
            return interpreter._LangPatchScope()
        scope = Scope()
        scope._changes = patch_lang(fn)._changes
        done.add(languages)
        return scope

    interpreter._patch_lang = patch_once
    try:
        yield
    finally:
        interpreter._patch_lang = patch_lang
