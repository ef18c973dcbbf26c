"""Progress: bars on a terminal, plain lines elsewhere, nothing for what is soon done."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from runtime import progress
from runtime.backends.cpu.compile.library import library
from runtime.backends.plan.kernel import Kernel


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands until its only element is changed."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def work(
    clock: list[float], seconds: float, steps: int = 4, what: str = "packing",
    wanted: bool | None = True,
) -> None:  # fmt: skip
    with progress.reporter(wanted) as report:
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
    threads = threading.active_count()
    work(clock, 8.0)
    assert "packing" in terminal.getvalue() and "packing ..." not in terminal.getvalue()
    assert threading.active_count() == threads, "bars need no thread"


def test_unasked_compiling_is_told_at_once_and_the_rest_when_it_lasts(clock, capsys):
    work(clock, 0.4, what="compiling CPU kernels", wanted=None)
    first = "compiling CPU kernels (4, once for this machine) ...\n"
    assert capsys.readouterr().err == f"{first}compiling CPU kernels: 0.4 s\n"
    work(clock, 0.9, wanted=None)
    assert capsys.readouterr().err == ""
    work(clock, 4.0, wanted=None)
    assert capsys.readouterr().err == "packing ...\npacking: 4.0 s\n"


def test_a_notebook_gets_one_line_that_is_written_over(clock, capsys, monkeypatch):
    shell = SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=None))
    monkeypatch.setitem(sys.modules, "IPython", shell)
    work(clock, 0.4, what="compiling CPU kernels", wanted=None)
    shown = capsys.readouterr().err
    assert "\n" not in shown.removesuffix("\n") and "█" in shown
    assert shown.split("\r")[-1] == "compiling CPU kernels: 0.4 s\n"
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: None))
    work(clock, 4.0, wanted=None)
    assert capsys.readouterr().err == "packing ...\npacking: 4.0 s\n"


def test_without_a_stderr_nothing_is_said(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    with progress.reporter(None) as report:
        assert report is None


def test_load_says_when_it_compiles(small_model: Path, tmp_path: Path):
    """By itself, once; and nothing where it was told not to, or finds its kernels."""

    def said(options: str) -> str:
        program = (
            "import sys, runtime; from runtime.backends.plan.kernel import Kernel; "
            "from runtime.backends.cpu import CpuBackend; "
            "CpuBackend.kernels = lambda self, plans: "
            "[Kernel.of('executor'), Kernel.of('pack_weights', format='F32')]; "
            f"runtime.load(sys.argv[1]{options})"
        )
        environment = {**os.environ, "RUNTIME_CACHE_DIR": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-c", program, str(small_model)],
            env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0 and not done.stdout, done.stderr
        return done.stderr

    name = library().name(Kernel.of("executor"))  # takes long to compile
    library().address(Kernel.of("executor"))
    (tmp_path / name).parent.mkdir()
    shutil.copy(library().entries.path(name), tmp_path / name)
    assert said(", progress=False") == "" and any(tmp_path.rglob("pack_weights*.o"))
    assert said("") == ""
    next(tmp_path.rglob("pack_weights*.o")).unlink()
    first, last = said("").splitlines()
    assert first == "compiling CPU kernels (1, once for this machine) ..."
    assert re.fullmatch(r"compiling CPU kernels: \d+\.\d s", last)
