"""Locks that a process may fork between: a child would wait for ever for one that another thread of its parent had."""

from __future__ import annotations

import os
import threading
import weakref

_alive: weakref.WeakSet[threading.Lock] = weakref.WeakSet()
_forking = threading.Lock()  # one fork at a time
_held: list[threading.Lock] = []


def new_lock() -> threading.Lock:
    """A lock that a fork waits for, and that is free in the child."""
    lock = threading.Lock()
    with _forking:
        _alive.add(lock)
    return lock


def _acquire_all() -> None:
    _forking.acquire()
    for lock in _alive:
        lock.acquire()
        _held.append(lock)


def _release_all() -> None:
    for lock in _held:
        lock.release()
    _held.clear()
    _forking.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_acquire_all, after_in_parent=_release_all, after_in_child=_release_all)
