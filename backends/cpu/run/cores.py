"""The processor: its name, and how many of its cores this process may use."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path

from runtime.ops.errors import OptionError

_CAN_PIN = hasattr(os, "sched_setaffinity")
_SYSTEM = Path("/sys/devices/system")  # where Linux tells of processors and of memory


Cores = frozenset[int]  # logical processors, by the system's numbers


def processors() -> int:
    """Logical processors this process may use."""
    return len(_allowed()) if _CAN_PIN else os.cpu_count() or 1


def physical_cores(cores: Cores | None = None) -> int:
    """Cores this process may use, or those of `cores`; hyperthreads counted once where known."""
    if _CAN_PIN:
        return len(_physical(cores or _allowed()))
    logical = processors()
    return max(1, logical // 2) if sys.platform == "win32" and logical > 1 else logical


def numa_nodes() -> list[Cores]:
    """Processors of each NUMA node that this process may use; nodes without any are left out.

    One node where the system does not tell; none where it cannot keep threads to processors.
    """
    if not _CAN_PIN:
        return []
    allowed = _allowed()
    paths = sorted(_SYSTEM.glob("node/node[0-9]*"), key=lambda path: int(path.name[4:]))
    try:
        found = [cores for path in paths if (cores := _listed(path / "cpulist") & allowed)]
    except OSError:
        found = []
    return found or [allowed]


def shared_out(n: int) -> list[Cores | None]:
    """Processors for each of n devices: a NUMA node each, where there are as many nodes.

    Otherwise whole cores, node after node, as evenly as can be; where there are fewer cores than
    devices, some have the same. None: the system cannot keep threads to processors.
    """
    nodes = numa_nodes()
    if not nodes:
        return [None] * n
    if len(nodes) == n:
        return [*nodes]
    cores = [core for node in nodes for core in _physical(node)]
    starts = [i * len(cores) // n for i in range(n + 1)]
    pieces = [cores[start : max(start + 1, end)] for start, end in pairwise(starts)]
    return [frozenset[int]().union(*piece) for piece in pieces]


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


def _physical(allowed: Cores) -> list[Cores]:
    """Those of each core, which hyperthreads share, where the system tells."""
    try:
        found = [
            _listed(_SYSTEM / f"cpu/cpu{cpu}/topology/thread_siblings_list") for cpu in allowed
        ]
    except OSError:
        found = [frozenset((cpu,)) for cpu in allowed]
    return sorted({cores & allowed for cores in found}, key=min)


def _listed(path: Path) -> Cores:
    """Processors of a file such as "0-3,8-11"."""
    found: set[int] = set()
    for part in filter(None, path.read_text().strip().split(",")):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return frozenset(found)


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
