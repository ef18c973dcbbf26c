"""Progress of long waits, drawn on stderr, and only when they last."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_PATIENCE = 0.4  # seconds before a bar appears: short waits stay silent
_LONG = 2.0  # and before a line is written where there is no terminal
Progress = Callable[[int, int, str], None]


@contextmanager
def reporter(wanted: bool | Progress) -> Iterator[Progress | None]:
    """A function (done, total, what) that draws bars while the block runs, or None."""
    if not isinstance(wanted, bool):
        yield wanted
        return
    if not wanted:
        yield None
        return
    shown = _Bars() if sys.stderr is not None and sys.stderr.isatty() else _Lines()
    try:
        yield shown.report
    finally:
        shown.close()


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
    """Where nobody watches a terminal: a line when a kind of work proves long, and at its end.

    Nothing for what takes less than `_LONG` seconds, and never a bar that stands still.
    """

    def __init__(self) -> None:
        self._started: dict[str, float] = {}
        self._said: dict[str, bool] = {}  # what has been announced -> whether its end was told

    def report(self, done: int, total: int, what: str) -> None:
        begun = self._started.setdefault(what, time.monotonic())
        if what in self._said:
            if done >= total:
                self._end(what)
        elif time.monotonic() - begun > _LONG and done < total:
            self._said[what] = False
            print(f"{what} ...", file=sys.stderr)

    def close(self) -> None:
        for what in self._said:
            self._end(what)

    def _end(self, what: str) -> None:
        if not self._said[what]:
            self._said[what] = True
            seconds = time.monotonic() - self._started[what]
            print(f"{what}: {seconds:.1f} s", file=sys.stderr)
