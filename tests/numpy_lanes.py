"""What the intrinsics mean for all threads of some blocks at once; see numpy_grid.py.

A value is a number that all threads have, or an array of one for each: int64, float32 or bool.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from runtime.backends.cuda.intrinsic import WIDTH, Intrinsic
from runtime.ops.errors import BackendError

_DTYPES = {name: np.dtype(f"{name[0]}{nbytes}") for name, nbytes in WIDTH.items()}
_WORD = 0xFFFFFFFF


class Run:
    """The threads under way: some blocks of a grid; `mask`: who is in the branch, None: all."""

    def __init__(self, threads: int, dynamic_nbytes: int) -> None:
        self.threads, self._dynamic_nbytes = threads, dynamic_nbytes
        self.mask: Any = None

    def begin(self, grid: tuple[int, int, int], first: int, count: int) -> None:
        """Blocks `first` on, in the order of the grid."""
        self.grid = grid
        blocks = np.repeat(np.arange(first, first + count), self.threads)
        self.blocks, self.mask = count, None
        self.block = blocks - first
        self.thread = np.tile(np.arange(self.threads), count)
        x, y, _ = self.grid
        self.index = blocks % x, blocks // x % y, blocks // (x * y)
        self.shared: dict[int, np.ndarray] = {}
        self.dynamic = np.full((count, self._dynamic_nbytes), 0xCD, np.uint8)

    def active(self, value: Any) -> Any:
        """Of an array the elements of the threads in the branch."""
        return value if self.mask is None or np.ndim(value) == 0 else value[self.mask]

    def whole(self, value: Any, dtype: Any = None) -> np.ndarray:
        """One element for each thread."""
        array = np.asarray(value, dtype)
        return array if array.ndim else np.broadcast_to(array, self.thread.shape)


def truth(test: Any) -> Any:
    """bool, or an array of them."""
    return test != 0 if isinstance(test, np.ndarray) else bool(test)


def select(mask: Any, new: Any, old: Any) -> Any:
    """new where the mask is set."""
    if mask is None or new is old:
        return new
    if isinstance(new, tuple):
        return tuple(select(mask, a, b) for a, b in zip(new, old, strict=True))
    if old is None or isinstance(new, Shared | Registers | Pointer | Picked):
        return new
    return np.where(mask, new, old)


def minimum_of(choose: Callable) -> Callable:
    """`min` or `max`."""

    def chosen(a: Any, b: Any) -> Any:
        found = choose(a, b)
        return int(found) if isinstance(a, int) and isinstance(b, int) else found

    return chosen


def _widened(array: np.ndarray) -> np.ndarray:
    return array if array.dtype == np.float32 else array.astype(np.int64)


def _stored(value: Any, dtype: np.dtype) -> np.ndarray:
    array = np.asarray(value)
    if dtype.kind == "f":
        return array.astype(dtype, copy=False)
    return array.astype(np.int64, copy=False).astype(dtype)


class Pointer:
    """A kernel's array in global memory."""

    def __init__(self, array: np.ndarray, kind: str, run: Run) -> None:
        self._raw = array.reshape(-1).view(np.uint8)
        self.kind, self._run, self._writable = kind, run, array.flags.writeable
        self._views: dict[int, np.ndarray] = {}

    def read(self, index: Any, count: int) -> tuple[Any, ...]:
        """`count` elements at `index` x `count` of each thread."""
        rows = self._rows(count)
        found = rows.take(self._checked(index, len(rows)), 0)
        return tuple(_widened(found[..., n]) for n in range(count))

    def write(self, index: Any, values: tuple[Any, ...]) -> None:
        """The inverse of `read`, by the threads in the branch."""
        assert self._writable, "an array that is only read is written"
        run, rows = self._run, self._rows(len(values))
        at = run.active(run.whole(self._checked(index, len(rows))))
        for n, value in enumerate(values):
            rows[at, n] = run.active(run.whole(_stored(value, rows.dtype)))

    def pieces(self, index: Any) -> np.ndarray:
        """uint8 [threads, 16]."""
        rows = self._raw[: len(self._raw) // 16 * 16].reshape(-1, 16)
        return rows[self._run.whole(self._checked(index, len(rows)))]

    def _rows(self, count: int) -> np.ndarray:
        if count not in self._views:
            size = WIDTH[self.kind] * count
            rows = self._raw[: len(self._raw) // size * size].view(_DTYPES[self.kind])
            self._views[count] = rows.reshape(-1, count)
        return self._views[count]

    def _checked(self, index: Any, count: int) -> Any:
        run = self._run
        at = run.whole(index, np.int64)
        at = at if run.mask is None else np.where(run.mask, at, 0)
        if at.view(np.uint64).max() >= count:  # below zero, too
            bad = run.whole((at < 0) | (at >= count)) & (True if run.mask is None else run.mask)
            for who in np.flatnonzero(bad)[:1]:
                block = tuple(int(i[who]) for i in run.index)
                raise BackendError(
                    f"thread {run.thread[who]} of block {block} touches {self.kind} at "
                    f"{int(at[who])} of {count}"
                )
        return at


class Picked:
    """For each thread one of several pointers."""

    def __init__(self, run: Run, which: Any, pointers: tuple[Pointer, ...]) -> None:
        self._run, self._which, self._pointers = run, run.whole(which), pointers

    def read(self, index: Any, count: int) -> tuple[Any, ...]:
        """As `Pointer.read`."""
        found: Any = None
        for mine, pointer in self._each():
            read = pointer.read(index, count)
            found = read if found is None else select(mine, read, found)
        return found

    def write(self, index: Any, values: tuple[Any, ...]) -> None:
        """As `Pointer.write`."""
        for _, pointer in self._each():
            pointer.write(index, values)

    def _each(self) -> Iterator[tuple[np.ndarray, Pointer]]:
        saved = self._run.mask
        for n, pointer in enumerate(self._pointers):
            mine = self._which == n
            self._run.mask = mine if saved is None else saved & mine
            if self._run.mask.any():
                yield mine, pointer
        self._run.mask = saved


def _pick(run: Run, intrinsic: Intrinsic, which: Any, *pointers: Pointer) -> Any:
    return Picked(run, which, pointers) if np.ndim(which) else pointers[int(which)]


class Shared:
    """An array in the shared memory of every block."""

    def __init__(self, raw: np.ndarray, kind: str, run: Run) -> None:
        self.raw, self._run = raw, run
        self._values = raw.view(_DTYPES[kind])

    def __getitem__(self, index: Any) -> Any:
        return self.read(index, 1)[0]

    def put(self, index: Any, value: Any, mask: Any) -> None:
        """a[index] = value."""
        self.write(index, (value,))

    def read(self, index: Any, count: int) -> tuple[Any, ...]:
        """`count` elements at `index` x `count`."""
        rows = self._values.reshape(len(self.raw), -1, count)
        at = self._run.whole(index)
        if self._run.mask is not None:
            at = np.where(self._run.mask, at, 0)
        found = rows[self._run.block, at]
        return tuple(_widened(found[..., n]) for n in range(count))

    def write(self, index: Any, values: tuple[Any, ...]) -> None:
        """By the threads in the branch."""
        run, rows = self._run, self._values.reshape(len(self.raw), -1, len(values))
        block, at = run.active(run.block), run.active(run.whole(index))
        for n, value in enumerate(values):
            rows[block, at, n] = run.active(run.whole(_stored(value, rows.dtype)))

    def pieces(self, index: Any) -> np.ndarray:
        """uint8 [threads, 16]."""
        rows = self.raw.reshape(len(self.raw), -1, 16)
        return rows[self._run.block, self._run.whole(index)]

    def put_pieces(self, index: Any, values: np.ndarray) -> None:
        """The inverse of `pieces`."""
        run, rows = self._run, self.raw.reshape(len(self.raw), -1, 16)
        rows[run.active(run.block), run.active(run.whole(index))] = run.active(values)


class Registers:
    """A small array of every thread."""

    def __init__(self, count: int, run: Run) -> None:
        self._values: list[Any] = [None] * count
        self._run = run

    def __getitem__(self, index: Any) -> Any:
        value = self._values[self._place(index)]
        assert value is not None, "a register is read that was never set"
        return value

    def put(self, index: Any, value: Any, mask: Any) -> None:
        """a[index] = value."""
        at = self._place(index)
        self._values[at] = select(mask, value, self._values[at])

    def _place(self, index: Any) -> int:
        """The index, which all threads in the branch have in common."""
        if isinstance(index, np.ndarray):
            wanted = self._run.active(index)
            assert (wanted == wanted[0]).all(), "which register is known when it is compiled"
            index = wanted[0]
        return int(index)


def _whole(x: np.ndarray) -> np.ndarray:
    return x.astype(np.int64, copy=False)


def u32(x: Any) -> Any:
    """The low 32 bits, unsigned."""
    return _whole(x) & _WORD if isinstance(x, np.ndarray) else int(x) & _WORD


def i32(x: Any) -> Any:
    """The low 32 bits, signed."""
    if isinstance(x, np.ndarray) and x.ndim:
        return _whole(x).astype(np.int32).astype(np.int64)
    return (u32(x) ^ 0x80000000) - 0x80000000


def f32(x: Any) -> Any:
    """Rounded to nearest even."""
    return x.astype(np.float32, copy=False) if isinstance(x, np.ndarray) else np.float32(x)


def _bits(x: Any) -> Any:
    """A float's word."""
    return np.asarray(x, np.float32).view(np.uint32).astype(np.int64)[()]


def _float_of(word: Any) -> Any:
    return np.asarray(word, np.int64).astype(np.uint32).view(np.float32)[()]


def _half(word: Any) -> Any:
    halves = np.asarray(word, np.int64).astype(np.uint16).view(np.float16)
    return halves.astype(np.float32)[()]


def _to_half(x: Any) -> Any:
    return np.asarray(x).astype(np.float16).view(np.uint16).astype(np.int64)[()]


def _bf16(x: Any) -> Any:
    bits = _bits(x)
    return np.where(x != x, 0x7FFF, (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 & 0xFFFF)[()]


def _fma(a: Any, b: Any, c: Any) -> Any:
    exact = np.multiply(a, b, dtype=np.float64)
    return np.add(exact, c, dtype=np.float64).astype(np.float32)


def _fma_pair(a: Any, b: Any, c: Any) -> Any:
    halves = [[_float_of(u32(w) << 16), _float_of(u32(w) & 0xFFFF0000)] for w in (a, b, c)]
    low, high = (_bf16(_fma(*(pair[n] for pair in halves))) for n in range(2))
    return low | high << 16


def _bytes_of(word: Any, signed: bool = False) -> np.ndarray:
    """[..., 4], the lowest first."""
    words = np.asarray(word, np.int64).astype(np.uint32)[..., None]
    return words.view(np.int8 if signed else np.uint8)


def _prmt(a: Any, b: Any, selector: Any) -> Any:
    given = np.concatenate(np.broadcast_arrays(_bytes_of(a), _bytes_of(b)), -1)
    nibbles = np.asarray(selector)[..., None] >> 4 * np.arange(4)
    if nibbles.ndim == 1:
        found = given[..., nibbles & 7]
    else:
        given = np.broadcast_to(given, (len(nibbles), 8))
        found = np.take_along_axis(given, nibbles & 7, 1)
    if (nibbles & 8).any():
        found = np.where(nibbles & 8, np.where(found & 0x80, 0xFF, 0).astype(np.uint8), found)
    words = np.ascontiguousarray(found).view(np.uint32)[..., 0].astype(np.int64)
    return words if words.ndim else int(words)


def _byte(word: Any, n: int) -> Any:
    value = u32(word) >> 8 * n & 0xFF
    return (value ^ 0x80) - 0x80


def _dp4a(signed: bool) -> Callable:
    def dot(a: Any, b: Any, c: Any) -> Any:
        products = np.multiply(_bytes_of(a, signed), _bytes_of(b, True), dtype=np.int32)
        first, second, third, fourth = (products[..., n] for n in range(4))
        return i32(c + (first + second + third + fourth))

    return dot


def _dp2a(a: Any, b: Any, c: Any) -> Any:
    first = ((u32(a) & 0xFFFF) ^ 0x8000) - 0x8000
    return i32(first * _byte(b, 0) + (i32(a) >> 16) * _byte(b, 1) + c)


def _of_warp(run: Run, value: Any) -> np.ndarray:
    """[warps, 32]."""
    return run.whole(value).reshape(-1, 32)


def _shuffle(source: Callable[[Any, Any], Any]) -> Callable:
    def shuffle(run: Run, intrinsic: Intrinsic, value: Any, n: Any) -> Any:
        lane = np.arange(32)
        at = source(lane, _of_warp(run, n) if isinstance(n, np.ndarray) else int(n))
        at = np.where((at < 0) | (at > 31), lane, at)
        return np.take_along_axis(
            _of_warp(run, value), np.broadcast_to(at, _of_warp(run, value).shape), 1
        ).reshape(-1)

    return shuffle


def _vote(reduce: Callable[[np.ndarray], np.ndarray]) -> Callable:
    def vote(run: Run, intrinsic: Intrinsic, value: Any) -> Any:
        found = truth(_of_warp(run, value))
        if run.mask is not None:
            found = found & _of_warp(run, run.mask)
        return np.repeat(reduce(found).astype(np.int64), 32)

    return vote


def _ldmatrix(count: int, transposed: bool) -> Callable:
    def ldmatrix(run: Run, intrinsic: Intrinsic, array: Shared, piece: Any) -> tuple[Any, ...]:
        at = run.whole(piece)
        at = at if run.mask is None else np.where(run.mask, at, 0)
        rows = array.pieces(at).reshape(-1, 32, 16)
        found = []
        for m in range(count):
            halves = np.ascontiguousarray(rows[:, 8 * m : 8 * m + 8]).view(np.uint16)
            halves = halves.swapaxes(1, 2) if transposed else halves
            words = np.ascontiguousarray(halves).view(np.uint32)  # [warps, 8, 4]
            found.append(words.reshape(-1).astype(np.int64))
        return tuple(found)

    return ldmatrix


def _mma(unpack: Callable[[np.ndarray], np.ndarray], floats: bool) -> Callable:
    kind = np.float64  # see meanings.py; integers are exact in it

    def mma(run: Run, intrinsic: Intrinsic, *v: Any) -> tuple[Any, ...]:
        words = [
            unpack(_of_warp(run, n)).reshape(-1, 8, 4, unpack(np.zeros(1)).size) for n in v[:6]
        ]
        words = [w.reshape(len(w), 8, -1).astype(kind) for w in words]
        low, high = np.concatenate([words[0], words[2]], 2), np.concatenate([words[1], words[3]], 2)
        a, b = np.concatenate([low, high], 1), np.concatenate(words[4:], 2).swapaxes(1, 2)
        c = np.zeros((len(a), 16, 8), kind)
        for r in range(4):
            rows = slice(8 * (r >> 1), 8 * (r >> 1) + 8)
            c[:, rows, r & 1 :: 2] = _of_warp(run, v[6 + r]).reshape(-1, 8, 4)
        d = a @ b + c
        found = [d[:, 8 * (r >> 1) : 8 * (r >> 1) + 8, r & 1 :: 2].reshape(-1) for r in range(4)]
        return tuple(map(f32 if floats else i32, found))

    return mma


def _signed_bytes(words: np.ndarray) -> np.ndarray:
    return words.astype(np.int64).astype(np.uint32).view(np.int8).reshape(*words.shape, 4)


def _halves(words: np.ndarray) -> np.ndarray:
    return words.astype(np.int64).astype(np.uint32).view(np.float16).reshape(*words.shape, 2)


def _brain(words: np.ndarray) -> np.ndarray:
    halves = words.astype(np.int64).astype(np.uint32).view(np.uint16).astype(np.uint32) << 16
    return halves.view(np.float32).reshape(*words.shape, 2)


def _copy_async(
    run: Run,
    intrinsic: Intrinsic,
    target: Shared,
    piece: Any,
    source: Pointer,
    at: Any,
    nbytes: Any,
) -> None:
    wanted = run.whole(nbytes)
    found = source.pieces(np.where(wanted > 0, run.whole(at), 0)).copy()
    found[np.arange(16) >= wanted[:, None]] = 0
    target.put_pieces(piece, found)


def _shared(run: Run, intrinsic: Intrinsic) -> Shared:
    kind, count, _ = intrinsic.parameters
    if id(intrinsic) not in run.shared:
        raw = np.full((run.blocks, -(-count * WIDTH[kind] // 16) * 16), 0xCD, np.uint8)
        run.shared[id(intrinsic)] = raw
    return Shared(run.shared[id(intrinsic)], kind, run)


def _atomic_add(run: Run, intrinsic: Intrinsic, pointer: Pointer, index: Any, value: Any) -> Any:
    """Threads of the branch, one after another."""
    old, saved = np.zeros(run.thread.shape, np.int64), run.mask
    at, added = run.whole(index), run.whole(value)
    for thread in np.flatnonzero(np.ones_like(old) if saved is None else saved):
        run.mask = np.arange(len(old)) == thread
        old[thread] = pointer.read(at, 1)[0][thread]
        pointer.write(at, (u32(old + added),))
    run.mask = saved
    return old


def _nothing(run: Run, intrinsic: Intrinsic, *arguments: Any) -> None:
    """All threads are in step."""


# Of the arguments alone.
PLAIN: dict[str, Callable[..., Any]] = {
    "u32": u32,
    "i32": i32,
    "f32": f32,
    "int_to_f32": f32,
    "round_i32": lambda x: i32(np.rint(f32(x))),
    "bits_to_f32": _float_of,
    "f32_to_bits": _bits,
    "f16_to_f32": _half,
    "f32_to_f16": _to_half,
    "f16_low": _half,
    "f16_high": lambda word: _half(u32(word) >> 16),
    "pack_f16": lambda a, b: _to_half(a) | _to_half(b) << 16,
    "pack_bf16": lambda a, b: _bf16(a) | _bf16(b) << 16,
    "fma": _fma,
    "multiply": lambda a, b: f32(a) * f32(b),
    "fma_bf16x2": _fma_pair,
    "fmax": np.fmax,
    "fmin": np.fmin,
    "fabs": np.abs,
    "exp2": lambda x: np.exp2(f32(x)),
    "rcp": lambda x: np.float32(1) / f32(x),
    "rsqrt": lambda x: np.float32(1) / np.sqrt(f32(x)),
    "divide": lambda a, b: f32(a) / f32(b),
    "floor": np.floor,
    "shift_right": lambda x, n: i32(x) >> n,
    "prmt": _prmt,
    "dp4a": _dp4a(True),
    "dp4a_us": _dp4a(False),
    "dp2a": _dp2a,
}

MEANINGS: dict[str, Callable[..., Any]] = {
    "thread_x": lambda run, _: run.thread,
    "block_x": lambda run, _: run.index[0],
    "block_y": lambda run, _: run.index[1],
    "block_z": lambda run, _: run.index[2],
    "grid_x": lambda run, _: run.grid[0],
    "grid_y": lambda run, _: run.grid[1],
    **{
        f"{name}{n}": (lambda run, _, p, i, n=n or 1: p.read(i, n) if n > 1 else p.read(i, 1)[0])
        for name in ("load", "constant", "stream", "shared_load")
        for n in ("", 2, 4)
    },
    **{
        f"{name}_pair": lambda run, _, p, i: (*p.read(i, 4), *p.read(u32(i + 1), 4))
        for name in ("load", "constant")
    },
    **{
        f"{name}{n}": lambda run, _, p, i, *values: p.write(i, values)
        for name in ("store", "shared_store")
        for n in ("", 2, 4)
    },
    "pick": _pick,
    "copy_async16": _copy_async,
    "copy_commit": _nothing,
    **{f"copy_wait{n}": _nothing for n in range(3)},
    "ldmatrix_x4": _ldmatrix(4, False),
    "ldmatrix_x2": _ldmatrix(2, False),
    "ldmatrix_x4_trans": _ldmatrix(4, True),
    "mma_s8": _mma(_signed_bytes, False),
    "mma_s8_half": lambda run, op, a, b, w, *c: _mma(_signed_bytes, False)(
        run, op, a, b, 0, 0, w, 0, *c
    ),
    "mma_f16": _mma(_halves, True),
    "mma_bf16": _mma(_brain, True),
    "shuffle_xor": _shuffle(lambda lane, n: lane ^ n),
    "shuffle_xor_u32": _shuffle(lambda lane, n: lane ^ n),
    "shuffle_index": _shuffle(lambda lane, n: lane * 0 + (n & 31)),
    "shuffle_index_u32": _shuffle(lambda lane, n: lane * 0 + (n & 31)),
    "shuffle_down": _shuffle(lambda lane, n: lane + n),
    "shuffle_up": _shuffle(lambda lane, n: lane - n),
    "vote_any": _vote(lambda found: found.any(1)),
    "vote_all": _vote(lambda found: found.all(1)),
    "ballot": _vote(lambda found: (found << np.arange(32)).sum(1)),
    "warp_sum_i32": lambda run, _, v: np.repeat(i32(_of_warp(run, v).sum(1)), 32),
    "warp_max_i32": lambda run, _, v: np.repeat(_of_warp(run, v).max(1), 32),
    "warp_min_u32": lambda run, _, v: np.repeat(_of_warp(run, v).min(1), 32),
    "atomic_add": _atomic_add,
    "ahead": lambda run, _, p, i: (p.read(i, 1), None)[1],
    "syncwarp": _nothing,
    "syncthreads": _nothing,
    "launch_wait": _nothing,
    "launch_next": _nothing,
    "registers": lambda run, intrinsic: Registers(intrinsic.parameters[1], run),
    "shared": _shared,
    "dynamic_shared": lambda run, intrinsic: Shared(run.dynamic, intrinsic.parameters[0], run),
}
