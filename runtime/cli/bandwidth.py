"""How fast memory is read, measured once a day and remembered beside the kernels.

What else runs makes a measurement low, never high: the best counts, and what cannot be is not kept.
"""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any

_DAY, _TRIES = 86400.0, 3  # seconds that a measurement is good for, and how often it is tried


def measured(threads: int, dtype: str = "") -> float:
    """Bytes per second that `threads` threads read, measured now and remembered.

    dtype: of weights of that type, in products with one token; else of memory (1 GiB), and what is
    remembered of types is measured anew when next asked for. Of an earlier measurement and this one
    the larger. What is implausible is measured up to 3 times, and then not remembered.
    """
    if not dtype:
        known = _all().items()
        _write({key: (n, at * key.endswith(" threads")) for key, (n, at) in known})
    return _measured(threads, dtype)


def remembered(threads: int, dtype: str = "") -> float | None:
    """Today's measurement on this processor; None when there is none that can be true."""
    found, at = _all().get(_key(threads, dtype), (0.0, 0.0))
    fresh = 0 <= time.time() - at < _DAY
    return found if fresh and _plausible(found, threads, dtype) else None


def file() -> Path:
    """Where measurements are kept."""
    from runtime.backends.environment import cache_dir

    return cache_dir() / "bandwidth.json"


def _measured(threads: int, dtype: str) -> float:
    from runtime.backends.cpu.run.bandwidth import read_bandwidth
    from runtime.backends.cpu.run.decoding import decode_rate
    from runtime.ops.dtypes import DTYPES

    if dtype and remembered(threads) is None:
        _measured(threads, "")
    key = _key(threads, dtype)
    best, _ = _all().get(key, (0.0, 0.0))
    best *= _plausible(best, threads, dtype)
    for _ in range(_TRIES):
        now = decode_rate(DTYPES[dtype], threads) if dtype else read_bandwidth(threads)
        best = max(best, now)
        if _plausible(best, threads, dtype):
            _write({**_all(), key: [best, time.time()]})
            break
        if dtype:  # which may be what something else made low
            _measured(threads, "")
    return best


def _plausible(found: float, threads: int, dtype: str) -> bool:
    """Not less than one thread reads; of a type, between a quarter of what memory gives and all."""
    known = _all()
    alone, _ = known.get(_key(1, dtype), (0.0, 0.0))
    memory, _ = known.get(_key(threads, ""), (4 * found, 0.0)) if dtype else (found, 0.0)
    return found > 0 and memory / 4 <= found <= memory and (threads == 1 or found >= alone)


def _key(threads: int, dtype: str) -> str:
    from runtime.backends.cpu.run.cores import cpu_name

    return f"{cpu_name()}, {threads} threads" + f", {dtype}" * bool(dtype)


def _all() -> dict[str, tuple[float, float]]:
    """Bytes per second and the time of each measurement; what is anything else is left out."""
    try:
        found = json.loads(file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    pairs: dict[str, Any] = found if isinstance(found, dict) else {}
    return {
        key: (float(pair[0]), float(pair[1]))
        for key, pair in pairs.items()
        if isinstance(pair, list) and len(pair) == 2
        if all(isinstance(n, int | float) for n in pair)
    }


def _write(known: dict[str, Any]) -> None:
    """A folder that cannot be written to is no fault of the command."""
    from runtime.backends.plan.entries import replace

    with contextlib.suppress(OSError):
        replace(file(), json.dumps(known, indent=1).encode())
