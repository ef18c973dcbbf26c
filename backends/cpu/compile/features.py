"""What this processor can do, by LLVM's names of the features.

x86 processors tell LLVM themselves. Arm ones tell the system alone, and LLVM reads it from texts
that name neither the dot product nor the matrix product (its map then is empty, or all false), so
the system is asked here: on Linux by the auxiliary vector, on macOS by sysctl, on Windows by
IsProcessorFeaturePresent. What cannot be asked counts as absent.

The `from_` functions are pure: tests give them answers of machines that are not here.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable
from typing import Any

Features = frozenset[str]

# Linux, arch/arm64/include/uapi/asm/hwcap.h; 16 and 26 are AT_HWCAP and AT_HWCAP2 of <elf.h>.
_LINUX = {"dotprod": (16, 20), "i8mm": (26, 13)}  # feature -> entry, bit
_MACOS = {"dotprod": "hw.optional.arm.FEAT_DotProd", "i8mm": "hw.optional.arm.FEAT_I8MM"}
_WINDOWS = {"dotprod": 43, "i8mm": 66}  # PF_ARM_V82_DP_..., PF_ARM_V82_I8MM_... of <winnt.h>
# macOS 11 has no such key, and every Arm processor in a Mac has the dot product.
_EVERY_MAC = frozenset({"dotprod"})


def host_features(arch: str) -> Features:
    """Features of this machine, whose architecture LLVM calls `arch`; empty if not known."""
    return _arm(sys.platform) if arch == "aarch64" else _from_llvm()


def from_linux(getauxval: Callable[[int], int] | None) -> Features:
    """By `getauxval`: the bits of an entry of the auxiliary vector, 0 where there is no such.

    None: the C library has no such function.
    """
    if getauxval is None:
        return frozenset()
    return frozenset(name for name, (entry, bit) in _LINUX.items() if getauxval(entry) >> bit & 1)


def from_macos(sysctl: Callable[[str], int | None]) -> Features:
    """By `sysctl`: the number under a key, None where there is no such key."""
    found = {name: sysctl(key) for name, key in _MACOS.items()}
    known = {name for name, value in found.items() if value}
    return frozenset(known | {name for name in _EVERY_MAC if found[name] is None})


def from_windows(present: Callable[[int], bool]) -> Features:
    """By `present`: whether the processor has the feature of a number (false if unknown)."""
    return frozenset(name for name, number in _WINDOWS.items() if present(number))


def _arm(platform: str) -> Features:
    if platform in ("linux", "android"):
        return from_linux(_getauxval())
    if platform == "darwin":
        return from_macos(_sysctl)
    if platform == "win32":
        return from_windows(_windows_feature)
    return frozenset()


@functools.cache
def _from_llvm() -> Features:
    import llvmlite.binding as llvm

    return frozenset(name for name, present in llvm.get_host_cpu_features().items() if present)


def _getauxval() -> Callable[[int], int] | None:
    function = _c_function("getauxval")
    if function is not None:
        function.restype, function.argtypes = ctypes.c_ulong, [ctypes.c_ulong]
    return function


def _sysctl(key: str) -> int | None:
    function = _c_function("sysctlbyname")
    value = ctypes.c_int64(0)  # keys have 4 or 8 bytes; Macs have the low ones first
    size = ctypes.c_size_t(ctypes.sizeof(value))
    place = ctypes.byref(value)
    if function is None or function(key.encode(), place, ctypes.byref(size), None, 0):
        return None
    return value.value


def _windows_feature(number: int) -> bool:
    library: Any = getattr(ctypes, "windll", None)
    return bool(library and library.kernel32.IsProcessorFeaturePresent(number))


def _c_function(name: str) -> Any:
    """A function of the process's C library; None if it has none of this name."""
    try:
        return getattr(ctypes.CDLL(None), name, None)
    except (OSError, TypeError):
        return None
