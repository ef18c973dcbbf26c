"""Tests that time something or send signals, kept alone on the machine when several workers run.

With `pytest -n 2` each test holds a shared lock while it runs, and one of ALONE holds it for
itself: it waits for the other workers' tests to end, and they wait for it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Files, and single tests of others.
ALONE = frozenset({
    "test_ctrl_c", "test_executor", "test_forks", "test_help_is_cheap", "test_import_is_cheap",
    "test_many_real_signals", "test_real_signals", "test_speed", "test_team_group",
})  # fmt: skip


@contextmanager
def turn(folder: Path, alone: bool) -> Iterator[None]:
    """While a test runs: beside others of its kind, or `alone`. `folder` is the workers' own."""
    try:
        import fcntl
    except ImportError:  # Windows: tests may disturb each other there
        yield
        return
    # Whoever waits to be alone holds the door, so that no other test slips in before it.
    with (folder / "door").open("a") as door, (folder / "room").open("a") as room:
        fcntl.flock(door, fcntl.LOCK_EX)
        fcntl.flock(room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(door, fcntl.LOCK_UN)
        yield


def workers() -> bool:
    """Whether other workers of pytest-xdist run tests beside this process."""
    return int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1)) > 1
