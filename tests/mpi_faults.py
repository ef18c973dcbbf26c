"""Run by several processes, one of which has something the others have not.

mpi_faults.py FAULT MODEL
"""

from __future__ import annotations

import os
import sys

import runtime
from runtime import model as model_module
from runtime.backends.cpu import CpuBackend
from runtime.backends.meta.rank import Rank
from runtime.errors import BackendError
from runtime.gguf.reader import open_gguf
from runtime.model import demo_path


def no_room(*_: object) -> None:
    raise BackendError("there is no memory for the weights")


def fault(name: str) -> None:
    """Have it in this process."""
    if name == "file":
        model_module.open_gguf = lambda _: open_gguf(demo_path())  # type: ignore[assignment]
    elif name == "version":
        runtime.__version__ = "0.0.9"
    elif name == "memory":
        CpuBackend.load = no_room  # type: ignore[method-assign, assignment]
    elif name == "step":
        Rank.run = no_room  # type: ignore[method-assign, assignment]


if __name__ == "__main__":
    if os.environ["PMI_RANK"] == "2":
        fault(sys.argv[1])
    try:
        runtime.load(sys.argv[2], devices="tensor(mpi)", threads=1).eval([1, 2, 3])
    except runtime.Error as error:
        sys.exit(f"{type(error).__name__}: {error}")
