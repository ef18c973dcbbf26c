"""Tests that time something or send signals, kept alone on the machine when several workers run.

With `pytest -n 2` each test holds a shared lock while it runs, and one of ALONE holds it for
itself once its fixtures are there: it waits for the other workers' tests to end, and they for it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Files, and single tests of others.
ALONE = frozenset({
    "test_ctrl_c", "test_executor", "test_forks", "test_help_is_cheap", "test_import_is_cheap",
    "test_many_real_signals", "test_real_signals", "test_speed", "test_team_group",
})  # fmt: skip


_files: list[Any] = []  # of the turn of this process


@contextmanager
def turn(folder: Path) -> Iterator[None]:
    """While a test runs, its fixtures and all. `folder` is the workers' own."""
    try:
        import fcntl  # noqa: F401
    except ImportError:  # Windows: tests may disturb each other there
        yield
        return
    with (folder / "door").open("a") as door, (folder / "room").open("a") as room:
        _files[:] = door, room
        _enter("LOCK_SH")
        try:
            yield
        finally:
            _files.clear()


@contextmanager
def alone() -> Iterator[None]:
    """Within a turn: while no other test runs."""
    if not _files:
        yield
        return
    _enter("LOCK_EX")
    try:
        yield
    finally:
        _enter("LOCK_SH")


def _enter(how: str) -> None:
    import fcntl

    door, room = _files
    fcntl.flock(room, fcntl.LOCK_UN)  # two that wish to be alone wait one for the other
    # Whoever waits to be alone holds the door, so that no other test slips in before it.
    fcntl.flock(door, fcntl.LOCK_EX)
    fcntl.flock(room, getattr(fcntl, how))
    fcntl.flock(door, fcntl.LOCK_UN)


def workers() -> bool:
    """Whether other workers of pytest-xdist run tests beside this process."""
    return int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1)) > 1
