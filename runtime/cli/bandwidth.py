"""How fast memory is read, measured once and remembered beside the kernels."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path


def measured(threads: int) -> float:
    """Bytes per second that `threads` threads read, measured now (1 GiB) and remembered."""
    from runtime.backends.cpu.run.bandwidth import read_bandwidth

    found = read_bandwidth(threads)
    _keep(threads, found)
    return found


def remembered(threads: int) -> float | None:
    """The last measurement on this processor; None when there is none."""
    found = _all().get(_key(threads))
    return float(found) if isinstance(found, int | float) and found > 0 else None


def file() -> Path:
    """Where measurements are kept."""
    from runtime.backends.environment import cache_dir

    return cache_dir() / "bandwidth.json"


def _key(threads: int) -> str:
    from runtime.backends.cpu.run.cores import cpu_name

    return f"{cpu_name()}, {threads} threads"


def _all() -> dict[str, float]:
    try:
        found = json.loads(file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _keep(threads: int, found: float) -> None:
    """Write the measurement; a folder that cannot be written to is no fault of the command."""
    from runtime.backends.plan.entries import replace

    text = json.dumps({**_all(), _key(threads): found}, indent=1)
    with contextlib.suppress(OSError):
        replace(file(), text.encode())
