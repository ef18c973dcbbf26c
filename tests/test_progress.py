"""Progress: bars on a terminal, plain lines elsewhere, nothing for what is soon done."""

from __future__ import annotations

import io
import sys

import pytest

from runtime import progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands until its only element is changed."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def work(clock: list[float], seconds: float, steps: int = 4, what: str = "packing") -> None:
    with progress.reporter(True) as report:
        assert report is not None
        for done in range(steps + 1):
            report(done, steps, what)
            clock[0] += seconds / steps


def test_a_long_phase_is_a_line_at_its_start_and_one_at_its_end(clock, capsys):
    work(clock, 8.0)
    assert capsys.readouterr().err == "packing ...\npacking: 8.0 s\n"


def test_a_short_phase_is_silent(clock, capsys):
    work(clock, 1.9)
    assert capsys.readouterr().err == ""


def test_an_interrupted_phase_is_ended(clock, capsys):
    with pytest.raises(KeyboardInterrupt), progress.reporter(True) as report:
        report(0, 9, "packing")
        clock[0] += 3
        report(1, 9, "packing")
        clock[0] += 1
        raise KeyboardInterrupt
    assert capsys.readouterr().err == "packing ...\npacking: 4.0 s\n"


def test_functions_and_nothing_pass_through(capsys):
    calls = []
    with progress.reporter(lambda *call: calls.append(call)) as report:
        report(1, 2, "a")
    with progress.reporter(False) as report:
        assert report is None
    assert calls == [(1, 2, "a")] and capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(clock, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    work(clock, 8.0)
    assert "packing" in terminal.getvalue() and "packing ..." not in terminal.getvalue()
