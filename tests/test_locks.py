"""Locks between processes: one after the other, by a file that goes with its holder."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from runtime.backends.plan import lock as locks
from runtime.backends.plan.lock import is_held, locked, locked_now


def test_a_lock_waits_for_the_other(tmp_path: Path):
    order, told = [], []

    def second() -> None:
        with locked(tmp_path / "x.lock", lambda: told.append(1)):
            order.append("second")

    with locked(tmp_path / "x.lock", lambda: None):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "second"] and not told


def test_the_next_one_waits_for_who_waited(tmp_path: Path):
    """The lock's file goes with the first holder; a third opens another one than the second."""
    lock, order = tmp_path / "x.lock", []
    has_it, may_end = threading.Event(), threading.Event()

    def second() -> None:
        with locked(lock, lambda: None):
            has_it.set()
            may_end.wait(30)
            order.append("second")

    def third() -> None:
        with locked(lock, lambda: None):
            order.append("third")

    threads = [threading.Thread(target=one) for one in (second, third)]
    with locked(lock, lambda: None):
        threads[0].start()
        time.sleep(0.2)
    assert has_it.wait(30) and is_held(lock)
    threads[1].start()
    with locked_now(lock) as alone:
        assert not alone and lock.exists()
    time.sleep(0.2)
    may_end.set()
    for thread in threads:
        thread.join()
    assert order == ["second", "third"] and not lock.exists() and not is_held(lock)


def test_the_lock_of_a_file_that_went_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The holder ends, and removes the file, between another's opening and locking it."""
    lock, take, taken = tmp_path / "x.lock", locks._take, []

    def too_late(file: int) -> bool:
        if not taken:
            lock.unlink()
        taken.append(file)
        return take(file)

    monkeypatch.setattr(locks, "_take", too_late)
    with locked(lock, lambda: None):
        assert len(taken) == 2 and is_held(lock)
    assert not lock.exists()
