"""Runs of several processes by mpiexec, none of which outlives its test."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
_MARK = "MPI_RUN_OF_A_TEST"


@functools.cache
def launcher() -> str:
    """The path of mpiexec; the test is skipped where there is no MPI."""
    if sys.platform != "linux":
        pytest.skip("processes are looked for in /proc")
    found = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    done = subprocess.run(
        [sys.executable, "-c", "from mpi4py import MPI"], capture_output=True, timeout=60
    )
    if found is None or done.returncode:
        pytest.skip("mpi4py, an MPI library or mpiexec is not here")
    return found


class MpiRun:
    """`n` processes of a command of Python's, with pipes to the first. A context manager."""

    def __init__(
        self, n: int, *command: str, flags: tuple[str, ...] = (), before: tuple[str, ...] = ()
    ) -> None:
        """flags: of mpiexec. before: what starts Python."""
        mark = uuid.uuid4().hex
        self._mark = f"{_MARK}={mark}".encode()
        environment = {**os.environ, "PYTHONPATH": str(ROOT), _MARK: mark}
        self.process = subprocess.Popen(
            [launcher(), *flags, "-n", str(n), *before, sys.executable, *command],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment,
            start_new_session=True,
        )  # fmt: skip

    def pids(self) -> dict[int, int]:
        """Of each rank its process, while it lives."""
        found = {}
        for pid, environment in self._alive():
            rank = dict(e.split(b"=", 1) for e in environment if b"=" in e).get(b"PMI_RANK")
            name = Path(f"/proc/{pid}/comm").read_text("ascii")
            if rank is not None and name.startswith("python"):
                found[int(rank)] = pid
        return found

    def read_some(self) -> bytes:
        """What the first process prints next."""
        assert self.process.stdout is not None
        return self.process.stdout.read1(100)

    def end(self, stdin: str = "", timeout: float = 120) -> tuple[int, str, str]:
        """Exit status, stdout and stderr."""
        try:
            out, err = self.process.communicate(stdin.encode(), timeout)
        except subprocess.TimeoutExpired:
            self._kill()
            out, err = self.process.communicate()
            pytest.fail(f"still running after {timeout} s\n{out.decode()}\n{err.decode()}")
        return self.process.returncode, out.decode(), err.decode()

    def __enter__(self) -> MpiRun:
        return self

    def __exit__(self, *_: object) -> None:
        self._kill()
        self.process.communicate()

    def _kill(self) -> None:
        for pid, _ in self._alive():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def _alive(self) -> list[tuple[int, list[bytes]]]:
        """The processes of this run, with their environments."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                environment = (folder / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if self._mark in environment:
                found.append((int(folder.name), environment))
        return found


def mpiexec(n: int, *command: str, stdin: str = "", timeout: float = 120) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a whole run."""
    with MpiRun(n, *command) as run:
        return run.end(stdin, timeout)
