"""How fast memory is read, measured once and remembered beside the kernels."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path


def measured(threads: int, dtype: str = "") -> float:
    """Bytes per second that `threads` threads read, measured now and remembered.

    dtype: of weights of that type, in products with one token; else of memory (1 GiB).
    """
    from runtime.backends.cpu.run.bandwidth import read_bandwidth
    from runtime.backends.cpu.run.decoding import decode_rate
    from runtime.ops.dtypes import DTYPES

    found = decode_rate(DTYPES[dtype], threads) if dtype else read_bandwidth(threads)
    _keep(_key(threads, dtype), found)
    return found


def remembered(threads: int, dtype: str = "") -> float | None:
    """The last measurement on this processor; None when there is none."""
    found = _all().get(_key(threads, dtype))
    return float(found) if isinstance(found, int | float) and found > 0 else None


def file() -> Path:
    """Where measurements are kept."""
    from runtime.backends.environment import cache_dir

    return cache_dir() / "bandwidth.json"


def _key(threads: int, dtype: str) -> str:
    from runtime.backends.cpu.run.cores import cpu_name

    return f"{cpu_name()}, {threads} threads" + f", {dtype}" * bool(dtype)


def _all() -> dict[str, float]:
    try:
        found = json.loads(file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _keep(key: str, found: float) -> None:
    """Write the measurement; after one of memory those of types are made anew.

    A folder that cannot be written to is no fault of the command.
    """
    from runtime.backends.plan.entries import replace

    others = {name: n for name, n in _all().items() if not name.startswith(f"{key}, ")}
    text = json.dumps({**others, key: found}, indent=1)
    with contextlib.suppress(OSError):
        replace(file(), text.encode())
