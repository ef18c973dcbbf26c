"""Every CUDA kernel as a case: arrays, launches, what numpy says, and the bytes and products.

Arrays are packed as the backend packs them; outputs begin poisoned. A case is small enough for the
simulator or large enough to be timed, by the sizes it is made with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from gpu_probe_arrays import (
    differing,
    farthest,
    normal,
    random_blocks,
    relative,
    result,
    unset,
)  # fmt: skip

from runtime.backends.cuda import layouts
from runtime.backends.cuda.catalogue import KERNELS
from runtime.backends.cuda.kernels.matvec import rows_of
from runtime.backends.cuda.kernels.norm import warps_of
from runtime.backends.plan.kernel import Kernel
from runtime.ops.attention import attention as attention_op
from runtime.ops.dtypes import DTYPES
from runtime.ops.kv_formats import PAGE
from runtime.ops.quants import dequantize
from runtime.ops.rope import rope as rope_op
from runtime.ops.rope import rope_angles as angles_op

PACK: dict[str, Callable[[np.ndarray], tuple[np.ndarray, ...]]] = {
    "Q8_0": layouts.pack_q8_0,
    "Q4_0": layouts.pack_q4_0,
    "Q4_K": layouts.pack_q4_k,
    "Q6_K": layouts.pack_q6_k,
}
TILE = 128


@dataclass
class Case:
    """Launches over named arrays.

    `steps`: (kernel, grid, arguments), an argument a number or the name of an array. `outputs`:
    names that `check` takes, in order; it gives an error that must not exceed `tolerance`.
    """

    shape: str
    arrays: dict[str, np.ndarray]
    steps: list[tuple[Kernel, Any, list[Any]]]
    outputs: list[str]
    check: Callable[..., float]
    tolerance: float
    nbytes: int = field(default=0)

    @property
    def name(self) -> str:
        """Of its kernels."""
        return " + ".join(dict.fromkeys(str(kernel) for kernel, _, _ in self.steps))

    def __post_init__(self) -> None:
        self.nbytes = self.nbytes or sum(array.nbytes for array in self.arrays.values())


@dataclass(frozen=True)
class Sizes:
    """Of the cases: vectors of `n` values, products of `rows` rows, `places` in the cache."""

    n: int
    rows: int
    columns: int
    tokens: int
    heads: int
    group: int
    places: int
    logits: int


SMALL = Sizes(n=256, rows=5, columns=3, tokens=2, heads=2, group=2, places=70, logits=1000)
LARGE = Sizes(4096, 4099, 515, 8, 8, 4, 4000, 151_936)


def cases(rng: np.random.Generator, sizes: Sizes) -> Iterator[Case]:
    """Of every kernel in the catalogue with all its constants."""
    for format in KERNELS.constants("matvec")["format"]:
        for columns in KERNELS.constants("matvec")["columns"]:
            yield matvec(rng, format, sizes.rows, sizes.n, columns)
    for format in KERNELS.constants("tile")["format"]:
        yield tile(rng, format, sizes.rows, sizes.n, sizes.columns)
    for dim in KERNELS.constants("attention")["dim"]:
        yield attention(rng, dim, sizes)
        for which in KERNELS.constants("kv_write")["which"]:
            yield kv_write(rng, which, dim, sizes)
    for packed in (False, True):
        yield rms_norm(rng, sizes, packed)
        yield swiglu(rng, sizes, packed)
    yield quantize(rng, sizes)
    yield rope_angles(rng, sizes)
    for style in KERNELS.constants("rope")["style"]:
        yield rope(rng, style, sizes)
    yield argmax(rng, sizes)


def matvec(rng: np.random.Generator, format: str, rows: int, k: int, columns: int) -> Case:
    """Weights [rows, k] times `columns` columns."""
    blocks, planes, x, meta = _product(rng, format, rows, k, columns)
    arrays = planes | {"x": x, "meta": meta, "out": unset(columns, rows)}
    kernel = Kernel.of("matvec", format=format, columns=columns)
    arguments = [*arrays, rows, k // 32, rows]
    grid = -(-rows // rows_of(format, columns))
    return Case(
        f"{rows}x{k}, {columns} columns", arrays, [(kernel, grid, arguments)], ["out"],
        lambda out: relative(out, _expected(blocks, format, x, meta)), 2e-6,
    )  # fmt: skip


def tile(rng: np.random.Generator, format: str, rows: int, k: int, columns: int) -> Case:
    """The same of many columns, on tensor cores."""
    blocks, planes, x, meta = _product(rng, format, rows, k, columns)
    stride = rows + rows % 2
    arrays = planes | {"x": x, "meta": meta, "out": unset(columns, stride)}
    arguments = [*arrays, rows, columns, k // 32, stride]
    grid = -(-rows // TILE), -(-columns // TILE)
    return Case(
        f"{rows}x{k}, {columns} columns", arrays,
        [(Kernel.of("tile", format=format), grid, arguments)], ["out"],
        lambda out: relative(out[:, :rows], _expected(blocks, format, x, meta)), 2e-6,
    )  # fmt: skip


def _product(rng: np.random.Generator, format: str, rows: int, k: int, columns: int) -> Any:
    blocks = random_blocks(rng, format, rows, k)
    planes = {f"plane {i}": plane for i, plane in enumerate(PACK[format](blocks))}
    x, meta = layouts.quantize(normal(rng, columns, k))
    return blocks, planes, x, meta


def _expected(blocks: np.ndarray, format: str, x: np.ndarray, meta: np.ndarray) -> np.ndarray:
    dtype = DTYPES[format.lower()]
    k = blocks.shape[1] * dtype.block
    weights = dequantize(blocks, dtype, (len(blocks), k)).astype(np.float64)
    return layouts.dequantized(x, meta) @ weights.T


def attention(rng: np.random.Generator, dim: int, sizes: Sizes) -> Case:
    """One token of a sequence that has `places`, joined from splits of 2 pages."""
    heads, group, pages = sizes.heads, sizes.group, -(-sizes.places // PAGE)
    splits = -(-pages // 2)
    q = normal(rng, 1, heads * group, dim)
    k, v = (normal(rng, pages, PAGE, heads, dim).astype(np.float16) for _ in "kv")
    table = rng.permutation(pages).astype(np.uint32)[None]
    places = np.array([sizes.places - 1], np.int32)
    arrays = {
        "q": q, "k": np.ascontiguousarray(k.transpose(0, 2, 1, 3)),
        "v": np.ascontiguousarray(v.transpose(0, 2, 3, 1)), "block_table": table,
        "tiles": np.array([[0, 0, 1, 0]], np.uint32), "places": places,
        "partial": unset(heads, splits, 16, dim), "stats": unset(heads, splits, 16, 2),
        "sinks": np.zeros(1, np.float32), "out": unset(1, heads * group, dim),
    }  # fmt: skip
    width, factor = heads * group * dim, dim**-0.5 / np.log(2)
    split = [*list(arrays)[:8], width, pages, group, 2, factor, 0]
    names = ["partial", "stats", "tiles", "places", "sinks", "out"]
    merge = [*names, splits, width, group, 2, 0]
    wide = [a.astype(np.float64) for a in (q, k, v)]
    return Case(
        f"{heads * group} heads of {dim}, {heads} of KV, {sizes.places} places", arrays,
        [
            (Kernel.of("attention", dim=dim), (splits, heads, 1), split),
            (Kernel.of("attention_merge", dim=dim), (16, heads, 1), merge),
        ],
        ["out"],
        lambda out: relative(
            out, attention_op.reference(*wide, table, np.zeros(1, int), places, scale=dim**-0.5)
        ),
        1e-3,
    )  # fmt: skip


def kv_write(rng: np.random.Generator, which: str, dim: int, sizes: Sizes) -> Case:
    """Rows of `tokens` tokens into slots of scattered pages."""
    tokens, heads = sizes.tokens, sizes.heads
    x = normal(rng, tokens, heads, dim)
    slots = rng.permutation(3 * PAGE)[:tokens].astype(np.int32)
    shape = (3, heads, PAGE, dim) if which == "k" else (3, heads, dim, PAGE)
    arrays = {"x": x, "pages": np.zeros(shape, np.float16), "kv_slots": slots}
    expected = np.zeros((3 * PAGE, heads, dim), np.float16)
    expected[slots] = x

    def check(pages: np.ndarray) -> float:
        order = (0, 2, 1, 3) if which == "k" else (0, 3, 1, 2)
        return differing(pages.transpose(order).reshape(expected.shape), expected)

    kernel = Kernel.of("kv_write", which=which, dim=dim)
    steps = [(kernel, (heads, tokens), [*arrays, heads * dim])]
    return Case(f"{tokens} tokens, {heads} heads", arrays, steps, ["pages"], check, 0)


def rms_norm(rng: np.random.Generator, sizes: Sizes, packed: bool) -> Case:
    """Rows of a step."""
    x, w = normal(rng, sizes.tokens, sizes.n), rng.random(sizes.n, np.float32)
    wide = x.astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean(1, keepdims=True) + 1e-6) * w
    arrays, check = result(expected, packed)
    n, warps = sizes.n, warps_of(sizes.n)
    kernel = Kernel.of("rms_norm_packed") if packed else Kernel.of("norm", wide=True, warps=warps)
    numbers = [n, n, n, 1e-6] if packed else [n, 0, n, 0, n, n, 1e-6, 1]
    steps = [(kernel, sizes.tokens, ["input", "w", *arrays, *numbers])]
    return _elementwise(sizes, {"input": x, "w": w} | arrays, steps, list(arrays), check, packed)


def swiglu(rng: np.random.Generator, sizes: Sizes, packed: bool) -> Case:
    """Rows of a step."""
    gate, up = 4 * normal(rng, 2, sizes.tokens, sizes.n)
    wide = gate.astype(np.float64)
    arrays, check = result(wide / (1 + np.exp(-wide)) * up, packed)
    kernel = Kernel.of("swiglu", packed=packed)
    grid = -(-sizes.n // 1024), sizes.tokens
    steps = [(kernel, grid, ["gate", "up", *arrays, sizes.n // 4])]
    return _elementwise(
        sizes, {"gate": gate, "up": up} | arrays, steps, list(arrays), check, packed
    )


def quantize(rng: np.random.Generator, sizes: Sizes) -> Case:
    """Rows of a step; the layout's numpy to the bit."""
    x = normal(rng, sizes.tokens, sizes.n)
    expected = layouts.quantize(x)
    arrays, _ = result(x, True)

    def check(packed: np.ndarray, meta: np.ndarray) -> float:
        return max(differing(packed, expected[0]), differing(meta, expected[1]))

    blocks = sizes.n // 32
    grid = -(-blocks // 32), sizes.tokens
    steps = [(Kernel.of("quantize"), grid, ["input", *arrays, blocks])]
    shape = f"{sizes.tokens}x{sizes.n}"
    return Case(shape, {"input": x} | arrays, steps, list(arrays), check, 0)


def _elementwise(
    sizes: Sizes, arrays: dict, steps: list, outputs: list[str], check: Callable, packed: bool
) -> Case:
    tolerance = 0.51 if packed else 2e-6
    return Case(f"{sizes.tokens}x{sizes.n}", arrays, steps, outputs, check, tolerance)


def rope_angles(rng: np.random.Generator, sizes: Sizes) -> Case:
    """Positions up to a million."""
    positions = np.linspace(0, 1_000_003, sizes.tokens).astype(np.int32)
    frequencies = (10_000.0 ** (-np.arange(64) / 64)).astype(np.float32)
    arrays = {
        "positions": positions, "components": np.zeros(64, np.int32),
        "turns": layouts.turns_of(frequencies), "out": unset(sizes.tokens, 64, 2),
    }  # fmt: skip
    expected = angles_op.reference(positions, frequencies, magnitude=1.25)
    steps = [(Kernel.of("rope_angles"), (1, sizes.tokens), [*arrays, 1, 64, 1.25])]
    shape = f"{sizes.tokens} positions"
    return Case(shape, arrays, steps, ["out"], lambda out: farthest(out, expected), 1e-6)


def rope(rng: np.random.Generator, style: str, sizes: Sizes) -> Case:
    """Heads of 128, all of it turned."""
    x, angles = normal(rng, sizes.tokens, sizes.heads, 128), normal(rng, sizes.tokens, 64, 2)
    arrays = {"x": x, "angles": angles, "out": unset(*x.shape)}
    expected, width = rope_op.reference(x, angles, style=style), 128 * sizes.heads
    arguments = [*arrays, 64, 128, width, 128, width, 128]
    steps = [(Kernel.of("rope", style=style), (sizes.heads, sizes.tokens), arguments)]
    shape = f"{sizes.tokens}x{sizes.heads}x128"
    return Case(shape, arrays, steps, ["out"], lambda out: farthest(out, expected), 4e-6)


def argmax(rng: np.random.Generator, sizes: Sizes) -> Case:
    """A row of logits in parts of at most 2048."""
    x = normal(rng, 1, sizes.logits)
    parts = -(-sizes.logits // 2048)
    arrays = {
        "x": x, "values": unset(1, parts), "ids": np.zeros((1, parts), np.uint32),
        "out": np.full(1, 0xCDCDCDCD, np.uint32),
    }  # fmt: skip
    steps = [
        (Kernel.of("argmax_parts"), (parts, 1), ["x", "values", "ids", sizes.logits]),
        (Kernel.of("argmax_merge"), 1, ["values", "ids", "out", parts]),
    ]
    best = x.argmax(1).astype(np.uint32)
    return Case(f"{sizes.logits}", arrays, steps, ["out"], lambda out: differing(out, best), 0)
