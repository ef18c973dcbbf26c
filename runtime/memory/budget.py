"""How much memory there is, what a context takes, and what fits."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from typing import NamedTuple

from runtime.errors import MemoryLimitError
from runtime.ops import PAGE
from runtime.units import in_units

SLOTS_PER_SEQUENCE = 20  # its state, its checkpoints, and room for snapshots and forks of it
_SPARE_PAGES = 16  # of a sequence: its snapshots and forks each have a last page of their own
CACHED = 2048  # bytes of a page, at most, that a cache of prompts takes beside it to find it by
LEAST_SLOTS = 2  # without room for one more, nothing can be forked or kept
SHARE = 0.9  # of what is free: the rest is for activations, text and the system


def available_memory() -> int | None:
    """Bytes that programs can still take without swapping; None where the system does not say."""
    if sys.platform == "linux":
        return min(_meminfo(), _control_group())
    if sys.platform == "win32":
        return _windows_memory()
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (ValueError, OSError):
        return None


def _meminfo() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return sys.maxsize


def _control_group() -> int:
    """What a container's limit leaves (control groups, version 2)."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit = (folder / "memory.max").read_text().strip()
        used = int((folder / "memory.current").read_text())
        return sys.maxsize if limit == "max" else max(0, int(limit) - used)
    except (OSError, ValueError):
        return sys.maxsize


def _windows_memory() -> int | None:
    class Status(ctypes.Structure):
        _fields_ = (
            ("length", ctypes.c_ulong), ("load", ctypes.c_ulong),
            *((name, ctypes.c_ulonglong) for name in ("total", "free", "c", "d", "e", "f", "g")),
        )  # fmt: skip

    status = Status(length=ctypes.sizeof(Status))
    kernel = ctypes.CDLL("kernel32")
    return status.free if kernel.GlobalMemoryStatusEx(ctypes.byref(status)) else None


class CacheSize(NamedTuple):
    """The context a sequence may have; pages and slots of all sequences together."""

    context: int
    pages: int
    slots: int = 0


class Memory(NamedTuple):
    """Bytes a model takes: its weights, one page of KV cache (PAGE tokens of all layers), the
    recurrent state of one sequence (0 where there is none); and, once it is loaded, how many
    pages and slots of state there is room for."""

    weights: int
    page: int
    state: int
    pages: int = 0
    slots: int = 0

    def of(self, context: int) -> int:
        """Bytes of the weights and one sequence of `context` tokens."""
        return self.weights + -(-context // PAGE) * self.page + self.state


def choose(
    context: int | None, trained: int, sequences: int, page_nbytes: int, weights: int,
    slot_nbytes: int = 0, free: int | None = None, where: str = "",
    cache_bytes: int | None = None,
) -> CacheSize:  # fmt: skip
    """Context, pages and slots: `context` if given, else the trained one, or what fits in memory.

    `page_nbytes` is a page of all layers, `weights` what the model itself will take, `slot_nbytes`
    the recurrent state of one sequence (0: the model has none), `free` what is free of the memory
    `where` they go (by default the host's). Sequences share one pool: room
    for as many full contexts as asked for and fit, at least one, and for the last pages of
    snapshots. Slots come first, in a quarter of the budget. Pages and slots count in full, though
    the system gives memory only to those ever used. cache_bytes: what all of it may take, in place
    of room for so many sequences: half of it is slots, where there are any and a context fits.
    MemoryLimitError says what would fit.
    """
    free, page_nbytes = available_memory() if free is None else free, max(1, page_nbytes)
    more = " or more devices" if where else ""
    beside = ", or -ngl (gpu_layers), which leaves layers to the CPU" if "cuda" in where else ""
    budget = sys.maxsize if free is None else max(0, int((free - weights) * SHARE))
    if cache_bytes is not None:
        return _within(cache_bytes, context, trained, page_nbytes + CACHED, slot_nbytes, budget)
    slots = _slots(sequences, budget, slot_nbytes)
    state = slots * slot_nbytes
    most = max(0, budget - state) // page_nbytes * PAGE
    if context is not None and context > most > 0:
        also = f" and {gib(state)} of recurrent state" if state else ""
        raise MemoryLimitError(
            f"context={context} needs {gib(-(-context // PAGE) * page_nbytes)} of KV cache{also}, "
            f"and {gib(budget)} is free beside the model{where}: at most context={most} fits "
            f"(a smaller kv_type such as 'q8_0'{more} fits more)"
        )
    wanted = context or min(trained, most)
    if wanted > most or wanted < 1:
        also = f" beside {gib(state)} of recurrent state" if state else ""
        raise MemoryLimitError(
            f"the model takes {gib(weights)} and {gib(free or 0)} of memory is free{where}: "
            f"no room is left for a KV cache{also}; use a smaller or more quantised model{more}"
            f"{beside}"
        )
    each = -(-wanted // PAGE)
    pages = min((each + _SPARE_PAGES) * sequences, (budget - state) // page_nbytes)
    return CacheSize(wanted, max(each, pages), slots)


def _within(
    cache_bytes: int, context: int | None, trained: int, page: int, slot: int, budget: int
) -> CacheSize:
    """What `choose` gives for so many bytes; page, slot: bytes of one. budget: what is free."""
    given = f"cache_bytes={gib(cache_bytes)}"
    if cache_bytes > budget:
        raise MemoryLimitError(f"{given}: {gib(budget)} is free beside the model; give less")
    most = (cache_bytes - LEAST_SLOTS * bool(slot) * slot) // page * PAGE
    wanted = context or min(trained, most)
    if wanted > most or most < PAGE:
        least = gib(-(-(context or 1) // PAGE) * page + LEAST_SLOTS * bool(slot) * slot)
        raise MemoryLimitError(
            f"{given} holds at most context={max(0, most)}, and {least} is the least for "
            f"context={context or PAGE}; give more, or a smaller context or kv_type"
        )
    left = cache_bytes - -(-wanted // PAGE) * page
    slots = max(LEAST_SLOTS, min(cache_bytes // 2, left) // slot) if slot else 0
    return CacheSize(wanted, (cache_bytes - slots * slot) // page, slots)


def _slots(sequences: int, budget: int, slot_nbytes: int) -> int:
    if not slot_nbytes:
        return 0
    return max(LEAST_SLOTS, min(SLOTS_PER_SEQUENCE * sequences, budget // 4 // slot_nbytes))


def usual(memory: Memory, context: int) -> int | None:
    """Bytes that prompts may take which nobody goes on from: a quarter of what is free.

    At least those of one context. None: as many as there are.
    """
    free = available_memory()
    least = -(-context // PAGE) * memory.page + SLOTS_PER_SEQUENCE * memory.state
    return None if free is None else max(least, (free - memory.weights) // 4)


def gib(nbytes: float) -> str:
    """Bytes as a person reads them."""
    return in_units(nbytes, 1024, ("bytes", "KiB", "MiB", "GiB"), (0, 1, 1, 2))
