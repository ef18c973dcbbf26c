"""Leaves that are parts of stored tensors: what they mean, where they are kept, how read."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stored_tensors import Stored, file_of

from runtime import ops
from runtime.backends.cpu import CpuBackend
from runtime.backends.plan.plan import Buffer
from runtime.backends.plan.stored import StoredRows
from runtime.backends.reference import ReferenceBackend
from runtime.ops.cuts import canonical, cut_array, cut_rows, cut_shape
from runtime.ops.dtypes import DTYPES, F32, I32
from runtime.ops.errors import BackendError, OpError
from runtime.ops.quants import dequantize

RNG = np.random.default_rng(3)


def stored(kind: str, *shape: int) -> Stored:
    """A tensor of a file with small numbers."""
    dtype = DTYPES[kind]
    if dtype.numpy is not None:
        values = RNG.standard_normal(shape).astype(np.float32)
        return Stored(values, values.astype(dtype.numpy), dtype)
    blocks = RNG.integers(0, 256, (math.prod(shape) // dtype.block, dtype.nbytes), dtype=np.uint8)
    blocks[:, :4] = np.array([0.01, 0.02], np.float16).view(np.uint8)  # scales that are finite
    return Stored(dequantize(blocks.reshape(-1), dtype, shape), blocks, dtype)


@st.composite
def shapes_and_cuts(draw: st.DrawFn) -> tuple[tuple[int, ...], dict[int, Any]]:
    shape = tuple(draw(st.lists(st.integers(0, 6), min_size=1, max_size=3)))
    cut = {}
    for axis in draw(st.sets(st.integers(0, len(shape) - 1))):
        place = st.integers(0, shape[axis])
        runs = draw(st.lists(st.tuples(place, place), max_size=4))
        cut[axis - len(shape) * draw(st.integers(0, 1))] = tuple((min(r), max(r)) for r in runs)
    return shape, cut


@settings(max_examples=200, deadline=None)
@given(shapes_and_cuts())
def test_a_cut_is_its_runs_one_after_another(drawn: tuple[tuple[int, ...], dict[int, Any]]):
    shape, cut = drawn
    x = want = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
    for axis, runs in cut.items():
        parts = [np.take(want, range(*run), axis) for run in runs]
        want = np.concatenate([np.take(want, range(0), axis), *parts], axis)
    parts = canonical(cut, shape, F32)
    assert cut_shape(shape, parts) == want.shape
    np.testing.assert_array_equal(cut_array(x, parts), want)
    halves = {a: tuple(r for run in runs for r in _halves(run)) for a, runs in cut.items()}
    assert canonical(halves, shape, F32) == parts, "a run in two pieces is the same run"
    if math.prod(shape[:-1]) and shape[-1]:
        _compare_rows(x, parts)


def _halves(run: tuple[int, int]) -> list[tuple[int, int]]:
    middle = sum(run) // 2
    return [(run[0], middle), (middle, run[1])]


def _compare_rows(x: np.ndarray, parts: Any) -> None:
    """The same rows from a stored tensor, some at a time, and by their numbers."""
    want = cut_array(x, parts)
    leaf = ops.weight("w", x.shape, F32, dict(parts))
    rows = StoredRows(leaf, Stored(x))
    width, room = want.shape[-1], np.zeros(40, np.uint8)
    total = math.prod(want.shape[:-1])
    for first in range(0, total, 2):
        count = min(2, total - first)
        got = np.ascontiguousarray(rows.read(first, count, room)).view(np.float32)
        np.testing.assert_array_equal(got, want.reshape(total, width)[first : first + count])
    numbers = cut_rows(x.shape, parts)
    assert numbers is None or len(numbers) == total


CUTS = {
    "some rows": ((70, 64), {0: ((3, 40), (50, 51))}),
    "rows in turn": ((70, 64), {0: tuple((i, i + 1) for i in range(1, 70, 2))}),
    "rows back and forth": ((70, 64), {0: ((60, 70), (0, 9), (20, 23))}),
    "blocks of each row": ((40, 768), {1: ((256, 512),)}),
    "several blocks of some rows": ((40, 1024), {1: ((0, 256), (512, 1024)), 0: ((8, 33),)}),
    "rows of each expert": ((3, 40, 256), {1: ((0, 4), (17, 40))}),
    "some experts": ((4, 17, 256), {0: ((1, 2), (3, 4)), 2: ((0, 256),)}),
}


@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0", "q4_0", "q6_k", "q8_1"])
@pytest.mark.parametrize("name", CUTS)
def test_a_cut_weight_is_packed_as_one_that_was_stored_cut(name: str, kind: str):
    """To the last byte, in each form a kernel reads."""
    shape, cut = CUTS[name]
    dtype = DTYPES[kind]
    if shape[-1] % dtype.block:
        shape = (*shape[:-1], 256)
    whole = stored(kind, *shape)
    parts = canonical(cut, shape, dtype)
    blocks = whole.data.reshape(*shape[:-1], shape[-1] // dtype.block, dtype.nbytes)
    in_blocks = tuple(
        (a, tuple((i // dtype.block, j // dtype.block) for i, j in runs) if a == len(shape) - 1
         else runs)
        for a, runs in parts
    )  # fmt: skip
    part = cut_array(blocks, in_blocks)
    alone = Stored(cut_array(whole.to_float32(), parts), np.ascontiguousarray(part), dtype)
    backend = CpuBackend(file_of({"w": whole, "part": alone}), threads=2)
    one = ops.weight("w", shape, dtype, cut)
    other = ops.weight("part", one.shape, dtype)
    buffers = [Buffer(form, x.name, x.nbytes, tensor=x)
               for form in ("repacked", "vector", "raw") for x in (one, other)]  # fmt: skip
    assert sum(backend.weights.load(buffers)) == 6 * one.nbytes
    made = list(backend.weights._made.values())
    backend.close()
    for a, b in zip(made[::2], made[1::2], strict=True):
        np.testing.assert_array_equal(a.reshape(-1).view(np.uint8), b.reshape(-1).view(np.uint8))


def run_both(file: Any, graph: ops.Graph, inputs: dict[str, np.ndarray]) -> None:
    """The CPU's results against the reference's, and those against what `graph` says."""
    cpu = CpuBackend(file, threads=2, activations="f32")
    got = [x.copy() for x in cpu.program(graph).run(inputs, {})]
    cpu.close()
    want = ReferenceBackend(file).program(graph).run(inputs, {})
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_two_cuts_of_one_name_are_two_weights():
    matrix, bias = stored("f32", 64, 64), stored("f32", 64)
    x = ops.step_input("x", (2, 64), F32)
    results = []
    for first in (0, 32):
        w = ops.weight("w", (64, 64), F32, {0: ((first, first + 32),)}, "q")
        b = ops.weight("b", (64,), F32, {0: ((first, first + 8), (24, 48))}, "q")
        results.append(ops.add(ops.matmul(x, w), b, name="y"))
        results.append(ops.mul(ops.silu(results[-1]), b))
    value = RNG.standard_normal((2, 64)).astype(np.float32)
    run_both(file_of({"w": matrix, "b": bias}), ops.Graph(tuple(results)), {"x": value})
    want = value @ matrix.to_float32()[32:].T + bias.to_float32()[[*range(32, 40), *range(24, 48)]]
    plain = ReferenceBackend(file_of({"w": matrix, "b": bias})).program(ops.Graph(tuple(results)))
    np.testing.assert_allclose(plain.run({"x": value}, {})[2], want, rtol=1e-5, atol=1e-5)


def test_keys_of_graphs_and_leaves_are_their_content():
    def of(cut: Any, part: str, shape: tuple[int, ...] = (8, 32)) -> ops.Tensor:
        return ops.weight("w", shape, F32, cut, part)

    first, second = of({0: ((0, 4),)}, "q"), of({0: ((4, 8),)}, "q")
    assert first.content != second.content and first.name == second.name
    assert first.content == of({-2: ((0, 2), (2, 4))}, "k").content
    assert of({0: ((0, 8),)}, "q").content == of(None, "").content
    x = ops.step_input("x", (1, 32), F32)
    assert len({ops.Graph((ops.matmul(x, w),)).key() for w in (first, second)}) == 2
    assert of({0: ((0, 4),)}, "").name == "w[0:4 of axis 0]"
    numbers = [ops.constant("c", np.arange(n, n + 4, dtype=np.int32)) for n in (0, 1)]
    assert numbers[0].content != numbers[1].content
    assert ops.constant("c", np.arange(9, dtype=np.int32), {0: ((1, 5),)}).content == (
        numbers[1].content
    )


@pytest.mark.parametrize("make", [CpuBackend, ReferenceBackend])
def test_states_of_one_name_share_memory_only_if_they_are_the_same(make: Any):
    backend = make()
    leaves = [ops.state("cache", shape, F32, "slots") for shape in ((2, 3, 16), (5, 3, 16))]
    leaves.append(ops.state("cache", (2, 3, 32), F32, "slots", {2: ((16, 32),)}))
    assert leaves[2].shape == leaves[0].shape
    for n, leaf in enumerate(leaves):
        values = np.full((2, 3, 16), n, np.float32)
        backend.write_state(leaf, [0, 1], values)
    for n, leaf in enumerate(leaves):
        assert (backend.read_state(leaf, [0, 1]) == n).all()
    backend.close()


def test_a_weight_names_its_file():
    """An adapter's or projector's tensors beside the model's, under the same names."""
    own, other = stored("f32", 16, 32), stored("f32", 16, 32)
    files = {"": file_of({"w": own}), "adapter": file_of({"w": other})}
    x = ops.step_input("x", (1, 32), F32)
    leaves = [ops.weight("w", (16, 32), F32, source=name) for name in files]
    graph = ops.Graph(tuple(ops.matmul(x, w) for w in leaves))
    value = RNG.standard_normal((1, 32)).astype(np.float32)
    run_both(files, graph, {"x": value})
    got = ReferenceBackend(files).program(graph).run({"x": value}, {})
    np.testing.assert_allclose(got[1], value @ other.to_float32().T, rtol=1e-5, atol=1e-5)
    missing = ops.matmul(x, ops.weight("w", (16, 32), F32, source="projector"))
    with pytest.raises(BackendError, match=r"'projector/w'.*'projector'.*'', 'adapter'"):
        ReferenceBackend(files).program(ops.Graph((missing,))).run({"x": value}, {})


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        ({2: ((0, 1),)}, r"cut of axis 2 of \[4, 64\]"),
        ({0: ((0, 5),)}, r"cut 0:5 lies outside axis 0"),
        ({0: ((3, 2),)}, r"cut 3:2 lies outside"),
        ({1: ((0, 16),)}, r"cut 0:16 of axis 1 divides blocks of 32 of q8_0"),
    ],
)
def test_a_cut_that_cannot_be_is_named(cut: Any, message: str):
    with pytest.raises(OpError, match=message):
        ops.weight("w", (4, 64), DTYPES["q8_0"], cut)


def test_experts_of_a_cut_tensor():
    w = stored("q8_0", 6, 24, 64)
    leaf = ops.weight("w", (6, 24, 64), w.dtype, {0: ((1, 3), (5, 6)), 1: ((8, 20),)})
    ids = ops.step_input("ids", (5, 2), I32)
    graph = ops.Graph((ops.matmul_id(ops.step_input("x", (5, 64), F32), leaf, ids),))
    chosen = RNG.integers(0, 3, (5, 2)).astype(np.int32)
    x = RNG.standard_normal((5, 64)).astype(np.float32)
    run_both(file_of({"w": w}), graph, {"x": x, "ids": chosen})
