"""What tells two model files apart without reading them whole, and two versions of the code."""

from __future__ import annotations

import functools
import hashlib
import sys
from pathlib import Path
from typing import Any

import numpy as np

_SAMPLE, _SAMPLES = 64 << 10, 256  # bytes of weights that are looked at at a place, and places


def sampled(file: Any) -> str:
    """A digest of an open file's metadata keys, its table of tensors, and a sample of weights.

    64 KiB where a tensor begins, at 256 places spread over the file, and at its end, which is all
    of a file of less than 16 MiB.
    """
    found = hashlib.sha256(repr(sorted(file.metadata, key=str)).encode())
    step = max(_SAMPLE, file.tensors_nbytes // _SAMPLES)
    last = next(reversed(file.tensors), None)
    for tensor in file.tensors.values():
        found.update(f"{tensor.name} {tensor.shape} {tensor.dtype.name}".encode())
        block = tensor.dtype.nbytes
        size = min(_SAMPLE // block * block, tensor.nbytes)
        ends = [tensor.nbytes - size] if tensor.name == last else []
        for start in (*range(0, tensor.nbytes, step // block * block), *ends):
            room = np.empty(min(size, tensor.nbytes - start), np.uint8)
            found.update(tensor.read(start, room))
    return found.hexdigest()


@functools.cache
def code() -> str:
    """A digest of the source that decides what numbers a graph gives: of ops and backends."""
    found = hashlib.sha256()
    for package in ("runtime.ops", "runtime.backends"):
        for folder in map(Path, sys.modules[package].__path__):
            for path in sorted(folder.rglob("*.py")):
                found.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return found.hexdigest()[:12]
