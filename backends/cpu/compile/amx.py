"""Asking the system for the matrix registers (AMX), which Linux gives to a process on request."""

from __future__ import annotations

import ctypes
import functools
import os
import sys

# Linux, arch/x86/include/uapi/asm/prctl.h and the x86-64 system call table.
_SYS_ARCH_PRCTL = 158
_REQUEST_PERMISSION = 0x1023
_TILE_DATA = 18


@functools.cache
def request_amx() -> bool:
    """Whether this process may use AMX tiles from now on, in every thread; asked for once."""
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        return False
    try:
        syscall = ctypes.CDLL(None, use_errno=True).syscall
    except (OSError, AttributeError):
        return False
    return syscall(_SYS_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA) == 0
