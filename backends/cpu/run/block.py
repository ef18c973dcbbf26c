"""The control block of a team of threads, and in it the system's functions that kernels call."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import numpy as np

from runtime.backends.cpu.abi import CONTROL
from runtime.backends.cpu.run.cores import processors

_SPIN_NS = 200_000  # a worker waits this long for the next plan before it parks
_SPINS = 500  # turns in a barrier before a thread gives its processor away
_LINE = 64


def control_block(n_threads: int) -> np.ndarray:
    """A zeroed control block on a cache line's boundary, with the system's functions filled in."""
    n_words = CONTROL["threads"] + 8 * n_threads
    room = np.zeros(n_words + 8, np.int64)
    control = room[-room.ctypes.data % _LINE // 8 :][:n_words]
    words = _windows() if sys.platform == "win32" else _posix(control)
    # With more threads than processors, whoever waits is in the way of whoever works.
    spins = _SPINS if n_threads <= processors() else 16
    words |= {"self": control.ctypes.data, "spin_ns": _SPIN_NS, "spins": spins}
    for name, value in words.items():
        control[CONTROL[name]] = value
    return control


def _address(symbol: Any) -> int:
    return ctypes.cast(symbol, ctypes.c_void_p).value or 0


def _posix(control: np.ndarray) -> dict[str, int]:
    import time

    libc = ctypes.CDLL(None)
    names = ("mutex", "condition", "seconds")
    at = {name: control.ctypes.data + 8 * CONTROL[name] for name in names}
    libc.pthread_mutex_init(ctypes.c_void_p(at["mutex"]), None)
    libc.pthread_cond_init(ctypes.c_void_p(at["condition"]), None)
    return {
        "yield": _address(libc.sched_yield),
        "sleep": _address(libc.nanosleep),
        "sleep_for": at["seconds"],
        "nanoseconds": 20_000,
        "lock": _address(libc.pthread_mutex_lock),
        "unlock": _address(libc.pthread_mutex_unlock),
        "wait": _address(libc.pthread_cond_wait),
        "broadcast": _address(libc.pthread_cond_broadcast),
        "clock": _address(libc.clock_gettime),
        "clock_id": time.CLOCK_MONOTONIC,
        "clock_high": 1_000_000_000,
        "clock_low": 1,
    }


def _windows() -> dict[str, int]:
    # An SRWLOCK and a CONDITION_VARIABLE of zeros are initialised.
    kernel = ctypes.CDLL("kernel32")
    frequency = ctypes.c_int64()
    kernel.QueryPerformanceFrequency(ctypes.byref(frequency))
    return {
        "yield": _address(kernel.SwitchToThread),
        "sleep": _address(kernel.Sleep),
        "sleep_for": 1,  # millisecond
        "lock": _address(kernel.AcquireSRWLockExclusive),
        "unlock": _address(kernel.ReleaseSRWLockExclusive),
        "wait": _address(kernel.SleepConditionVariableSRW),
        "broadcast": _address(kernel.WakeAllConditionVariable),
        "clock": _address(kernel.QueryPerformanceCounter),
        "clock_id": -1,
        "clock_high": 1_000_000_000 // frequency.value,
        "clock_low": 0,
    }
