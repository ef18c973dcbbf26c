"""The processor: its name, and how many of its cores this process may use."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from runtime.ops.errors import OptionError

_CAN_PIN = hasattr(os, "sched_setaffinity")


Cores = frozenset[int]  # logical processors, by the system's numbers


def processors() -> int:
    """Logical processors this process may use."""
    return len(_allowed()) if _CAN_PIN else os.cpu_count() or 1


def physical_cores(cores: Cores | None = None) -> int:
    """Cores this process may use, or those of `cores`; hyperthreads counted once where known."""
    if _CAN_PIN:
        allowed = cores or _allowed()
        return (len(_linux_cores(allowed)) if sys.platform == "linux" else 0) or len(allowed)
    logical = processors()
    return max(1, logical // 2) if sys.platform == "win32" and logical > 1 else logical


def checked(cores: Iterable[int]) -> Cores:
    """Processors to keep threads to. OptionError: the system cannot, or has not all of them."""
    wanted = frozenset(cores)
    if not _CAN_PIN:
        raise OptionError(
            f"cores={sorted(wanted)}: {sys.platform} does not let a program choose the processors "
            "of its threads; leave it out"
        )
    if not wanted or wanted - _allowed():
        raise OptionError(
            f"cores={sorted(wanted)}: this process may use the processors {sorted(_allowed())}"
        )
    return wanted


@contextlib.contextmanager
def pinned(cores: Cores | None) -> Iterator[None]:
    """Keep this thread to some processors (None: to any) for as long as it lasts."""
    if cores is None:
        yield
        return
    before = os.sched_getaffinity(0)  # 0: the calling thread
    try:
        os.sched_setaffinity(0, cores)
        yield
    finally:
        os.sched_setaffinity(0, before)


def _allowed() -> Cores:
    return frozenset(os.sched_getaffinity(0))


def _linux_cores(allowed: Cores) -> set[str]:
    """One name per physical core: the list of logical processors that share it."""
    found = set()
    for cpu in allowed:
        path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            found.add(path.read_text().strip())
        except OSError:
            return set()
    return found


def cpu_name() -> str:
    """The processor's name, as far as the system tells."""
    import platform
    import subprocess

    try:
        if sys.platform == "linux":
            lines = Path("/proc/cpuinfo").read_text().splitlines()
            names = [
                line.partition(":")[2].strip() for line in lines if line.startswith("model name")
            ]
            return names[0] if names else platform.machine()
        if sys.platform == "darwin":
            asked = ("sysctl", "-n", "machdep.cpu.brand_string")
            return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        pass
    return platform.processor() or platform.machine()
