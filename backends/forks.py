"""What a fork must not leave behind: locks that are held, and threads that are not there.

`os.fork` copies a process with the one thread that called it. A lock that another thread held at
that moment stays locked in the child for ever, and who waits for another thread waits in vain: a
model that is used in the child would hang.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import Any

_locks: weakref.WeakSet[Any] = weakref.WeakSet()
_awaited: weakref.WeakSet[Any] = weakref.WeakSet()
_threaded: weakref.WeakSet[Any] = weakref.WeakSet()


def lock() -> Any:
    """A `threading.RLock` that in a forked child is free, unless the forking thread holds it.

    What it guards must be valid whenever it is held: nobody in the child finishes what the
    thread that held it was about.
    """
    made = threading.RLock()
    _locks.add(made)
    return made


def awaited_lock() -> Any:
    """A `threading.RLock` that a fork waits for: no child begins in the middle of what it guards.

    For calls into libraries whose own locks would stay held in the child.
    """
    made = threading.RLock()
    _awaited.add(made)
    return made


def forgets(owner: Any) -> None:
    """While it lives, `owner.forget()` is called in forked children: its threads are not there."""
    _threaded.add(owner)


def _before_fork() -> None:
    for each in list(_awaited):
        each.acquire()


def _after_fork() -> None:
    for each in list(_awaited):
        each.release()


def _after_fork_in_child() -> None:
    _after_fork()
    for each in list(_locks):
        if not each._is_owned():
            each._at_fork_reinit()  # as the standard library does with its own
    for owner in list(_threaded):
        owner.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_after_fork,
        after_in_child=_after_fork_in_child,
    )
