"""Gates fused with packing: the bits of the plain parts, whatever the strides and the threads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from kernel_calls import ISAS, Fenced, library, run
from packed_rows import Packed, pack

from runtime.backends.plan.kernel import Kernel
from runtime.ops.registry import OPS

ROWS, HEADS = 5, 3
EPS = 1e-6
KINDS, WIDTHS = ("int8", "f32", "split"), (1, 4)
FUSED = ("sigmoid_gate_pack", "gated_norm_pack")
PLAIN = ("sigmoid", "silu", "mul", "rms_norm")
BOUNDS = {"alpha": 1.702, "limit": 7.0}


@pytest.fixture(scope="module", autouse=True)
def compiled():
    packs = [Kernel.of(n, C=C, coding=k) for n in FUSED for C in WIDTHS for k in KINDS]
    packs += [Kernel.of("pack", C=C, coding=coding) for C in WIDTHS for coding in KINDS]
    oai = [Kernel.of("swiglu_pack", C=4, coding=k, act="oai") for k in ("int8", "f32")]
    rows = [Kernel.of("swiglu_pack_rows", C=4, coding="int8", act="oai"), Kernel.of("swiglu_oai")]
    library(ISAS[0]).prepare([*packs, *oai, *rows, *(Kernel.of(name) for name in PLAIN)])


def plain(name: str, *x: np.ndarray, **more: Any) -> np.ndarray:
    """A plain kernel on rows [rows, n]."""
    rows, n = x[0].shape
    out = Fenced(rows, n)
    places = dict(zip("xy", map(Fenced.of, x), strict=False))
    strides = {f"{key}_stride": n for key in (*places, "out")}
    run(Kernel.of(name), out=out, live=rows, n=n, **places, **strides, **more)
    return out.values.copy()


def parts(name: str, y: np.ndarray, gate: np.ndarray, w: np.ndarray) -> np.ndarray:
    """What the fused op packs: [rows, heads * d] by the plain kernels; y, gate [rows, heads, d]."""
    rows, heads, d = y.shape
    y, gate = y.reshape(-1, d), gate.reshape(-1, d)
    if name == "sigmoid_gate_pack":
        whole = plain("mul", y, plain("sigmoid", gate))
    else:
        normed = plain("rms_norm", y, w=Fenced.of(w[None]), eps=EPS)
        whole = plain("mul", normed, plain("silu", gate))
    return whole.reshape(rows, heads * d)


def fused(
    name: str, C: int, coding: str, y: np.ndarray, gate: np.ndarray, w: np.ndarray, threads: int
) -> bytes:
    """The tiles; the gate lies in the second half of heads twice as long."""
    rows, heads, d = y.shape
    n = heads * d
    packed = Packed(rows, n, C, coding)
    wide = np.full((rows, heads, 2 * d), np.nan, np.float32)
    wide[..., d:] = gate
    both = Fenced.of(wide.reshape(rows, 2 * n), 2 * n + 4)
    norm = {"w": Fenced.of(w[None]), "eps": EPS} if name == "gated_norm_pack" else {}
    run(
        Kernel.of(name, C=C, coding=coding), threads=threads,
        x=Fenced.of(y.reshape(rows, n), n + 8), gate=both.address + 4 * d, out=packed.memory,
        live=rows, n=n, head_dim=d, x_stride=n + 8, gate_stride=2 * n + 4, gate_head_stride=2 * d,
        **norm,
    )  # fmt: skip
    packed.check()
    return packed.memory.values.tobytes()


@pytest.mark.parametrize("d", [32, 96])
@pytest.mark.parametrize("coding", KINDS)
@pytest.mark.parametrize("C", WIDTHS)
@pytest.mark.parametrize("name", FUSED)
def test_bits_are_those_of_the_parts(rng, name, C, coding, d):
    y, gate = (3 * rng.standard_normal((ROWS, HEADS, d)).astype(np.float32) for _ in range(2))
    w = rng.standard_normal(d).astype(np.float32)
    wanted = pack("pack", C, coding, parts(name, y, gate, w)).memory.values.tobytes()
    for threads in (1, 2, 3, 7, 40):
        assert fused(name, C, coding, y, gate, w, threads) == wanted, f"{threads} threads"


def oai(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    n = gate.shape[1]
    out = Fenced(len(gate), n)
    run(
        Kernel.of("swiglu_oai"), x=Fenced.of(gate), y=Fenced.of(up), out=out, live=len(gate), n=n,
        x_stride=n, y_stride=n, out_stride=n, **BOUNDS,
    )  # fmt: skip
    return out.values.copy()


@pytest.mark.parametrize("n", [1, 37, 96])
def test_clamped_swiglu(rng, n):
    gate, up = (8 * rng.standard_normal((ROWS, n)).astype(np.float32) for _ in range(2))
    wanted = OPS["swiglu_oai"].reference(gate.astype(float), up.astype(float), **BOUNDS)
    np.testing.assert_allclose(oai(gate, up), wanted, rtol=1e-6, atol=1e-5)


def test_clamped_swiglu_at_its_limits():
    gate = np.array([[7, 50, np.inf, -50, -np.inf, np.nan, 1]], np.float32)
    up = np.array([[7, 50, np.inf, -50, 1, 1, np.nan]], np.float32)
    found = oai(gate, up)[0]
    assert found[0] == found[1] == found[2] and abs(found[0] - 56) < 1e-3
    assert abs(found[3]) < 1e-30 and np.isnan(found[5:]).all()


@pytest.mark.parametrize("coding", ["int8", "f32"])
def test_clamped_swiglu_packed(rng, coding):
    n = 96
    gate, up = (8 * rng.standard_normal((ROWS, n)).astype(np.float32) for _ in range(2))
    wanted = pack("pack", 4, coding, oai(gate, up)).memory.values.tobytes()
    for threads in (1, 3):
        found = pack("swiglu_pack", 4, coding, gate, up, threads=threads, **BOUNDS)
        assert found.memory.values.tobytes() == wanted


def test_clamped_swiglu_packed_by_expert(rng):
    n, rows = 64, np.array([5, 0, 4, -1])
    gate, up = (8 * rng.standard_normal((6, n)).astype(np.float32) for _ in range(2))
    packed = Packed(4, n, 4, "int8")
    run(
        Kernel.of("swiglu_pack_rows", C=4, coding="int8", act="oai"), threads=2,
        gate=Fenced.of(gate), up=Fenced.of(up), out=packed.memory, n=n, gate_stride=n,
        tiles=np.array([[2, *rows]], np.int32), n_tiles=np.array([1]), up_stride=n, **BOUNDS,
    )  # fmt: skip
    packed.check()
    values = np.where(rows[:, None] >= 0, oai(gate, up)[rows], 0).astype(np.float32)
    assert packed.bits() == pack("pack", 4, "int8", values).bits()
