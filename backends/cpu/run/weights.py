"""Weights in the forms that kernels read, made on first use or mapped from a file that has them.

Packing runs on all threads, some MiB of the file at a time, so a model never lies in memory twice.
Nothing of it refers to the file afterwards.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Generator, Hashable, Iterable, Sequence
from contextlib import closing
from typing import Any

import numpy as np

from runtime.backends import forks
from runtime.backends.base import stored_tensor
from runtime.backends.cpu.compile.library import Library
from runtime.backends.cpu.run import forms
from runtime.backends.cpu.run.cores import pinned
from runtime.backends.cpu.run.pack_cache import PackCache, Packs
from runtime.backends.cpu.run.table import Table
from runtime.backends.cpu.tile.formats import tile_format
from runtime.backends.plan.kernel import Kernel
from runtime.backends.plan.plan import ALIGNMENT, Buffer
from runtime.backends.plan.stored import StoredRows


def aligned(nbytes: int, make: Callable[..., np.ndarray] = np.empty) -> np.ndarray:
    """uint8 [nbytes] starting at a cache line, uninitialised; make: `np.zeros` for zeros."""
    raw = make(nbytes + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + nbytes]


class WeightStore:
    """The weights of one model on this device, made on first use.

    packs: where those of `load` are kept for the next process, and mapped from.
    """

    def __init__(
        self, file: Any, library: Library, team: Any, packs: PackCache | None = None
    ) -> None:
        self._file, self._library, self._team, self._packs = file, library, team, packs
        self.cores = team.cores[0]  # they write it first, so that it lies on their NUMA node
        self._made: dict[Hashable, np.ndarray] = {}
        self._rows: dict[Hashable, np.ndarray] = {}  # "raw", of which steps look up few
        self._reading = forks.lock()  # of those
        self._slab = self._room = aligned(0)

    def address(self, buffer: Buffer) -> int:
        """Where a weight lies in the form its buffer asks for."""
        if buffer.memory == "raw":
            with self._reading:
                return self._address(self._rows, buffer)
        return self._address(self._made, buffer)

    def _address(self, made: dict[Hashable, np.ndarray], buffer: Buffer) -> int:
        if buffer.content not in made:
            with pinned(self.cores):
                made[buffer.content] = self._make(buffer)
        return made[buffer.content].ctypes.data

    def share_rows(self, other: WeightStore) -> None:
        """Rows to look up lie in memory once, for this device and the other."""
        self._rows, self._reading = other._rows, other._reading

    def nbytes(self) -> int:
        """Bytes of memory taken, mapped files included."""
        return sum(a.nbytes for made in (self._made, self._rows) for a in made.values())

    def stored_nbytes(self, buffers: Iterable[Buffer]) -> int:
        """Bytes of the file that `load` reads for these buffers."""
        return sum(map(_stored_nbytes, buffers))

    def load(self, buffers: Iterable[Buffer]) -> Generator[int]:
        """Make or map all; yields the file bytes finished after each tensor.

        Packed weights lie in one piece of memory, which the system then maps with large pages:
        reading them is a third faster than from many small pieces (measured).
        """
        have = {*self._made, *self._rows}
        wanted = [b for b in buffers if b.content not in have]
        if self._packs is not None and wanted:
            wanted = yield from self._mapped(self._file_of(self._packs, wanted), wanted)
        packed = [_nbytes(b) for b in wanted if b.memory == "repacked"]
        self._slab = aligned(sum(-(-n // ALIGNMENT) * ALIGNMENT for n in packed))
        self._room = _room()
        for buffer in wanted:
            self.address(buffer)
            yield _stored_nbytes(buffer)
        self._room = aligned(0)

    def _mapped(
        self, packs: Packs, wanted: Sequence[Buffer]
    ) -> Generator[int, None, list[Buffer]]:  # fmt: skip
        """Map them from a file, written first where there is none; what is still to be made.

        Where it cannot be written they are made again: what was yielded is taken back.
        """
        found, done = packs.read(), 0
        if found is None:
            with packs.turn():
                found = packs.read()  # another process had its turn before
                if found is None:
                    with closing(self._written(packs, wanted)) as work:
                        for nbytes in work:
                            done += nbytes
                            yield nbytes
                    found = packs.read()
        if found is None:
            yield -done
            return list(wanted)
        for buffer in wanted:
            made = self._rows if buffer.memory == "raw" else self._made
            made.setdefault(buffer.content, found[_name(buffer)])
        yield self.stored_nbytes(wanted) - done
        return []

    def _written(self, packs: Packs, wanted: Sequence[Buffer]) -> Generator[int]:
        """Make one after the other, and keep each in the file alone."""
        room, self._room = aligned(max(map(_nbytes, wanted))), _room()
        with packs.writing() as add:
            for buffer in wanted:
                with pinned(self.cores):
                    written = add(_name(buffer), self._make(buffer, room))
                if not written:
                    break
                yield _stored_nbytes(buffer)
        self._room = aligned(0)

    def _file_of(self, packs: PackCache, wanted: Sequence[Buffer]) -> Packs:
        """Where these are kept: they are made by code and kernels that `layout` stands for."""
        used = {tile_format(b.tensor.dtype) for b in wanted if b.memory == "repacked" and b.tensor}
        kernels = [Kernel.of("pack_weights", format=name) for name in sorted(used)]
        layout = self._library.sources(kernels, forms.__name__)
        return packs.of(self._library.target, layout, {_name(b): _nbytes(b) for b in wanted})

    def _make(self, buffer: Buffer, slab: np.ndarray | None = None) -> np.ndarray:
        """A weight in its form. slab: memory for packed ones in place of the store's own."""
        w = buffer.tensor
        assert w is not None, "a weight buffer has its tensor"
        stored = stored_tensor(self._file, w)
        if buffer.memory != "repacked":
            make = {"raw": forms.raw, "vector": forms.vector}[buffer.memory]
            return make(w, stored, self._room)
        # those in memory where an embedding is the output matrix as well
        known = None if "cut" in w.attrs else self._rows.get(("raw", w.content))
        take = self._take if slab is None else lambda nbytes: slab[:nbytes]
        return forms.repacked(w, StoredRows(w, stored, known), self._room, take, self._repack)

    def _take(self, nbytes: int) -> np.ndarray:
        """Memory from the slab, or of its own for a weight that comes later."""
        if nbytes > self._slab.nbytes:
            return aligned(nbytes)
        out = self._slab[:nbytes]
        self._slab = self._slab[-(-nbytes // ALIGNMENT) * ALIGNMENT :]
        return out

    def _repack(
        self, format: str, raw: np.ndarray, out: np.ndarray, shape: tuple[int, int], matrices: int,
        apart: int,
    ) -> None:  # fmt: skip
        """Pack matrices of one shape, rows raw [matrices * rows, bytes] that may lie apart; their
        tiles begin `apart` bytes from each other."""
        (rows, inner), stride = shape, raw.strides[0]
        kernel = Kernel.of("pack_weights", format=format)
        arguments = [
            raw.ctypes.data, out.ctypes.data, rows, inner, stride, matrices, rows * stride, apart,
        ]  # fmt: skip
        table = Table.single(self._library.address(kernel), arguments)
        self._team.run(*table.records())


def _room() -> np.ndarray:
    """uint8 [forms.PIECE] that the system has back when it is dropped, as a heap might not."""
    return np.frombuffer(mmap.mmap(-1, forms.PIECE), np.uint8)


def _stored_nbytes(buffer: Buffer) -> int:
    return buffer.tensor.nbytes if buffer.tensor is not None else 0


def _nbytes(buffer: Buffer) -> int:
    return forms.nbytes_of(buffer.memory, buffer.tensor) if buffer.tensor is not None else 0


def _name(buffer: Buffer) -> str:
    """What decides a form of a weight, as text."""
    return repr(buffer.content)
