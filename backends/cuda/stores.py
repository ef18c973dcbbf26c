"""Weights, constants and state of one model in a GPU's memory, made on first use."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from runtime.backends.base import stored_tensor
from runtime.backends.cuda.arena import Arena, Buffer
from runtime.backends.cuda.driver import ALIGNMENT
from runtime.backends.cuda.launcher import Device, Stream
from runtime.backends.cuda.layouts import pack, packed_nbytes, packed_type, turns_of
from runtime.backends.cuda.pages import from_plain, page_nbytes, to_plain
from runtime.backends.cuda.uploads import PIECE, Read, Uploads
from runtime.backends.cuda.wiring import is_copy, wiring
from runtime.backends.plan import plan
from runtime.backends.plan.stored import StoredRows
from runtime.ops.quants import dequantize
from runtime.ops.tensor import Tensor

_THREADS = 16  # of the host, at most
_GRAIN = 4096  # bytes
_PART = 1 << 20  # values widened at a time


class Store:
    """What all programs of a model share on one device.

    host_packing: pack weights by numpy, which a GPU does a hundred times as fast.
    """

    def __init__(
        self, device: Device, stream: Stream, file: Any, host_packing: bool = False
    ) -> None:
        self.device, self._stream, self._file = device, stream, file
        self._host_packing = host_packing
        self._made: dict[Hashable, Buffer] = {}
        self._arenas: list[Arena] = []
        self._room: Arena | None = None  # of `load`: weights lie in it one after another

    def place(self, buffer: plan.Buffer) -> Buffer:
        """Where a weight, a constant or a state leaf lies. MemoryLimitError: there is no room."""
        if buffer.content not in self._made:
            assert buffer.tensor is not None, "what is fixed is a tensor"
            if buffer.memory == "state":
                self._made[buffer.content] = self._state(buffer.tensor)
            else:
                most = max(made_nbytes(buffer), buffer.tensor.nbytes, 1)
                with self._uploads(most) as uploads:
                    list(self._make(buffer, uploads))
        return self._made[buffer.content]

    def load(self, buffers: Iterable[plan.Buffer]) -> Iterator[int]:
        """Make all; yields the file bytes finished after some MiB."""
        wanted = [b for b in buffers if b.content not in self._made]
        if not wanted:
            return
        nbytes = sum(-(-max(made_nbytes(b), 1) // ALIGNMENT) * ALIGNMENT for b in wanted)
        self._room = self._arena(nbytes, "weights")
        with self._uploads() as uploads:
            for buffer in wanted:
                yield from self._make(buffer, uploads)
        self._room = None

    def state(self, leaf: Tensor) -> Buffer:
        """Pages or slots of a state leaf."""
        return self.place(plan.Buffer("state", leaf.name, leaf.nbytes, tensor=leaf))

    def copy(self, leaf: Tensor, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy pages or slots of a leaf, in the stream's order."""
        at, size = self.state(leaf).address, page_nbytes(leaf)
        driver = self.device.driver
        for source, target in zip(sources, targets, strict=True):
            places = at + int(target) * size, at + int(source) * size
            driver.copy(*places, size, self._stream.handle)

    def read(self, leaf: Tensor, rows: Sequence[int]) -> np.ndarray:
        """See `Backend.read_state`."""
        found = self.raw(leaf, rows)
        if leaf.attrs["storage"] == "slots":
            return found.view(np.float32).reshape(len(rows), *map(int, leaf.shape[1:]))
        return to_plain(found, leaf)

    def raw(self, leaf: Tensor, rows: Sequence[int]) -> np.ndarray:
        """uint8 [rows, bytes]: pages or slots as they lie."""
        buffer, size = self.state(leaf), page_nbytes(leaf)
        found = np.empty((len(rows), size), np.uint8)
        if isinstance(rows, range) and rows == range(int(leaf.shape[0])):
            return buffer.read(found, self._stream)
        for row, out in zip(rows, found, strict=True):
            buffer.view(int(row) * size, size).read(out, self._stream)
        return found

    def write(self, leaf: Tensor, rows: Sequence[int], values: np.ndarray) -> None:
        """The inverse of `read`."""
        if leaf.attrs["storage"] == "slots":
            raw = np.ascontiguousarray(values, np.float32).reshape(len(rows), -1).view(np.uint8)
        else:
            raw = from_plain(values, leaf)
        buffer, size = self.state(leaf), page_nbytes(leaf)
        for row, page in zip(rows, raw, strict=True):
            buffer.view(int(row) * size, size).write(page, self._stream)
        self._stream.synchronize()

    def close(self) -> None:
        """Give all memory back."""
        self._made.clear()
        for arena in self._arenas:
            arena.close()

    def _arena(self, nbytes: int, name: str) -> Arena:
        self._arenas.append(self.device.arena(nbytes, name))
        return self._arenas[-1]

    def _state(self, leaf: Tensor) -> Buffer:
        nbytes = int(leaf.shape[0]) * page_nbytes(leaf)
        buffer = self._arena(nbytes, leaf.name).take(nbytes)
        buffer.fill(0, self._stream)
        return buffer

    def _uploads(self, most: int | None = None) -> Uploads:
        return Uploads(self.device, self._stream, PIECE if most is None else min(PIECE, most))

    def _make(self, buffer: plan.Buffer, uploads: Uploads) -> Iterator[int]:
        """One weight or constant; yields the bytes of the file that are done."""
        w, nbytes = buffer.tensor, max(made_nbytes(buffer), 1)
        assert w is not None, "what is fixed is a tensor"
        out = (self._room or self._arena(nbytes, "a weight")).take(nbytes)
        if buffer.memory == "repacked" and self._gpu_packs(w):
            format, inner = packed_type(w.dtype), int(w.shape[-1])
            table = None if is_copy(format, inner) else wiring(format, inner)
            stored = StoredRows(w, stored_tensor(self._file, w))
            yield from uploads.rows(stored.read, _stored_shape(w), out, table)
        else:
            made = np.ascontiguousarray(_MAKERS[buffer.memory](self, w)).reshape(-1).view(np.uint8)
            whole, sent, shape = stored_nbytes(buffer), 0, _pieces(made.nbytes)
            for part in uploads.rows(_rows_of(made), shape, out):
                before, sent = sent, sent + part
                yield whole * sent // made.nbytes - whole * before // made.nbytes
        self._made[buffer.content] = out

    def _gpu_packs(self, w: Tensor) -> bool:
        """Whether it packs a weight, or copies it as it is; else the host does."""
        format, inner = packed_type(w.dtype), int(w.shape[-1])
        if self._host_packing or format != w.dtype.name.upper():
            return False
        return is_copy(format, inner) or wiring(format, inner) is not None

    def _raw(self, w: Tensor) -> np.ndarray:
        tensor = stored_tensor(self._file, w)
        if "cut" in w.attrs:
            rows = StoredRows(w, tensor).read(0, math.prod(w.shape[:-1]), np.empty(0, np.uint8))
            return np.ascontiguousarray(rows).reshape(-1)
        return np.ascontiguousarray(tensor.data).view(np.uint8).reshape(-1)

    def _vector(self, w: Tensor) -> np.ndarray:
        return widened(self._raw(w).reshape(_stored_shape(w)), w)

    def _turns(self, w: Tensor) -> np.ndarray:
        return turns_of(self._constant(w) if w.op == "constant" else self._vector(w))

    def _repacked(self, w: Tensor) -> np.ndarray:
        format, (rows, inner) = packed_type(w.dtype), (int(w.shape[-2]), int(w.shape[-1]))
        raw = self._raw(w)
        if format != w.dtype.name.upper():
            raw = widened(raw.reshape(_stored_shape(w)), w).reshape(-1).view(np.uint8)
        if is_copy(format, inner):
            return raw
        matrices = raw.reshape(math.prod(w.shape[:-2]), -1)
        return np.concatenate([pack(matrix, format, rows, inner) for matrix in matrices])

    def _constant(self, w: Tensor) -> np.ndarray:
        return np.ascontiguousarray(w.attrs["value"])


_MAKERS: dict[str, Callable[[Store, Tensor], np.ndarray]] = {
    "raw": Store._raw,
    "vector": Store._vector,
    "turns": Store._turns,
    "repacked": Store._repacked,
    "constant": Store._constant,
}


def widened(raw: np.ndarray, w: Tensor) -> np.ndarray:
    """float32 of a weight's shape from its rows uint8 [rows, bytes], by several threads."""
    out = np.empty((len(raw), int(w.shape[-1])), np.float32)
    step = max(1, _PART // out.shape[1])

    def widen(first: int) -> None:
        part = raw[first : first + step]
        out[first : first + step] = dequantize(part, w.dtype, (len(part), out.shape[1]))

    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        list(pool.map(widen, range(0, len(raw), step)))
    return out.reshape([int(n) for n in w.shape])


def _stored_shape(w: Tensor) -> tuple[int, int]:
    """(rows, bytes of one) of a weight in the file."""
    rows = math.prod(map(int, w.shape[:-1]))
    return rows, w.nbytes // max(rows, 1)


def _pieces(nbytes: int) -> tuple[int, int]:
    """Bytes as rows of one shape that uploads can cut."""
    size = math.gcd(nbytes, min(_GRAIN, PIECE))
    return nbytes // size, size


def _rows_of(made: np.ndarray) -> Read:
    """Rows of a host array of bytes, for `Uploads.rows`."""

    def read(first: int, count: int, room: np.ndarray) -> np.ndarray:
        size = len(room) // count
        return made[first * size : (first + count) * size].reshape(count, size)

    return read


def stored_nbytes(buffer: plan.Buffer) -> int:
    """Bytes of the file that a weight is made from."""
    return buffer.tensor.nbytes if buffer.tensor is not None else 0


def made_nbytes(buffer: plan.Buffer) -> int:
    """Bytes of a weight in its form."""
    w = buffer.tensor
    assert w is not None, "a weight buffer has its tensor"
    if buffer.memory == "repacked":
        each = packed_nbytes(packed_type(w.dtype), int(w.shape[-2]), int(w.shape[-1]))
        return math.prod(map(int, w.shape[:-2])) * each
    if buffer.memory == "constant":
        return w.attrs["value"].nbytes
    return {"raw": w.nbytes, "vector": 4 * w.size, "turns": 8 * w.size}[buffer.memory]
