"""Progress of long waits, drawn on stderr, and only when they last."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_PATIENCE = 0.4  # seconds before a bar appears: short waits stay silent
Progress = Callable[[int, int, str], None]


@contextmanager
def reporter(wanted: bool | Progress) -> Iterator[Progress | None]:
    """A function (done, total, what) that draws bars while the block runs, or None."""
    if not isinstance(wanted, bool):
        yield wanted
    elif wanted and sys.stderr.isatty():
        bars = _Bars()
        try:
            yield bars.report
        finally:
            bars.close()
    elif wanted:
        yield _Lines().report
    else:
        yield None


class _Bars:
    """One rich bar per kind of work."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._progress: Any = None
        self._tasks: dict[str, Any] = {}

    def report(self, done: int, total: int, what: str) -> None:
        if self._progress is None:
            if time.monotonic() - self._started < _PATIENCE or done >= total:
                return
            self._open()
        if what not in self._tasks:
            self._tasks[what] = self._progress.add_task(what, total=total)
        self._progress.update(self._tasks[what], completed=done, total=total)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()

    def _open(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description:18}"), BarColumn(),
            TextColumn("{task.percentage:3.0f} %"), TimeRemainingColumn(),
        )  # fmt: skip
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self._progress.start()


class _Lines:
    """One line per kind of work where nobody watches a terminal, and only for long waits."""

    def __init__(self) -> None:
        self._started: dict[str, float] = {}
        self._said: set[str] = set()

    def report(self, done: int, total: int, what: str) -> None:
        begun = self._started.setdefault(what, time.monotonic())
        if what not in self._said and time.monotonic() - begun > 2 and done < total:
            self._said.add(what)
            print(f"{what}: {100 * done // max(1, total)} % ...", file=sys.stderr)
