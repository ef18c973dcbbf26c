"""The processor: its name, and how many of its cores this process may use."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path


def physical_cores() -> int:
    """Cores this process may use, hyperthreads counted once where the system tells."""
    if hasattr(os, "sched_getaffinity"):
        allowed = os.sched_getaffinity(0)
        if sys.platform == "linux":
            return len(_linux_cores(allowed)) or len(allowed)
        return len(allowed)
    logical = os.cpu_count() or 1
    return max(1, logical // 2) if sys.platform == "win32" and logical > 1 else logical


def _linux_cores(allowed: set[int]) -> set[str]:
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
