"""Matrix-vector kernels on the simulator against float64: odd rows, odd lengths, 1 to 8 columns;
several weights in a launch, gate and up joined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cuda_calls import error, random_blocks, simulate, unset, values

from runtime.backends.cuda import layouts, products
from runtime.backends.cuda.catalogue import declared
from runtime.backends.cuda.contents import Packed
from runtime.backends.cuda.kernels.matvec_ends import RESIDUAL
from runtime.backends.plan.kernel import Kernel
from runtime.backends.plan.plan import Buffer, Call, Ref
from runtime.ops.blocks import BLOCK_FORMATS
from runtime.ops.elementwise import swiglu_oai
from runtime.ops.errors import BackendError
from runtime.ops.tensor import Tensor

ALL = (*layouts.FORMATS, *layouts.FLOATS)
NOTHING = np.zeros(4, np.float32)


class _Products:
    """Products of one x, as a rule emits them, and what memory they speak of."""

    def __init__(self, format: str, x: np.ndarray, live: int = 8) -> None:
        self.format, self.columns, self.inner = format, *x.shape
        self.memory: dict[Buffer, np.ndarray] = {}
        if format in layouts.FLOATS:
            padded = np.zeros((len(x), layouts.float_nbytes(self.inner) // 4), np.float32)
            padded[:, : self.inner] = x
            self.x = self._there("x", padded)
        else:
            self.x = self._there("x", layouts.quantize(x))
        self.live = self._there("live", np.array([live, 0], np.uint32))
        self.calls: list[Call] = []

    def _there(self, name: str, array: np.ndarray) -> Ref:
        buffer = Buffer("arena", name, array.nbytes)
        self.memory[buffer] = array
        return Ref(buffer)

    def add(
        self, weights: np.ndarray, bias: Any = None, residual: Any = None
    ) -> tuple[Call, np.ndarray]:
        """A product of one weight [rows, blocks, bytes], and where its result will be."""
        rows, out = len(weights), unset(self.columns, len(weights))
        packed = layouts.pack(weights.reshape(-1).view(np.uint8), self.format, rows, self.inner)
        name, constants = products.kernel_of(self.format, self.columns)
        arguments = products.arguments_of(self.format, rows, self.inner, self.columns) | {
            "w0": self._there("w", packed), "x": self.x, "live": self.live,
            "out0": self._there("out", out),
        }  # fmt: skip
        if bias is not None:
            arguments |= {"b0": self._there("bias", bias), "sums": arguments["sums"] | 1}
        if residual is not None:
            arguments |= {"residual": self._there("residual", residual), "residual_stride": rows}
            arguments["sums"] |= RESIDUAL
        self._emit(Kernel.of(name, **constants), arguments, ("out0",))
        return self.calls[-1], out

    def add_swiglu(self, gate: Call, up: Call, packed: bool, clamp: bool) -> np.ndarray:
        """SwiGLU of two products."""
        n = gate.arguments["n0"]
        nbytes = self.columns * layouts.column_nbytes(n, "int8" if packed else "f32")
        out = np.full(nbytes, 0xCD, np.uint8)
        arguments = {
            "gate": gate.arguments["out0"], "up": up.arguments["out0"], "pieces": n // 4,
            "gate_stride": n // 4, "up_stride": n // 4, "alpha": 1.7, "limit": 0.5,
            "out": self._there("out", out),
        }  # fmt: skip
        if packed:
            cut = layouts.cut(n)
            arguments |= {"stretches": cut.stretches, "length": cut.length}
        grid = -(-layouts.cut(n).places // 32), self.columns
        self._emit(Kernel.of("swiglu", packed=packed, clamp=clamp), arguments, ("out",), grid)
        return out

    def _emit(self, kernel: Kernel, arguments: dict, out: Sequence[str], grid: Any = None) -> None:
        refs = {n: a.buffer for n, a in arguments.items() if isinstance(a, Ref)}
        reads = tuple(b for n, b in refs.items() if n not in out)
        writes = tuple(refs[n] for n in out)
        grid = grid or products.grid_of(kernel, arguments)
        node = Tensor("linear", (), (1,), layouts.DTYPES["f32"])
        self.calls.append(Call(kernel, arguments, reads, writes, node, grid=grid))

    def run(self, calls: Sequence[Call]) -> None:
        """On the simulator."""
        for call in calls:
            given = []
            for name, kind in declared(call.kernel).entry.arguments:
                value = call.arguments[name]
                if isinstance(value, Ref):
                    value = self.memory[value.buffer]
                given.append(NOTHING if kind.endswith("*") and not np.ndim(value) else value)
            simulate(call.kernel.name, call.grid, *given, constants=dict(call.kernel.constants))


def _weights(rng: np.random.Generator, format: str, rows: int, inner: int) -> np.ndarray:
    """uint8 [rows, n, bytes of a block], as many values as `inner` or the next whole block."""
    if format in BLOCK_FORMATS or format.lower() in BLOCK_FORMATS:
        return random_blocks(rng, format, rows, -(-inner // BLOCK_FORMATS[format.lower()].block))
    floats = rng.standard_normal((rows, inner)).astype(np.float32)
    if format == "BF16":
        return np.ascontiguousarray(floats.view(np.uint16)[:, 1::2]).view(np.uint8)
    return floats.astype(np.float16 if format == "F16" else np.float32).view(np.uint8)


def _values(weights: np.ndarray, format: str) -> np.ndarray:
    if format not in layouts.FLOATS:
        return values(weights, format)
    return values(weights.reshape(len(weights), -1, layouts.FLOATS[format]), format)


def _inner(format: str, weights: np.ndarray) -> int:
    if format in layouts.FLOATS:
        return weights.shape[1] // layouts.FLOATS[format]
    return weights.shape[1] * BLOCK_FORMATS[format.lower()].block


def _meant(x: np.ndarray, format: str) -> np.ndarray:
    if format in layouts.FLOATS:
        return x.astype(np.float64)
    return Packed.of(layouts.quantize(x), x.shape[1], "int8").values


def _product(weights: np.ndarray, x: np.ndarray, format: str, **more: Any) -> np.ndarray:
    all_of = _Products(format, x, more.pop("live", 8))
    _, out = all_of.add(weights, **more)
    all_of.run(all_of.calls)
    return out


@pytest.mark.parametrize("inner", [32, 64, 96, 256, 1056])
@pytest.mark.parametrize("format", ALL)
def test_matvec_is_the_product(rng, format: str, inner: int):
    """Several rows to a warp, one to a warp, stretches that are not full."""
    if format.endswith(("_K", "XS")) and inner not in (256, 1056):
        pytest.skip("rows are whole super-blocks")
    weights = _weights(rng, format, 5, inner)
    x = rng.standard_normal((1, _inner(format, weights))).astype(np.float32)
    expected = _meant(x, format) @ _values(weights, format).T
    assert error(_product(weights, x, format), expected) < 1e-6


@pytest.mark.parametrize("inner", [1, 7, 33, 515])
def test_float_rows_of_any_length(rng, inner: int):
    weights = _weights(rng, "F16", 3, inner)
    x = rng.standard_normal((2, inner)).astype(np.float32)
    expected = x.astype(np.float64) @ _values(weights, "F16").T
    assert error(_product(weights, x, "F16"), expected) < 1e-6


@pytest.mark.parametrize("format", ALL)
def test_a_column_does_not_depend_on_the_others(rng, format: str):
    weights = _weights(rng, format, 3, 256)
    x = rng.standard_normal((9, 256)).astype(np.float32)
    together = _product(weights, x, format, live=9)
    for columns in (1, 2, 3, 8):
        alone = _product(weights, x[:columns], format)
        np.testing.assert_array_equal(alone, together[:columns])


def test_eight_columns_of_which_none_lives_are_left_alone(rng):
    weights, x = _weights(rng, "Q8_0", 2, 64), rng.standard_normal((9, 64)).astype(np.float32)
    out = _product(weights, x, "Q8_0", live=8)
    assert np.isfinite(out[:8]).all() and np.isnan(out[8]).all()


@pytest.mark.parametrize("format", ["Q4_K", "F16"])
def test_a_bias_and_a_residual_are_added(rng, format: str):
    weights, x = _weights(rng, format, 5, 256), rng.standard_normal((2, 256)).astype(np.float32)
    bias, residual = rng.random(5, np.float32), rng.random((2, 5), np.float32)
    plain = _product(weights, x, format)
    found = _product(weights, x, format, bias=bias, residual=residual)
    np.testing.assert_array_equal(found, plain + bias + residual)


@pytest.mark.parametrize("format", ["Q8_0", "F16"])
def test_weights_of_one_x_share_a_launch(rng, format: str):
    """Each as alone; a fifth one, and one with a residual, stay by themselves."""
    x = rng.standard_normal((2, 64)).astype(np.float32)
    together = _Products(format, x)
    wanted, found = [], []
    for i, rows in enumerate((5, 33, 1, 70, 2)):
        weights = _weights(rng, format, rows, 64)
        bias = rng.random(rows, np.float32) if i % 2 else None
        residual = rng.random((2, rows), np.float32) if i == 2 else None
        wanted.append(_product(weights, x, format, bias=bias, residual=residual))
        found.append(together.add(weights, bias, residual)[1])
    calls = products.join(together.calls, ())
    assert len(calls) == 2
    together.run(calls)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("clamp", [False, True])
@pytest.mark.parametrize(("columns", "n", "inner"), [(1, 36, 1024), (3, 72, 64), (1, 320, 64)])
def test_gate_and_up_end_in_swiglu(rng, columns: int, n: int, inner: int, clamp: bool):
    """Packed as by launches of their own, bit for bit."""
    x = rng.standard_normal((columns, inner)).astype(np.float32)
    gate, up = _weights(rng, "Q4_0", n, inner), _weights(rng, "Q4_0", n, inner)
    bias = rng.random(n, np.float32)
    found = []
    for joined in (False, True):
        all_of = _Products("Q4_0", x)
        g, u = all_of.add(gate, bias)[0], all_of.add(up)[0]
        found.append(all_of.add_swiglu(g, u, True, clamp))
        calls = products.join(all_of.calls, ()) if joined else all_of.calls
        assert len(calls) == (1 if joined else 3)
        all_of.run(calls)
    np.testing.assert_array_equal(*found)


def test_gate_and_up_of_floats(rng):
    x = rng.standard_normal((2, 40)).astype(np.float32)
    gate, up = _weights(rng, "BF16", 24, 40), _weights(rng, "BF16", 24, 40)
    all_of = _Products("BF16", x)
    out = all_of.add_swiglu(all_of.add(gate)[0], all_of.add(up)[0], False, True)
    calls = products.join(all_of.calls, ())
    assert len(calls) == 1
    all_of.run(calls)
    g, u = (x.astype(np.float64) @ _values(w, "BF16").T for w in (gate, up))
    expected = swiglu_oai.reference(g, u, alpha=1.7, limit=0.5)
    assert error(out.view(np.float32).reshape(2, 24), expected) < 1e-6


def test_gate_and_up_that_are_read_otherwise_stay_apart(rng):
    x = rng.standard_normal((1, 64)).astype(np.float32)
    all_of = _Products("Q8_0", x)
    g, u = (all_of.add(_weights(rng, "Q8_0", 32, 64))[0] for _ in range(2))
    all_of.add_swiglu(g, u, True, False)
    assert len(products.join(all_of.calls, g.writes)) == 2
    again = replace(all_of.calls[2])
    assert len(products.join([*all_of.calls, again], ())) == 3


def test_packing_refuses_other_shapes():
    with pytest.raises(BackendError, match=r"2 rows of 96 values in Q8_0 are not uint8 \[108\]"):
        layouts.pack(np.zeros(108, np.uint8), "Q8_0", 2, 96)
