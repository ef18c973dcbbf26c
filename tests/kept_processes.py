"""Compile processes that tests keep: to start one, Numba with it, takes as long as most kernels.

Workers of pytest-xdist compile no kernel twice. What the package's own pool promises is tested in
processes beside these, and in test_library.py.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import queue
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from subprocess import Popen
from typing import Any, ClassVar

from runtime.backends.plan.kernel import Kernel
from runtime.backends.plan.library import Head
from runtime.backends.plan.pool import Pool

_FEW = 4  # kernels for which a second process is not worth its start
_TOLD = ("NUMBA", "DEBUG")  # variables that compile processes read


class Kept(Pool):
    """A pool whose processes outlive it, for the next that would start the same."""

    idle: ClassVar[dict[str, list[Popen[bytes]]]] = defaultdict(list)
    shared: ClassVar[Path | None] = None  # a folder of all workers

    @classmethod
    def end(cls) -> None:
        """End those that are idle."""
        for process in [process for some in cls.idle.values() for process in some]:
            process.communicate()  # at the end of its input it goes
        cls.idle.clear()

    def compile(self, kernels: Any, most: int, progress: Any = None) -> Iterator[Any]:
        """See the package's pool."""
        yield from super().compile(kernels, most if len(kernels) > _FEW else 1, progress)

    def __exit__(self, kind: Any, *rest: Any) -> None:
        if kind:
            return super().__exit__(kind, *rest)
        for thread in self._threads:
            thread.join()  # all have answered; now they give their processes back

    def _feed(self, todo: Any, done: Any) -> None:
        given = (self._environment or os.environ).items()
        told = {name: value for name, value in given if name.startswith(_TOLD)}
        kind = json.dumps([self._command, told], sort_keys=True)
        idle = self.idle[kind]
        try:
            process = idle.pop() if idle else self._process()
            if process not in self._processes:
                self._processes.append(process)
            with contextlib.suppress(queue.Empty):
                while True:
                    kernel = todo.get_nowait()
                    done.put((kernel, *self._asked_once(kind, process, kernel)))
            self._processes.remove(process)
            if not self._ended:
                idle.append(process)
        except Exception as error:  # the waiting side raises it
            done.put(error)

    def _asked_once(self, kind: str, process: Popen[bytes], kernel: Kernel) -> tuple[Head, bytes]:
        """A process's answer, or the one that another worker got from a process of this kind."""
        if self.shared is None:
            return self._ask(process, kernel)
        import fcntl

        name = hashlib.sha256(f"{kind} {kernel}".encode()).hexdigest()
        with (self.shared / name).open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed
            file.seek(0)
            head, _, code = file.read().partition(b"\n")
            if not head:
                found, code = self._ask(process, kernel)
                head = json.dumps(found).encode()
                file.write(head + b"\n" + code)
        return json.loads(head), code
