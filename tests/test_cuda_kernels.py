"""Norm, rope, SwiGLU and int8 packing on the simulator against numpy, at odd sizes."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_calls import error, simulate, unset

from runtime.backends.cuda import layouts
from runtime.backends.cuda.kernels.norm import warps_of
from runtime.ops.delta import l2_norm as l2_op
from runtime.ops.elementwise import silu, swiglu_oai
from runtime.ops.norm import rms_norm as norm_op
from runtime.ops.rope import rope as rope_op
from runtime.ops.rope import rope_angles as angles_op

rms_norm, rope, rope_angles = norm_op.reference, rope_op.reference, angles_op.reference
l2_norm = l2_op.reference
EDGES = np.array([0, -0.0, 1e-30, -1e30, 1e30, 3e-39], np.float32)


def _packed(columns: int, n: int) -> tuple[np.ndarray, int, int]:
    """Room for packed columns of n values, and how a kernel is told of it."""
    cut = layouts.cut(n)
    room = np.full((columns, layouts.column_nbytes(n)), 0xCD, np.uint8)
    return room, cut.stretches, cut.length


@pytest.mark.parametrize(("columns", "n"), [(1, 32), (3, 160), (2, 1056), (2, 2880), (2, 77)])
def test_quantize_is_the_reference_bit_for_bit(rng, columns: int, n: int):
    x = rng.standard_normal((columns, n + 3)).astype(np.float32)
    x[0, : len(EDGES)] = EDGES
    x[-1, -32:] = 0
    packed, *how = _packed(columns, n)
    grid = -(-layouts.cut(n).places // 32), columns
    simulate("quantize", grid, x, packed, n, n + 3, *how)
    np.testing.assert_array_equal(packed, layouts.quantize(x[:, :n]))


def _norm(x: np.ndarray, w: np.ndarray | None, wide: bool = True) -> np.ndarray:
    """Norms of x [tokens, heads, n], RMS with weights and L2 without."""
    tokens, heads, n = x.shape
    strides, divisor = (heads * n, n), n if w is not None else 1
    constants = {"wide": wide, "warps": warps_of(n)}
    out = unset(tokens, heads, n)
    weights = np.zeros(4, np.float32) if w is None else w
    simulate(
        "norm", (heads, tokens), x, weights, out, n, *strides, *strides, divisor, 1e-6,
        w is not None, constants=constants,
    )  # fmt: skip
    return out


@pytest.mark.parametrize(("tokens", "heads", "n"), [(1, 1, 4), (2, 3, 36), (1, 2, 1100)])
def test_norms(rng, tokens: int, heads: int, n: int):
    x = rng.standard_normal((tokens, heads, n)).astype(np.float32)
    w, exact = rng.random(n).astype(np.float32), x.astype(np.float64)
    assert error(_norm(x, w), rms_norm(exact, w.astype(np.float64), eps=1e-6)) < 3e-7
    assert error(_norm(x, None), l2_norm(exact, eps=1e-6)) < 3e-7
    np.testing.assert_array_equal(_norm(x, w, wide=False), _norm(x, w))


@pytest.mark.parametrize("n", [1, 37, 259])
def test_norms_of_rows_of_any_length(rng, n: int):
    x, w = rng.standard_normal((2, 2, n)).astype(np.float32), rng.random(n).astype(np.float32)
    wanted = rms_norm(x.astype(np.float64), w.astype(np.float64), eps=1e-6)
    assert error(_norm(x, w, wide=False), wanted) < 3e-7


@pytest.mark.parametrize("n", [288, 1056])
def test_rms_norm_packed(rng, n: int):
    x, w = rng.standard_normal((2, 1, n)).astype(np.float32), rng.random(n).astype(np.float32)
    packed, *how = _packed(2, n)
    simulate("rms_norm_packed", 2, x, w, packed, n, n, n, 1e-6, *how)
    np.testing.assert_array_equal(packed, layouts.quantize(_norm(x, w)[:, 0]))


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("heads", "dim"), [(5, 32), (2, 160)])
def test_gated_heads(rng, normed: bool, heads: int, dim: int):
    y, n = rng.standard_normal((2, heads, dim)).astype(np.float32), heads * dim
    w, gate = rng.random(dim).astype(np.float32), rng.standard_normal((2, 2, n)).astype(np.float32)
    name, given, eps = ("norm_gate", [y, w], [1e-6]) if normed else ("sigmoid_gate", [y], [])
    place, out, grid = [heads, dim, 2 * n, dim], unset(2, n), (-(-heads // 4), 2)
    packed, *how = _packed(2, n)
    for result, more in ((out, []), (packed, how)):
        constants = {"packed": result is packed}
        simulate(name, grid, *given, gate, result, *place, *eps, *more, constants=constants)
    g = gate[:, 0].astype(np.float64).reshape(2, heads, dim)
    opening = 1 / (1 + np.exp(-g))
    wanted = rms_norm(y.astype(np.float64), w, eps=1e-6) * g if normed else y
    assert error(out, (wanted * opening).reshape(2, n)) < 3e-7
    np.testing.assert_array_equal(packed, layouts.quantize(out))


@pytest.mark.parametrize("clamp", [False, True])
@pytest.mark.parametrize(("rows", "n"), [(1, 4), (2, 36), (3, 1056)])
def test_swiglu(rng, rows: int, n: int, clamp: bool):
    """Rows of gate and up are parts of wider ones."""
    both = (4 * rng.standard_normal((rows, 2 * n + 4))).astype(np.float32)
    both[0, :2] = -200, 200
    gate, up = both[:, :n], both[:, n : 2 * n]
    out, bounds = unset(rows, n), (1.702, 3.0) if clamp else (0, 0)
    call = both, both.reshape(-1)[n:], out, n // 4, n // 2 + 1, n // 2 + 1, *bounds
    simulate("swiglu", (-(-n // 1024), rows), *call, constants={"packed": False, "clamp": clamp})
    gate, up = gate.astype(np.float64), up.astype(np.float64)
    if clamp:
        expected = swiglu_oai.reference(gate, up, alpha=1.702, limit=3.0)
    else:
        expected = silu.reference(gate) * up
    assert error(out, expected) < 3e-7


@pytest.mark.parametrize("clamp", [False, True])
def test_swiglu_packed(rng, clamp: bool):
    gate, up = rng.standard_normal((2, 2, 96)).astype(np.float32)
    out, rest = unset(2, 96), (24, 24, 24, 1.702, 0.7)
    simulate("swiglu", (1, 2), gate, up, out, *rest, constants={"packed": False, "clamp": clamp})
    packed, *how = _packed(2, 96)
    call = gate, up, packed, *rest, *how
    simulate("swiglu", (1, 2), *call, constants={"packed": True, "clamp": clamp})
    np.testing.assert_array_equal(packed, layouts.quantize(out))


def test_rope_angles_hold_at_far_positions(rng):
    positions = np.array([0, 1, 17, 40_003, 1_000_003], np.int32)
    frequencies = (10_000.0 ** (-np.arange(67) / 67)).astype(np.float32)
    out = unset(5, 67, 2)
    turns = layouts.turns_of(frequencies)
    none = np.zeros(1, np.int32)
    simulate("rope_angles", (2, 5), positions, none, turns, out, 1, 67, 1.25)
    expected = rope_angles(positions, frequencies, magnitude=1.25)
    assert abs(out - expected).max() < 5e-7


def test_each_frequency_turns_with_its_component(rng):
    positions = rng.integers(0, 1 << 20, (3, 4)).astype(np.int32)
    frequencies = (10_000.0 ** (-np.arange(9) / 9)).astype(np.float32)
    components, out = np.arange(9, dtype=np.int32) % 4, unset(3, 9, 2)
    turns = layouts.turns_of(frequencies)
    simulate("rope_angles", (1, 3), positions, components, turns, out, 4, 9, 1.0)
    expected = rope_angles(positions, frequencies, components, magnitude=1.0)
    assert abs(out - expected).max() < 5e-7


@pytest.mark.parametrize("style", ["neox", "normal"])
@pytest.mark.parametrize(("heads", "dim", "half"), [(2, 32, 16), (3, 40, 8), (1, 160, 80)])
def test_rope(rng, style: str, heads: int, dim: int, half: int):
    x = rng.standard_normal((2, heads, dim)).astype(np.float32)
    angles = rng.standard_normal((2, half, 2)).astype(np.float32)
    out = unset(2, heads, dim + 3)
    strides = heads * dim, dim, heads * (dim + 3), dim + 3
    simulate("rope", (heads, 2), x, angles, out, half, dim, *strides, constants={"style": style})
    assert abs(out[..., :dim] - rope(x, angles, style=style)).max() < 1e-6
    assert np.isnan(out[..., dim:]).all()


def test_rope_in_place(rng):
    x = rng.standard_normal((1, 2, 24)).astype(np.float32)
    angles = rng.standard_normal((1, 8, 2)).astype(np.float32)
    expected = rope(x, angles, style="neox")
    simulate("rope", (2, 1), x, angles, x, 8, 24, 48, 24, 48, 24, constants={"style": "neox"})
    assert abs(x - expected).max() < 1e-6
