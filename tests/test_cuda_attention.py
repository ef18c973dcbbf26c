"""Attention over pages of the cache, and heads on their way into it, on GPUs that are not there."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cuda_calls import simulate, unset
from cuda_models import fake_cuda
from numpy_grid import launch as at_once
from stored_tensors import Stored, file_of
from tile_calls import random_rows

from runtime import ops
from runtime.backends.cuda.catalogue import declared
from runtime.backends.cuda.kv_layout import TYPES, group_pieces
from runtime.backends.cuda.pages import from_plain, page_nbytes, to_plain
from runtime.backends.passes.rotate_cache import rotate_cache
from runtime.backends.plan.kernel import Kernel
from runtime.ops import cost
from runtime.ops.attention import attention as attention_op
from runtime.ops.dtypes import DTYPES, F32, I32
from runtime.ops.kv_formats import KV_FORMATS, PAGE, kv_format
from runtime.ops.norm import rms_norm
from runtime.ops.quants import dequantize
from runtime.ops.rope import rope
from runtime.ops.rotation import hadamard

Q8_0 = DTYPES["q8_0"]
MOST = 1e-9  # squared error over the squares, of caches of all types


def _leaf(kv: str, which: str, pages: int, heads: int, dim: int) -> ops.Tensor:
    return ops.state(f"pages.{which}", (pages, PAGE, heads, dim), kv_format(kv).dtype, which)


def _error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(((found - expected) ** 2).sum() / (expected**2).sum())


class Cache:
    """Random K and V of some sequences on scattered pages, as numbers and as a GPU has them."""

    def __init__(self, rng, kinds=("f16", "f16"), sequences=1, places=160, heads=1, dims=(64, 64)):
        count = -(-places // PAGE)
        self.kinds, self.heads, self.dims = kinds, heads, dims
        order = rng.permutation(sequences * count)
        self.table = order.reshape(sequences, count).astype(np.uint32)
        plain = [rng.standard_normal((len(order), PAGE, heads, d)).astype(np.float32) for d in dims]
        self.k, self.v = (kv_format(t).rounded(x) for t, x in zip(kinds, plain, strict=True))
        self.pages = [
            from_plain(x, _leaf(kind, which, len(order), heads, d)).reshape(-1)
            for x, kind, which, d in zip(plain, kinds, "kv", dims, strict=True)
        ]


def _attend(
    cache: Cache, q: np.ndarray, tiles: Any, places: Any, split_pages: int = 8, alone: bool = False,
    simulated: bool = False, sinks: Any = None, window: int = 0, softcap: float = 0,
    rotation: int = 0,
) -> np.ndarray:  # fmt: skip
    """`alone`: each tile by one block."""
    tokens, heads, _ = q.shape
    (k_dim, v_dim), group = cache.dims, heads // cache.heads
    parts, slots = -(-group // 16), 1 + (v_dim > 128)
    splits = 1 if alone else -(-cache.table.shape[1] // split_pages)
    tiles = np.array([[*t, 0] for t in [*tiles, (0, 0, 0)]], np.uint32)
    rows = cache.heads * parts
    shape = len(tiles), rows, splits
    partial, stats = unset(*shape, slots * 128 * 16), unset(*shape, 16, 2)
    out, tickets = unset(tokens, heads, v_dim), np.zeros(shape[:2], np.uint32)
    types = [TYPES[kind] for kind in cache.kinds]
    per_bit = 1 / np.log(2)
    kernel = Kernel.of("attention", slots=slots, f16=cache.kinds == ("f16", "f16"))
    arguments = (
        q, *cache.pages, cache.table, tiles, np.array(places, np.int32),
        np.zeros(1, np.float32) if sinks is None else sinks, unset(1), out,
        np.zeros(1, np.uint32), partial, stats, tickets,
        heads * k_dim, k_dim, heads * v_dim, cache.table.shape[1], cache.heads, group, parts, k_dim,
        v_dim, *types, *map(group_pieces, cache.kinds), split_pages, k_dim**-0.5 * per_bit,
        softcap * per_bit, window, int(sinks is not None), rotation,
        0, 0, 0, 0, 0,
    )  # fmt: skip
    grid = splits, rows, len(tiles)
    if simulated:
        simulate("attention", grid, *arguments, constants=dict(kernel.constants))
    else:
        at_once(declared(kernel), grid, *arguments)
    assert not tickets.any(), "tickets are 0 again"
    return out


def _expected(cache: Cache, q, tiles, places, **attrs):
    sequences = np.concatenate([[t[0]] * t[2] for t in tiles])
    sinks = attrs.pop("sinks", None)
    wide = (a.astype(np.float64) for a in (q, cache.k, cache.v))
    more = () if sinks is None else (sinks.astype(np.float64),)
    scale = q.shape[2] ** -0.5
    return attention_op.reference(
        *wide, cache.table, sequences, np.array(places), *more, scale=scale, **attrs
    )


def _query(rng, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dims"),
    [(4, 1, (64, 64)), (3, 3, (80, 80)), (2, 1, (128, 96)), (24, 1, (32, 40)), (5, 1, (256, 192)),
     (2, 2, (100, 100)), (2, 1, (72, 256))],
)  # fmt: skip
def test_heads_of_any_size_and_number(rng, heads: int, kv_heads: int, dims: tuple[int, int]):
    cache = Cache(rng, heads=kv_heads, dims=dims)
    q, tiles, places = _query(rng, 1, heads, dims[0]), [(0, 0, 1)], [150]
    out = _attend(cache, q, tiles, places, split_pages=2)
    assert _error(out, _expected(cache, q, tiles, places)) < MOST


@pytest.mark.parametrize("k", KV_FORMATS)
@pytest.mark.parametrize("v", KV_FORMATS)
def test_all_pairs_of_types(rng, k: str, v: str):
    cache = Cache(rng, (k, v), places=64, dims=(64, 32))
    q, tiles, places = _query(rng, 1, 2, 64), [(0, 0, 1)], [50]
    out = _attend(cache, q, tiles, places)
    assert _error(out, _expected(cache, q, tiles, places)) < MOST


RAGGED = [(1, 0, 4), (1, 4, 1), (0, 5, 2)], [30, 31, 32, 33, 34, 0, 1]


@pytest.mark.parametrize(
    "options",
    [{"split_pages": 1}, {"window": 20}, {"softcap": 2.0}, {"rotation": 64}, {"sinks": True}],
    ids=lambda options: "-".join(options),
)
def test_a_ragged_batch(rng, options: dict[str, Any]):
    cache = Cache(rng, ("q8_0", "q5_1"), sequences=2, places=64, heads=2)
    q, (tiles, places) = _query(rng, 7, 8, 64), RAGGED
    if "sinks" in options:
        options = {"sinks": _query(rng, 8)}
    out = _attend(cache, q, tiles, places, **options)
    attrs = {name: value for name, value in options.items() if name != "split_pages"}
    assert _error(out, _expected(cache, q, tiles, places, **attrs)) < MOST


@pytest.mark.parametrize("kinds", [("f16", "f16"), ("q5_0", "q6_0"), ("f32", "iq4_nl")])
def test_no_race_between_threads_and_blocks(rng, kinds: tuple[str, str]):
    """The simulator's result is that of all threads in step, bit for bit."""
    cache = Cache(rng, kinds, places=100, dims=(32, 64))
    q, tiles, places = _query(rng, 2, 3, 32), [(0, 0, 2)], [98, 99]
    given = {"split_pages": 1, "rotation": 32, "sinks": _query(rng, 3)}
    found = _attend(cache, q, tiles, places, simulated=True, **given)
    assert _error(found, _attend(cache, q, tiles, places, **given)) < 1e-13


@pytest.mark.parametrize("kinds", [("f16", "f16"), ("q8_0", "q4_1")])
def test_bits_depend_on_nothing_but_the_row(rng, kinds: tuple[str, str]):
    """Not on the other rows of its tile, on what lies behind its place, on how many blocks share
    the splits, nor on the length of the block table."""
    cache = Cache(rng, kinds, places=288)
    q = _query(rng, 2, 4, 64)
    both = _attend(cache, q, [(0, 0, 2)], [199, 200], split_pages=2)
    blocks = _attend(cache, q, [(0, 0, 2)], [199, 200], split_pages=2, alone=True)
    np.testing.assert_array_equal(both, blocks)
    cache.table = cache.table[:, :7].copy()  # what is behind place 200 goes
    for n, place in enumerate((199, 200)):
        alone = _attend(cache, q[n : n + 1], [(0, 0, 1)], [place], split_pages=2)
        np.testing.assert_array_equal(alone[0], both[n])


def test_pages_that_a_window_hides_are_not_read(rng):
    cache = Cache(rng, places=640)
    q, tiles, places = _query(rng, 1, 2, 64), [(0, 0, 1)], [630]
    whole = _attend(cache, q, tiles, places, split_pages=4, window=70)
    cache.table[0, :16] = 1 << 20  # pages that do not exist
    np.testing.assert_array_equal(
        whole, _attend(cache, q, tiles, places, split_pages=4, window=70, alone=True)
    )


@pytest.mark.parametrize("kv", KV_FORMATS)
@pytest.mark.parametrize("which", ["k", "v"])
def test_pages_convert_exactly_both_ways(rng, kv: str, which: str):
    for dim in (64, 40):
        leaf = _leaf(kv, which, 3, 2, dim)
        x = _query(rng, 3, PAGE, 2, dim)
        pages = from_plain(x, leaf)
        assert pages.shape == (3, page_nbytes(leaf))
        assert dim == 40 or page_nbytes(leaf) == cost.page_nbytes(leaf)
        kept = to_plain(pages, leaf)
        plain = kv_format(kv).plain(kept, dim) if kept.dtype == np.uint8 else kept
        np.testing.assert_array_equal(plain, kv_format(kv).rounded(x))
        np.testing.assert_array_equal(to_plain(from_plain(kept, leaf), leaf), kept)


def _written(leaf: ops.Tensor, slots: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """What pages of zeros hold after rows were written as the CPU writes them."""
    plain = np.zeros(tuple(map(int, leaf.shape)), np.float32)
    pages = to_plain(np.zeros((len(plain), page_nbytes(leaf)), np.uint8), leaf)
    plain.reshape(-1, *plain.shape[2:])[slots] = rows
    made = to_plain(from_plain(plain, leaf), leaf)
    pages.reshape(-1, *pages.shape[2:])[slots] = made.reshape(-1, *made.shape[2:])[slots]
    return pages


@pytest.mark.parametrize("kv", KV_FORMATS)
@pytest.mark.parametrize("which", ["k", "v"])
def test_rows_are_rounded_as_on_the_cpu(rng, kv: str, which: str):
    """Bit for bit: rows of zeros, of one value, tiny and large ones, and what is not finite."""
    dim, slots = 72, np.array([5, 70, 33, 6, 7, 38, 95, 0], np.int32)
    x = _query(rng, len(slots), 2, dim)
    x[1], x[2], x[3] = 0, 1.5, x[3] * 1e-33
    x[4] *= 1e6 if kv == "f32" else 60
    x[5, 0, :40] = 0
    leaf = _leaf(kv, which, 3, 2, dim)
    pages = np.zeros((3, page_nbytes(leaf)), np.uint8)
    arguments = (
        x, pages, pages, pages, slots, np.array([len(slots) - 1, 0], np.uint32), 2, dim, 2 * dim,
        int(which == "v"), TYPES[kv], group_pieces(kv),
    )  # fmt: skip
    at_once(declared(Kernel.of("kv_write", groups=4)), (1, len(slots)), *arguments)
    np.testing.assert_array_equal(to_plain(pages, leaf), _written(leaf, slots[:-1], x[:-1]))


def test_a_group_that_is_not_finite_has_no_scale(rng):
    x = _query(rng, 1, 1, 64)
    x[0, 0, 3] = np.inf
    for kv in ("q8_0", "q4_1", "iq4_nl"):
        leaf = _leaf(kv, "k", 1, 1, 64)
        pages = np.zeros((1, page_nbytes(leaf)), np.uint8)
        slots, live = np.zeros(1, np.int32), np.array([1, 0], np.uint32)
        arguments = x, pages, pages, pages, slots, live, 1, 64, 64, 0, TYPES[kv], group_pieces(kv)
        simulate("kv_write", (1, 1), *arguments, constants={"groups": 4})
        found = kv_format(kv).plain(to_plain(pages, leaf), 64)[0, 0, 0]
        assert np.isnan(found[:32]).all() and np.isfinite(found[32:]).all()


@pytest.mark.parametrize(
    ("style", "kinds", "dim", "half", "normed"),
    [("neox", ("q8_0", "q4_0"), 64, 32, True), ("normal", ("f16", "f32"), 80, 20, False),
     ("none", ("q5_1", "bf16"), 40, 0, True), ("neox", ("q6_0", "q5_0"), 72, 18, False)],
)  # fmt: skip
def test_heads_are_normed_turned_rotated_and_kept(
    rng, style: str, kinds: tuple[str, str], dim: int, half: int, normed: bool
):
    tokens, heads, kv_heads = 2, 3, 2
    q, k, v = (_query(rng, tokens, n, dim) for n in (heads, kv_heads, kv_heads))
    norms, angles = _query(rng, 2, dim), _query(rng, tokens, max(half, 1), 2)
    rotations = [1 << dim.bit_length() - 1 if kv_format(t).coding else 0 for t in kinds]
    slots, q_out = np.array([40, 7], np.int32), unset(tokens, heads, dim)
    leaves = [_leaf(t, which, 2, kv_heads, dim) for t, which in zip(kinds, "kv", strict=True)]
    pages = [np.zeros((2, page_nbytes(leaf)), np.uint8) for leaf in leaves]
    simulate(
        "qkv_post", (-(-(heads + 2 * kv_heads) // 4), tokens), q, k, v, norms[0], norms[1], angles,
        q_out, *[pages[0]] * 3, *[pages[1]] * 3, slots, np.array([tokens, 0], np.uint32),
        heads * dim, dim, kv_heads * dim, kv_heads * dim, heads, kv_heads, dim, half,
        ["none", "neox", "normal"].index(style), int(normed), 1e-6, *rotations,
        *(TYPES[t] for t in kinds), *map(group_pieces, kinds), constants={"groups": 4},
    )  # fmt: skip

    def turned(x, norm):
        x = x.astype(np.float64)
        x = rms_norm.reference(x, norm.astype(np.float64), eps=1e-6) if normed else x
        x = rope.reference(x, angles.astype(np.float64), style=style) if half else x
        return hadamard.reference(x, block=rotations[0]) if rotations[0] else x

    assert _error(q_out, turned(q, norms[0])) < 1e-12
    v = hadamard.reference(v, block=rotations[1]) if rotations[1] else v
    for x, leaf, raw, kv in zip((turned(k, norms[1]), v), leaves, pages, kinds, strict=True):
        found = to_plain(raw, leaf)
        found = kv_format(kv).plain(found, dim) if found.dtype == np.uint8 else found
        found = found.reshape(-1, kv_heads, dim)[slots]
        wanted = kv_format(kv).rounded(x.astype(np.float32))
        assert _error(found, wanted) < 1e-6, "a value on an edge may fall to the other side"
        assert (found != wanted).mean() < 0.2 or kv in ("f32", "bf16", "f16")


def _layer(gated: bool, kv: str) -> tuple[ops.Graph, dict[str, Any]]:
    """Attention between cache and output projection, the state it needs and its weights."""
    heads, kv_heads, dim, tokens, rows = 3, 1, 64, ops.Dim("tokens", 4), 32
    q = ops.step_input("q", (tokens, heads, dim), F32)
    k, v = (ops.step_input(name, (tokens, kv_heads, dim), F32) for name in "kv")
    slots, places, sequences = (
        ops.step_input(name, (tokens,), I32) for name in ("kv_slots", "places", "sequences")
    )
    table = ops.step_input("table", (1, 2), I32)
    leaves = [_leaf(kv, which, 2, kv_heads, dim) for which in "kv"]
    pages = [
        ops.kv_write(x, leaf, slots, which=which, kv=kv)
        for x, leaf, which in zip((k, v), leaves, "kv", strict=True)
    ]
    y = ops.attention(q, *pages, table, sequences, places, scale=dim**-0.5)
    if gated:
        y = ops.mul(y, ops.sigmoid(ops.step_input("gate", (tokens, heads, dim), F32)))
    raw = random_rows("Q8_0", rows, heads * dim)
    stored = Stored(dequantize(raw.reshape(-1), Q8_0, (rows, heads * dim)), raw, Q8_0)
    out = ops.matmul(ops.merge_heads(y), ops.weight("out", (rows, heads * dim), Q8_0))
    return rotate_cache(ops.Graph((out,))), {"out": stored}


@pytest.mark.parametrize("kv", ["f16", "q8_0"])
@pytest.mark.parametrize("gated", [False, True])
def test_gate_and_packing_have_the_bits_of_plain_ops(rng, gated: bool, kv: str):
    graph, tensors = _layer(gated, kv)
    inputs = {name: _query(rng, 3, n, 64) for name, n in (("q", 3), ("k", 1), ("v", 1))}
    inputs |= {"gate": _query(rng, 3, 3, 64)} if gated else {}
    numbers = np.arange(30, 33, dtype=np.int32)
    inputs |= {"kv_slots": numbers, "places": numbers, "sequences": np.zeros(3, np.int32)}
    inputs |= {"table": np.arange(2, dtype=np.int32)[None]}
    found = []
    for fuse in (True, False):
        simulated = fuse and gated and kv == "q8_0"
        backend = fake_cuda(file_of(tensors), quick=not simulated, fuse=fuse)
        program = backend.program(graph)
        kernels = [launch.kernel.name for launch in program.launches]
        assert not fuse or kernels == ["qkv_post", "attention", "matvec"]
        found.append(program.run(inputs, {"tokens": 3})[0].copy())
        backend.close()
    np.testing.assert_array_equal(*found)
