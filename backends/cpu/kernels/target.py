"""The instruction set this process compiles for. Set once, before the kernels are imported."""

from __future__ import annotations

import os
import sys

from runtime.backends.cpu.compile import isa as isas
from runtime.ops.errors import BackendError

_chosen: list[isas.Isa] = []


def choose(name: str) -> None:
    """Compile for the instruction set called `name` from now on.

    BackendError: Numba was imported for, or `choose` was called with, another one.
    """
    goal = isas.target(name)
    if _chosen and _chosen[0].name == name:
        return
    if _chosen or ("numba" in sys.modules and os.environ.get("NUMBA_CPU_NAME") != goal.cpu):
        before = _chosen[0].name if _chosen else "the host"
        raise BackendError(f"this process compiles for {before}: use a fresh process for {name}")
    # Numba reads these when it is imported. Kernels are written in vectors, so its own
    # vectorising passes would only cost time.
    os.environ["NUMBA_CPU_NAME"] = goal.cpu
    os.environ["NUMBA_CPU_FEATURES"] = goal.features
    os.environ["NUMBA_LOOP_VECTORIZE"] = "0"
    os.environ["NUMBA_SLP_VECTORIZE"] = "0"
    _chosen.append(isas.isa(name))


def chosen() -> isas.Isa:
    """The instruction set that was chosen."""
    if not _chosen:
        raise BackendError("choose an instruction set before the CPU kernels are imported")
    return _chosen[0]
