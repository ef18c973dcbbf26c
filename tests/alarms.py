"""Real signals at chosen times, for tests of what an interrupt leaves behind."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest


class AlarmError(Exception):
    """What the handler of a signal raises."""


@pytest.fixture
def alarm() -> Iterator[Callable[[float], Any]]:
    """A signal that comes after so many seconds (0: never), whose handler raises `AlarmError`."""
    if not hasattr(signal, "setitimer"):
        pytest.skip("this system has no timer that sends signals")

    def handler(*_: Any) -> None:
        raise AlarmError

    before = signal.signal(signal.SIGALRM, handler)
    try:
        yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def second_signal(monkeypatch: pytest.MonkeyPatch, owner: type, method: str) -> None:
    """The next call of a method ends at once, as when another signal comes; later ones do not."""
    plain = getattr(owner, method)

    def interrupted(*_: Any) -> None:
        monkeypatch.setattr(owner, method, plain)
        raise AlarmError

    monkeypatch.setattr(owner, method, interrupted)
