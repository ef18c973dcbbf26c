"""The instruction sets that kernels are compiled for, and which of them this processor has.

Kernels are compiled for a named instruction set, never for the host's own processor name: an
object made on one machine then runs on every machine whose `selected()` is the same, and the
width LLVM prefers does not change with the processor's name.
"""

from __future__ import annotations

import functools
import os
from typing import NamedTuple

from runtime.backends.cpu.compile.features import host_features
from runtime.ops.errors import BackendError

# A kernel for a larger set may read these of its features to choose instructions.
_VNNI = "+avx512vnni,-prefer-256-bit"
_AMX = _VNNI + ",+avx512bf16,+amx-tile,+amx-int8,+amx-bf16"


class Isa(NamedTuple):
    """One instruction set: its LLVM target and what a kernel emitter has to know of it."""

    name: str
    arch: str  # "x86_64", "aarch64", or "" for whatever the host is
    cpu: str
    features: str
    needs: frozenset[str]  # LLVM feature names the processor must have
    lanes: int  # float32 values of one vector register
    has_fma: bool = True
    has_f16: bool = True  # conversions between float16 and float32 are instructions

    @property
    def has_vnni(self) -> bool:
        """Whether vpdpbusd is there for 512-bit vectors."""
        return "avx512vnni" in self.needs

    @property
    def has_sdot(self) -> bool:
        """Whether Arm's dot product is there, which can take one word of a vector for all lanes."""
        return "dotprod" in self.needs

    @property
    def has_smmla(self) -> bool:
        """Whether Arm's product of 2 x 8 by 8 x 2 bytes is there."""
        return "i8mm" in self.needs


class Target(NamedTuple):
    """What LLVM is told: `triple` such as `x86_64-unknown-linux-gnu`, processor and features."""

    triple: str
    cpu: str
    features: str


_ARCHES = {"amd64": "x86_64", "x64": "x86_64", "arm64": "aarch64"}


def host_arch() -> str:
    """This process's architecture as LLVM spells it: `x86_64`, `aarch64` or another name."""
    if hasattr(os, "uname"):
        machine = os.uname().machine.lower()
    else:  # an Arm machine may be emulating this x86 Python: the build tells
        import sysconfig

        machine = sysconfig.get_platform().removeprefix("win-")
    return _ARCHES.get(machine, machine)


# x86-64-v3 and v4 are the published levels (AVX2 with FMA and F16C; AVX-512 F BW CD DQ VL).
_V3 = frozenset({"avx2", "fma", "f16c", "bmi2"})
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512vnni"}
_AMX_NEEDS = _V4 | {"avx512bf16", "amx-tile", "amx-int8", "amx-bf16"}

_DOT = frozenset({"dotprod"})
_MATRIX = _DOT | {"i8mm"}

# Armv8 has fused multiply-add and float16 conversions from the start; x86-64 has neither.
_BASE_IS_ARM = host_arch() == "aarch64"

_TABLE = {
    isa.name: isa
    for isa in (  # best first
        Isa("amx", "x86_64", "x86-64-v4", _AMX, _AMX_NEEDS, lanes=16),
        Isa("avx512vnni", "x86_64", "x86-64-v4", _VNNI, _V4, lanes=16),
        Isa("avx2", "x86_64", "x86-64-v3", "", _V3, lanes=8),
        Isa("arm_i8mm", "aarch64", "generic", "+neon,+dotprod,+i8mm", _MATRIX, lanes=4),
        Isa("arm_dotprod", "aarch64", "generic", "+neon,+dotprod", _DOT, lanes=4),
        Isa("generic", "", "", "", frozenset(), 4, has_fma=_BASE_IS_ARM, has_f16=_BASE_IS_ARM),
    )
}
NAMES = tuple(_TABLE)


def isa(name: str) -> Isa:
    """The instruction set called `name`. Raises BackendError listing the names there are."""
    try:
        return _TABLE[name]
    except KeyError:
        raise BackendError(
            f"unknown instruction set {name!r}: there are {', '.join(NAMES)}"
        ) from None


def target(name: str) -> Target:
    """The LLVM target of the instruction set `name`; the operating system is the host's.

    Raises BackendError for an unknown name.
    """
    chosen = isa(name)
    arch = chosen.arch or host_arch()
    cpu = chosen.cpu or ("x86-64" if arch == "x86_64" else "generic")
    return Target(_triple(arch), cpu, chosen.features)


@functools.cache
def available() -> tuple[str, ...]:
    """Names of the instruction sets this machine can run, best first; `generic` is the last."""
    return tuple(name for name, isa in _TABLE.items() if not _missing(isa))


def detect() -> str:
    """Name of the best instruction set of this machine."""
    return available()[0]


def selected() -> str:
    """Name of the instruction set to use: `RUNTIME_CPU_ISA` if set, else `detect()`.

    Raises BackendError when the one that was asked for cannot run here, with what is missing.
    """
    from runtime.backends.environment import cpu_isa

    forced = cpu_isa()
    if forced is not None and forced not in available():
        raise BackendError(
            f"RUNTIME_CPU_ISA={forced} cannot run on this processor: {_missing(isa(forced))}; "
            f"unset it, or give one of {', '.join(available())}"
        )
    return forced or detect()


def _missing(isa: Isa) -> str:
    """What this machine lacks to run `isa`, in words; empty if nothing."""
    if isa.arch and isa.arch != host_arch():
        return f"it needs {isa.arch}, and this is {host_arch()}"
    lacks = sorted(isa.needs - host_features(host_arch())) if isa.needs else ()
    if lacks:
        return f"it lacks {', '.join(lacks)}"
    if isa.name == "amx":
        from runtime.backends.cpu.compile.amx import request_amx

        return "" if request_amx() else "the system does not give this process AMX tiles"
    return ""


def _triple(arch: str) -> str:
    import llvmlite.binding as llvm

    own = llvm.get_process_triple()
    _, *rest = own.split("-")
    if host_arch() == arch:
        return own
    return "-".join([arch, *rest])
