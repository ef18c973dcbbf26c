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

    def __init__(self, threads: int, dynamic_nbytes: int, grid: tuple[int, int, int]) -> None:
        self.threads, self.grid, self._dynamic_nbytes = threads, grid, dynamic_nbytes
        self.mask: Any = None

    def begin(self, first: int, count: int) -> None:
        """Blocks `first` on, in the order of the grid."""
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
        return array.astype(dtype)
    return array.astype(np.int64).astype(dtype)


class Pointer:
    """A kernel's array in global memory."""

    def __init__(self, array: np.ndarray, kind: str, run: Run) -> None:
        self._raw = array.reshape(-1).view(np.uint8)
        self.kind, self._run, self._writable = kind, run, array.flags.writeable

    def read(self, index: Any, count: int) -> tuple[Any, ...]:
        """`count` elements at `index` x `count` of each thread."""
        rows = self._rows(count)
        found = rows[self._checked(index, len(rows))]
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
        size = WIDTH[self.kind] * count
        rows = self._raw[: len(self._raw) // size * size].view(_DTYPES[self.kind])
        return rows.reshape(-1, count)

    def _checked(self, index: Any, count: int) -> Any:
        if np.ndim(index) == 0:
            index = self._run.whole(int(index))
        mask = self._run.mask
        bad = (index < 0) | (index >= count)
        if mask is not None:
            bad &= mask
        if bad.any():
            who = int(np.flatnonzero(bad)[0])
            raise BackendError(
                f"thread {self._run.thread[who]} of block "
                f"{tuple(int(i[who]) for i in self._run.index)} touches {self.kind} at "
                f"{int(index[who])} of {count}"
            )
        return index if mask is None else np.where(mask, index, 0)


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


def u32(x: Any) -> Any:
    """The low 32 bits, unsigned."""
    return x.astype(np.int64) & _WORD if isinstance(x, np.ndarray) else int(x) & _WORD


def i32(x: Any) -> Any:
    """The low 32 bits, signed."""
    return (u32(x) ^ 0x80000000) - 0x80000000


def f32(x: Any) -> Any:
    """Rounded to nearest even."""
    return x.astype(np.float32) if isinstance(x, np.ndarray) else np.float32(x)


def _bits(x: Any) -> Any:
    """A float's word."""
    return np.asarray(x, np.float32).view(np.uint32).astype(np.int64)[()]


def _float_of(word: Any) -> Any:
    return np.asarray(u32(word)).astype(np.uint32).view(np.float32)[()]


def _half(word: Any) -> Any:
    return np.asarray(u32(word) & 0xFFFF).astype(np.uint16).view(np.float16).astype(np.float32)[()]


def _to_half(x: Any) -> Any:
    return np.asarray(x).astype(np.float16).view(np.uint16).astype(np.int64)[()]


def _bf16(x: Any) -> Any:
    bits = _bits(x)
    return np.where(x != x, 0x7FFF, (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 & 0xFFFF)[()]


def _fma(a: Any, b: Any, c: Any) -> Any:
    return f32(np.float64(a) * np.float64(b) + np.float64(c))


def _fma_pair(a: Any, b: Any, c: Any) -> Any:
    halves = [[_float_of(u32(w) << 16), _float_of(u32(w) & 0xFFFF0000)] for w in (a, b, c)]
    low, high = (_bf16(_fma(*(pair[n] for pair in halves))) for n in range(2))
    return low | high << 16


def _prmt(a: Any, b: Any, selector: Any) -> Any:
    words = (u32(a), u32(b))
    out: Any = 0
    for i in range(4):
        nibble = selector >> 4 * i & 15
        place = nibble & 7
        word = np.where(place < 4, words[0], words[1])
        byte = word >> 8 * (place & 3) & 0xFF
        sign = np.where(byte & 0x80, 0xFF, 0)
        out = out | np.where(nibble & 8, sign, byte) << 8 * i
    return out[()] if isinstance(out, np.ndarray) else out


def _byte(word: Any, n: int, signed: bool) -> Any:
    value = u32(word) >> 8 * n & 0xFF
    return (value ^ 0x80) - 0x80 if signed else value


def _dp4a(signed: bool) -> Callable:
    def dot(a: Any, b: Any, c: Any) -> Any:
        return i32(sum((_byte(a, n, signed) * _byte(b, n, True) for n in range(4)), start=c))

    return dot


def _dp2a(a: Any, b: Any, c: Any) -> Any:
    first = ((u32(a) & 0xFFFF) ^ 0x8000) - 0x8000
    return i32(first * _byte(b, 0, True) + (i32(a) >> 16) * _byte(b, 1, True) + c)


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
    kind = np.float32 if floats else np.float64

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
        return tuple(found if floats else map(i32, found))

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


def _plain(function: Callable) -> Callable:
    return lambda run, intrinsic, *arguments: function(*arguments)


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


MEANINGS: dict[str, Callable[..., Any]] = {
    "thread_x": lambda run, _: run.thread,
    "block_x": lambda run, _: run.index[0],
    "block_y": lambda run, _: run.index[1],
    "block_z": lambda run, _: run.index[2],
    "grid_x": lambda run, _: run.grid[0],
    "grid_y": lambda run, _: run.grid[1],
    "u32": _plain(u32),
    "i32": _plain(i32),
    "f32": _plain(f32),
    "int_to_f32": _plain(f32),
    "round_i32": _plain(lambda x: i32(np.asarray(np.rint(f32(x))))),
    "bits_to_f32": _plain(_float_of),
    "f32_to_bits": _plain(_bits),
    "f16_to_f32": _plain(_half),
    "f32_to_f16": _plain(_to_half),
    "f16_low": _plain(_half),
    "f16_high": _plain(lambda word: _half(u32(word) >> 16)),
    "pack_f16": _plain(lambda a, b: _to_half(a) | _to_half(b) << 16),
    "pack_bf16": _plain(lambda a, b: _bf16(a) | _bf16(b) << 16),
    "fma": _plain(_fma),
    "multiply": _plain(lambda a, b: f32(a) * f32(b)),
    "fma_bf16x2": _plain(_fma_pair),
    "fmax": _plain(np.fmax),
    "fmin": _plain(np.fmin),
    "fabs": _plain(np.abs),
    "exp2": _plain(lambda x: np.exp2(f32(x))),
    "rcp": _plain(lambda x: np.float32(1) / f32(x)),
    "rsqrt": _plain(lambda x: np.float32(1) / np.sqrt(f32(x))),
    "divide": _plain(lambda a, b: f32(a) / f32(b)),
    "floor": _plain(np.floor),
    "shift_right": _plain(lambda x, n: i32(x) >> n),
    "prmt": _plain(_prmt),
    "dp4a": _plain(_dp4a(True)),
    "dp4a_us": _plain(_dp4a(False)),
    "dp2a": _plain(_dp2a),
    **{
        f"{name}{n}": (lambda run, _, p, i, n=n or 1: p.read(i, n) if n > 1 else p.read(i, 1)[0])
        for name in ("load", "constant", "stream", "shared_load")
        for n in ("", 2, 4)
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
