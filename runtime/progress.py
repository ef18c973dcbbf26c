"""Progress of long waits, shown on stderr, and only when they last.

On a terminal bars that vanish, in a notebook one line that is written over, elsewhere a line at
the start of a wait and one at its end. What is asked for (True) is shown once it proves long; by
itself (None) compiling is told at once, because a user who waits for it thinks that something
hangs, and all else after a second.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_BAR, _LINE = 0.4, 2.0  # seconds before a bar or a line appears: short waits stay silent
_UNASKED = 1.0  # and before either does that nobody asked for
_COMPILING = "compiling"  # how that kind of work is called
_REDRAW = 0.1  # seconds between two states of a bar
_WIDTH = 30  # characters of a notebook's bar
Progress = Callable[[int, int, str], None]


@contextmanager
def reporter(wanted: bool | Progress | None) -> Iterator[Progress | None]:
    """A function (done, total, what) that shows progress while the block runs, or None.

    wanted: True, False, None for what the module's text says of it, or the function itself.
    """
    if callable(wanted):
        yield wanted
        return
    if wanted is False or sys.stderr is None:
        yield None
        return
    asked = wanted is True
    shown: Any = _Lines(_patience(_LINE if asked else _UNASKED, asked))
    if sys.stderr.isatty() or _in_notebook():
        kind = _Bars if sys.stderr.isatty() else _Notebook
        shown = kind(_patience(_BAR if asked else _UNASKED, asked))
    try:
        yield shown.report
    finally:
        shown.close()


def _patience(seconds: float, asked: bool) -> Callable[[str], float]:
    """How long a kind of work may last before it is shown."""
    return lambda what: 0.0 if not asked and what.startswith(_COMPILING) else seconds


def _in_notebook() -> bool:
    """Whether output goes to the cells of a notebook."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return hasattr(shell, "kernel")


class _Bars:
    """One rich bar per kind of work."""

    def __init__(self, patience: Callable[[str], float]) -> None:
        self._patience, self._started = patience, time.monotonic()
        self._progress: Any = None
        self._tasks: dict[str, Any] = {}
        self._drawn = -math.inf

    def report(self, done: int, total: int, what: str) -> None:
        now = time.monotonic()
        if self._progress is None:
            if now - self._started < self._patience(what) or done >= total:
                return
            self._open()
        if what not in self._tasks:
            self._tasks[what] = self._progress.add_task(what, total=total)
        draw = now - self._drawn >= _REDRAW or done >= total
        self._progress.update(self._tasks[what], completed=done, total=total, refresh=draw)
        self._drawn = now if draw else self._drawn

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
        console = Console(stderr=True)
        # drawn when there is news: a thread for it could not always be started
        self._progress = Progress(*columns, console=console, transient=True, auto_refresh=False)
        self._progress.start()


class _Lines:
    """Where nobody watches a terminal: a line when a kind of work proves long, and at its end."""

    def __init__(self, patience: Callable[[str], float]) -> None:
        self._patience = patience
        self._started: dict[str, float] = {}
        self._said: dict[str, bool] = {}  # what has been announced -> whether its end was told

    def report(self, done: int, total: int, what: str) -> None:
        begun = self._started.setdefault(what, time.monotonic())
        if what in self._said:
            if done >= total:
                self._end(what)
            else:
                self._go_on(done, total, what)
        elif time.monotonic() - begun >= self._patience(what) and done < total:
            self._said[what] = False
            self._begin(total, what)

    def close(self) -> None:
        for what in self._said:
            self._end(what)

    def _begin(self, total: int, what: str) -> None:
        counted = f" ({total}, once for this machine)" if what.startswith(_COMPILING) else ""
        print(f"{what}{counted} ...", file=sys.stderr)

    def _go_on(self, done: int, total: int, what: str) -> None:
        """Nothing: never a bar that stands still."""

    def _end(self, what: str) -> None:
        if not self._said[what]:
            self._said[what] = True
            seconds = time.monotonic() - self._started[what]
            print(f"{what}: {seconds:.1f} s", file=sys.stderr)


class _Notebook(_Lines):
    """A line that is written over: cells show no bars that move about."""

    def _begin(self, total: int, what: str) -> None:
        self._drawn = -math.inf
        self._go_on(0, total, what)

    def _go_on(self, done: int, total: int, what: str) -> None:
        if time.monotonic() - self._drawn >= _REDRAW:
            self._drawn, full = time.monotonic(), _WIDTH * done // max(1, total)
            bar = "█" * full + "░" * (_WIDTH - full)
            self._write(f"{what} {bar} {100 * done // max(1, total):3d} %")

    def _end(self, what: str) -> None:
        if not self._said[what]:
            self._write("")
            super()._end(what)

    def _write(self, text: str) -> None:
        # spaces over what was there
        print(f"\r{text:<80}\r{text}", end="", file=sys.stderr, flush=True)
