"""A program in a terminal of its own: keys go in, what it shows comes out."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence
from types import TracebackType

_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[()][A-Z0-9]|\x1b[=>]")


def _unsized() -> dict[str, str]:
    """The environment without a size of another terminal, which workers of pytest-xdist have."""
    return {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}


class Terminal:
    """Runs a command with all three streams on a pseudo-terminal of `columns` columns."""

    def __init__(
        self, command: Sequence[str], columns: int = 80, env: Mapping[str, str] | None = None
    ) -> None:
        self._end, theirs = pty.openpty()
        self.resize(columns)
        self.seen = ""  # all that was shown, as it came
        self._at = 0  # how much of it `expect` has passed
        self._process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
            env={**_unsized(), "TERM": "xterm", **(env or {})}, close_fds=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(theirs)

    def resize(self, columns: int) -> None:
        """Another width, as when a user drags the window."""
        fcntl.ioctl(self._end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def send(self, keys: str) -> None:
        """Type."""
        os.write(self._end, keys.encode())

    def interrupt(self) -> None:
        """Ctrl-C, as a key."""
        self.send("\x03")

    def expect(self, text: str, seconds: float = 20.0) -> str:
        """Wait for `text` after what was expected before; what came between."""
        end = time.monotonic() + seconds
        while (found := self.shown().find(text, self._at)) < 0:
            if not self._read(end - time.monotonic()):
                raise AssertionError(f"no {text!r} in {self.shown()[self._at :]!r}")
        between, self._at = self.shown()[self._at : found], found + len(text)
        return between

    def shown(self) -> str:
        """What was shown, without escape sequences and carriage returns."""
        return _ESCAPES.sub("", self.seen).replace("\r\n", "\n").replace("\r", "")

    def rest(self, seconds: float = 20.0) -> str:
        """What comes until the program ends."""
        end = time.monotonic() + seconds
        while self._read(end - time.monotonic()):
            pass
        return self.shown()[self._at :]

    def status(self, seconds: float = 20.0) -> int:
        """The exit status."""
        self.rest(seconds)
        return self._process.wait(seconds)

    def _read(self, seconds: float) -> bool:
        if seconds <= 0 or not select.select([self._end], [], [], seconds)[0]:
            return False
        try:
            data = os.read(self._end, 4096)
        except OSError:  # the other end is closed
            return False
        self.seen += data.decode("utf-8", "replace")
        return bool(data)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
        os.close(self._end)
