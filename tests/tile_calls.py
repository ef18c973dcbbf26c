"""Calling the matmul and pack kernels from tests: guarded buffers, threads, random weights."""

from __future__ import annotations

import functools
import threading
from typing import Any

import numpy as np
from kernel_calls import Fenced, guarded_bytes
from tile_packs import pack_f32, pack_int8, pack_split

import runtime.gguf  # noqa: F401  (provides the code books)
from runtime.backends.cpu.compile import isa, objects
from runtime.backends.cpu.compile.compilers import compile_one
from runtime.backends.cpu.compile.library import Library
from runtime.backends.cpu.tile.formats import NAMES, format_of, packed_nbytes
from runtime.backends.cpu.tile.spec import TileSpec
from runtime.backends.environment import cache_dir
from runtime.backends.plan.kernel import Kernel
from runtime.ops.blocks import BLOCK_FORMATS

Array = np.ndarray[Any, Any]
CANARY = 0xA5
FENCE = 256  # bytes on the other side of a guarded buffer

ISAS = isa.available()  # asking also asks the system for the matrix registers
FLOATS = ("F32", "F16", "BF16")
QUANTISED = tuple(name for name in NAMES if name not in FLOATS)


class Guarded:
    """`n_bytes` between fences; `poison` fills them with NaN.

    On POSIX systems the fence behind them, or inside `at_the_front()` the one before, is a page
    whose touch crashes.
    """

    def __init__(self, n_bytes: int, poison: int = 0xFF) -> None:
        self.raw, self.beyond = guarded_bytes(n_bytes + FENCE, Fenced.front)
        self.raw[:] = CANARY
        self.n_bytes, self.start = n_bytes, 0 if Fenced.front else FENCE
        self.bytes = self.raw[self.start : self.start + n_bytes]
        self.bytes[:] = poison
        self.address = self.bytes.ctypes.data

    @classmethod
    def of(cls, values: Array) -> Guarded:
        """A copy of a contiguous array."""
        made = cls(values.nbytes)
        made.bytes[:] = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        return made

    def check(self) -> None:
        """Fail if anything outside was written."""
        assert (self.raw[: self.start] == CANARY).all(), "written before the buffer"
        assert (self.raw[self.start + self.n_bytes :] == CANARY).all(), "written after the buffer"
        assert not self.beyond.any(), "written beyond a fence"


class Here(Library):
    """Models' own kernels of tiles, compiled in this process: they need no Numba."""

    def compile_all(self, kernels: list[Kernel], progress: Any) -> Any:
        """See plan/library.py."""
        for kernel in kernels:
            yield kernel, *compile_one(kernel, self.target)


@functools.cache
def _library(isa_name: str) -> Here:
    return Here(isa_name, cache_dir())


@functools.cache
def matmul_kernel(spec: TileSpec, isa_name: str) -> Any:
    """The compiled kernel (args, thread, n_threads)."""
    name = "matmul_id" if spec.indirect else "matmul"
    constants = {"format": spec.format, "columns": spec.columns, "coding": spec.coding}
    return objects.function(_library(isa_name).address(Kernel.of(name, **constants)))


@functools.cache
def pack_kernel(name: str, isa_name: str) -> Any:
    """The compiled pack kernel of a format."""
    return objects.function(_library(isa_name).address(Kernel.of("pack_weights", format=name)))


def assembly(ir: str, isa_name: str) -> str:
    """Assembly text of the LLVM module `ir`, to look for instructions."""
    module, machine = objects._prepare(ir, isa_name)
    return machine.emit_assembly(module)


def loaded(ir: str, isa_name: str) -> Any:
    """The kernel of a module: (args, thread, n_threads)."""
    return objects.function(objects.load_object(objects.compile_ir(ir, isa_name)))


def call(kernel: Any, args: list[int], n_threads: int = 1) -> None:
    """Run a kernel on n_threads threads at once."""
    table = np.array(args, np.int64)
    workers = [
        threading.Thread(target=kernel, args=(table.ctypes.data, i, n_threads))
        for i in range(n_threads)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def random_rows(name: str, n_rows: int, n_inner: int, seed: int = 0) -> Array:
    """uint8 [n_rows, row bytes]: any codes, float scales of sane size and both signs."""
    rng = np.random.default_rng(seed)
    layout = format_of(name)
    if layout.is_float:
        values = rng.standard_normal((n_rows, n_inner)).astype(np.float32)
        if name == "F16":
            return values.astype(np.float16).view(np.uint8)
        if name == "BF16":
            return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
        return values.view(np.uint8)
    n_blocks = n_inner // layout.block
    blocks = rng.integers(0, 256, (n_rows, n_blocks, layout.source_bytes), dtype=np.uint8)
    halves = [f for f in BLOCK_FORMATS[name.lower()].fields.values() if f.kind == "f2"]
    for at in (field.offset for field in halves):
        scale = rng.uniform(-0.02, 0.02, (n_rows, n_blocks, 1)).astype(np.float16)
        scale[0] = 0
        blocks[..., at : at + 2] = scale.view(np.uint8)
    if name == "IQ1_M":  # its float16 is spread over the top bits of four words
        words = blocks[..., 48:56].view("<u2")
        bits = rng.uniform(-0.02, 0.02, (n_rows, n_blocks, 1)).astype(np.float16).view(np.uint16)
        words[:] = words & 0x0FFF | (bits >> np.arange(0, 16, 4, dtype=np.uint16)) << 12
    if name == "MXFP4":
        blocks[..., 0] = rng.integers(110, 124, (n_rows, n_blocks))
        blocks[0, :, 0] = np.arange(n_blocks) % 3  # the denormal ones
    return blocks.reshape(n_rows, -1)


def packed(name: str, raw: Array, n_inner: int, isa_name: str, n_threads: int = 1) -> Guarded:
    """The rows packed by the kernel."""
    goal, source = Guarded(packed_nbytes(name, len(raw), n_inner)), Guarded.of(raw)
    args = [source.address, goal.address, len(raw), n_inner, raw.shape[1], 1, 0, 0]
    call(pack_kernel(name, isa_name), args, n_threads)
    goal.check()
    return goal


def activations(spec: TileSpec, x: Array) -> tuple[Guarded, tuple[Array, ...]]:
    """Packed tiles of x (float32 [T, K]), and what they hold: (q, d) or (x,)."""
    from tile_reference import quantise_activations

    held = quantise_activations(x) if spec.coding == "int8" else (x,)
    pack = {"int8": pack_int8, "f32": pack_f32, "split": pack_split}[spec.coding]
    tiles = pack(*held, spec.columns)
    buffer = Guarded(tiles.size, poison=0)
    buffer.bytes[:] = tiles.reshape(-1)
    return buffer, held


def matmul(
    spec: TileSpec,
    isa_name: str,
    weights: Guarded,
    tiles: Guarded,
    shape: tuple[int, int, int],
    bias: Array | None = None,
    add: Array | None = None,
    n_threads: int = 1,
    spare: int = 3,
) -> Array:
    """float32 [T, N]; the buffer has `spare` further rows and columns that must stay NaN."""
    n_tokens, n_rows, n_inner = shape
    stride = n_rows + spare
    out = Guarded(4 * stride * (n_tokens + spare))
    live = np.array([n_tokens], np.int64)
    args = [weights.address, tiles.address, out.address, stride]
    held = [None if v is None else Guarded.of(v) for v in (bias, add)]
    addresses = [0 if v is None else v.address for v in held]
    args += [*addresses, 0 if add is None else add.shape[1]]
    args += [live.ctypes.data, n_rows, n_inner]
    call(matmul_kernel(spec, isa_name), args, n_threads)
    out.check()
    values = out.bytes.view(np.float32).reshape(-1, stride)
    assert np.isnan(values[n_tokens:]).all(), "a dead row was written"
    assert np.isnan(values[:, n_rows:]).all(), "a column past the rows was written"
    return values[:n_tokens, :n_rows].copy()
