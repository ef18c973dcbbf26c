"""Norms, packed activations and embedding rows, on memory that is fenced."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from kernel_calls import ISAS, Fenced, fenced_twice, library, run
from packed_rows import Packed, pack
from tile_packs import pack_split
from tile_reference import quantise_activations

import runtime.gguf  # noqa: F401  (provides the code books)
from runtime.backends.cpu.tile.formats import READABLE
from runtime.backends.plan.kernel import Kernel
from runtime.ops.dtypes import DTYPES, nbytes_for
from runtime.ops.errors import BackendError
from runtime.ops.quants import dequantize

EPS = 1e-6
# formats whose rows are read by other instructions where there is no byte shuffle
OTHERWISE = ("iq4_nl", "q5_0", "q1_0", "iq2_xs")
NORM_LENGTHS = (1, 15, 16, 17, 63, 64, 100, 1024)


def _kernels() -> list[Kernel]:
    split = [Kernel.of(name, C=8, coding="split") for name in ("pack", "rms_norm_pack")]
    packs = [
        Kernel.of(name, C=C, coding=coding)
        for name, widths in (("pack", (1, 4, 8)), ("rms_norm_pack", (8,)))
        for C in widths
        for coding in ("int8", "f32")
    ]
    silu = {"act": "silu"}
    rows = [Kernel.of("get_rows", format=name) for name in READABLE]
    moe = [
        each
        for coding in ("int8", "f32")
        for each in (
            Kernel.of("pack_rows", C=4, coding=coding),
            Kernel.of("swiglu_pack", C=8, coding=coding, **silu),
            Kernel.of("swiglu_pack_rows", C=4, coding=coding, **silu),
        )
    ]
    plain = [Kernel.of(n) for n in ("rms_norm", "swiglu", "gather_rows")]
    return [*packs, *split, *rows, *moe, *plain]


@pytest.fixture(scope="module", autouse=True)
def compiled():
    library(ISAS[0]).prepare(_kernels())


def rms_norm(x: np.ndarray, w: np.ndarray | None = None) -> np.ndarray:
    wide = x.astype(np.float64)
    value = wide / np.sqrt((wide * wide).mean(-1, keepdims=True) + EPS)
    return value if w is None else value * w


def normed(x: np.ndarray, w: np.ndarray | None, isa: str = ISAS[0], threads: int = 1) -> np.ndarray:
    rows, n = x.shape
    out = Fenced(rows + 1, n, n + 3)
    run(
        Kernel.of("rms_norm"), isa, threads, x=Fenced.of(x, n + 5), out=out, live=rows, n=n,
        w=0 if w is None else Fenced.of(w[None]), x_stride=n + 5, out_stride=n + 3, eps=EPS,
    )  # fmt: skip
    assert out.strays(rows) == 0
    return out.values[:rows].copy()


@pytest.mark.parametrize("n", NORM_LENGTHS)
def test_rms_norm(rng, n):
    x, w = (rng.standard_normal(s).astype(np.float32) for s in ((5, n), n))
    np.testing.assert_allclose(normed(x, w), rms_norm(x, w), rtol=4e-7)
    np.testing.assert_allclose(normed(x, None), rms_norm(x), rtol=4e-7)
    for threads in (2, 3):
        assert normed(x, w, threads=threads).tobytes() == normed(x, w).tobytes()
    assert normed(x[1:2], w).tobytes() == normed(x, w)[1:2].tobytes()


def check_blocks(packed: Packed, x: np.ndarray) -> None:
    quants, side = packed.blocks()
    blocks = x.reshape(len(x), -1, 32)
    peak = np.abs(blocks).max(-1)
    live, wide = slice(0, len(x)), quants.astype(np.int64)
    d = side[live, :, 0].view(np.float32)
    finest = np.where(peak < 1e-30, 0, peak / np.float32(127)).astype(np.float32)
    assert (np.abs(d - finest) <= 0.03 * finest).all() and not d[peak < 1e-30].any()

    def error(q: np.ndarray, d: np.ndarray) -> np.ndarray:
        return ((q * d[..., None].astype(np.float64) - blocks) ** 2).sum(-1)

    best, scale = quantise_activations(
        np.where(peak[..., None] < 1e-30, 0, blocks).reshape(x.shape)
    )
    found, reference = error(wide[live], d), error(best.reshape(blocks.shape), scale)
    assert (found <= 1.0001 * reference + 1e-30).all(), "another scale rounds better"
    plain = np.rint(blocks / np.where(finest > 0, finest, 1)[..., None])
    assert (found <= 1.0001 * error(plain, finest) + 1e-30).all()
    assert np.array_equal(
        side[live, :, 1].view(np.float32), d * wide[live].sum(-1).astype(np.float32)
    )
    for at, part in ((2, wide), (3, wide[..., :16]), (4, wide[..., 16:])):
        assert np.array_equal(side[..., at], -8 * part.sum(-1))
    assert not quants[len(x) :].any() and not side[len(x) :].any(), "padding columns are zeros"


@pytest.mark.parametrize("C", [1, 4, 8])
@pytest.mark.parametrize("rows", [1, 4, 9])
def test_pack_int8(rng, C, rows):
    x = rng.standard_normal((rows, 96)).astype(np.float32)
    x[0, :32] = 0
    x[-1, 32:64] *= np.float32(1e-37)  # too small for a scale
    packed = pack("pack", C, "int8", x)
    check_blocks(packed, x)
    for threads in (2, 3, 7):
        assert pack("pack", C, "int8", x, threads=threads).bits() == packed.bits()
    assert packed.bits()[:rows] == pack("pack", 1, "int8", x).bits()


@pytest.mark.parametrize("n", [1, 16, 37, 96])
@pytest.mark.parametrize("C", [1, 4, 8])
def test_pack_f32(rng, C, n):
    x = rng.standard_normal((5, n)).astype(np.float32)
    packed = pack("pack", C, "f32", x)
    assert np.array_equal(packed.columns()[:5], x)
    assert not packed.columns()[5:].any(), "padding columns are zeros"
    assert pack("pack", C, "f32", x, threads=3).bits() == packed.bits()


def test_pack_split(rng):
    """Three bfloat16 pieces that add up to the value; bits of the tile's own reference."""
    x = (rng.standard_normal((9, 160)) * 10.0 ** rng.integers(-20, 20, (9, 160))).astype(np.float32)
    raw = pack("pack", 8, "split", x).memory.values.view(np.uint8).reshape(-1)
    assert np.array_equal(raw, pack_split(x, 8).reshape(-1).view(np.uint8))
    pieces = raw.view(np.uint16).reshape(2, 5, 3, 8, 32).astype(np.uint32) << 16
    whole = pieces.view(np.float32).astype(np.float64).sum(2).swapaxes(1, 2).reshape(16, 160)
    np.testing.assert_allclose(whole[:9], x, rtol=2e-7)
    assert not whole[9:].any(), "padding columns are zeros"
    w = Fenced.of(np.ones((1, 160), np.float32))
    found = [
        pack("rms_norm_pack", 8, "split", x, threads=n, w=w, eps=EPS).memory.values.tobytes()
        for n in (1, 2, 3)
    ]
    plain = pack("pack", 8, "split", normed(x, np.ones(160, np.float32)))
    assert set(found) == {plain.memory.values.tobytes()}


@pytest.mark.parametrize("coding", ["int8", "f32"])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_fused_packs_have_the_bits_of_their_parts(rng, coding, threads):
    n = 160
    x, u = (3 * rng.standard_normal((9, n)).astype(np.float32) for _ in range(2))
    w = rng.standard_normal(n).astype(np.float32)
    fused = pack("rms_norm_pack", 8, coding, x, threads=threads, w=Fenced.of(w[None]), eps=EPS)
    assert fused.bits() == pack("pack", 8, coding, normed(x, w)).bits()
    gated = Fenced(9, n)
    run(
        Kernel.of("swiglu"), x=Fenced.of(x), y=Fenced.of(u), out=gated, live=9, n=n, x_stride=n,
        y_stride=n, out_stride=n,
    )  # fmt: skip
    fused = pack("swiglu_pack", 8, coding, x, u, threads=threads)
    assert fused.bits() == pack("pack", 8, coding, gated.values.copy()).bits()


@pytest.mark.parametrize(
    ("name", "constants", "message"),
    [
        ("rms_nrom", {}, "no CPU kernel is called 'rms_nrom'"),
        ("rope", {}, "takes constants"),
        ("rope", {"style": "neo"}, "style is one of"),
    ],
)
def test_kernels_that_do_not_exist(name, constants, message):
    with pytest.raises(BackendError, match=message):
        library("generic").get(Kernel.of(name, **constants))


def test_without_fused_multiply_add(rng):
    library("generic").prepare(
        [
            *(Kernel.of("get_rows", format=kind) for kind in ("f16", "bf16", *OTHERWISE)),
            *(Kernel.of("pack", C=4, coding="int8"), Kernel.of("rms_norm")),
        ]
    )
    x = rng.standard_normal((5, 96)).astype(np.float32)
    assert pack("pack", 4, "int8", x, isa="generic").bits() == pack("pack", 4, "int8", x).bits()
    np.testing.assert_allclose(normed(x, None, "generic"), rms_norm(x), rtol=4e-7)
    for kind in OTHERWISE:
        raw = rng.integers(0, 256, (7, nbytes_for(DTYPES[kind], (512,)))).astype(np.uint8)
        found, wanted = get_rows(kind, raw, 512, "generic"), get_rows(kind, raw, 512)
        assert np.array_equal(found, wanted, equal_nan=True)
    for kind in ("f16", "bf16"):
        raw = rng.integers(0, 256, (7, 128)).astype(np.uint8)
        raw[:, 1::2] &= 0xBF  # no NaN: what becomes of its payload is the processor's affair
        assert get_rows(kind, raw, 64, "generic").tobytes() == get_rows(kind, raw, 64).tobytes()


@pytest.mark.parametrize("coding", ["int8", "f32"])
def test_gathered_packs(rng, coding):
    n, used = 64, 3
    tiles = np.array([[2, 5, 0, 4, -1], [7, 1, -1, -1, -1], [9, 9, 9, 9, 9]], np.int32)
    live = np.array([2], np.int64)
    rows = tiles[:2, 1:].ravel()
    wanted_rows = np.where(rows >= 0, rows, 0)

    def gathered(name: str, act: dict[str, str], **sources: Any) -> list[bytes]:
        packed = Packed(8, n, 4, coding)
        run(
            Kernel.of(name, C=4, coding=coding, **act), threads=2, tiles=Fenced.of(tiles[:2]),
            out=packed.memory, n_tiles=live, n=n, **sources,
        )  # fmt: skip
        packed.check()
        return packed.bits()

    def wanted(values: np.ndarray) -> list[bytes]:
        whole = pack("pack", 4, coding, np.where(rows[:, None] >= 0, values, 0).astype(np.float32))
        return whole.bits()

    x = rng.standard_normal((6, n)).astype(np.float32)
    per_token = gathered("pack_rows", {}, x=Fenced.of(x), x_stride=n, divisor=used)
    assert per_token == wanted(x[wanted_rows // used])
    per_row = gathered("pack_rows", {}, x=Fenced.of(x), x_stride=n, divisor=1)
    assert per_row == wanted(x[wanted_rows])
    up = rng.standard_normal((6, n)).astype(np.float32)
    gate = Fenced.of(x)
    found = gathered(
        "swiglu_pack_rows", {"act": "silu"}, gate=gate, up=Fenced.of(up), gate_stride=n,
        up_stride=n, alpha=0.0, limit=0.0,
    )  # fmt: skip
    whole = pack("swiglu_pack", 8, coding, x[wanted_rows], up[wanted_rows]).bits()
    zero = pack("pack", 4, coding, np.zeros((1, n), np.float32)).bits()[0]
    assert found == [w if r >= 0 else zero for w, r in zip(whole, rows, strict=True)]


def get_rows(
    kind: str, raw: np.ndarray, n: int, isa: str = ISAS[0], threads: int = 3
) -> np.ndarray:
    ids = np.array([[3], [6], [0], [3], [1]], np.int32)
    out = Fenced(5, n, n + 2)
    run(
        Kernel.of("get_rows", format=kind), isa, threads, matrix=Fenced.like(raw),
        ids=Fenced.of(ids), out=out, live=4, n=n, row_bytes=raw.shape[1], out_stride=n + 2,
    )  # fmt: skip
    assert out.strays(4) == 0
    return out.values[:4].copy()


@pytest.mark.parametrize("kind", READABLE)
def test_get_rows_is_exact(rng, kind):
    dtype, n = DTYPES[kind], 512
    raw = rng.integers(0, 256, (7, nbytes_for(dtype, (n,)))).astype(np.uint8)
    if kind in ("f32", "bf16"):  # random bits would be signalling NaNs, whose bits may change
        raw[:, dtype.nbytes - 1 :: dtype.nbytes] &= 0x3F
    with np.errstate(all="ignore"):
        wanted = dequantize(raw, dtype, (7, n))[[3, 6, 0, 3]]
    found = fenced_twice(lambda threads: get_rows(kind, raw, n, threads=threads))
    assert np.array_equal(found, wanted, equal_nan=True)


@pytest.mark.parametrize("n", [1, 15, 16, 17, 37])
@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
def test_get_rows_of_any_length(rng, kind, n):
    values = rng.standard_normal((8, n)).astype(np.float32)
    raw = {
        "f32": values, "f16": values.astype(np.float16),
        "bf16": (values.view(np.uint32) >> 16).astype(np.uint16),
    }[kind].view(np.uint8)  # fmt: skip
    wanted = dequantize(raw, DTYPES[kind], (8, n))[[3, 6, 0, 3]]
    found = fenced_twice(lambda threads: get_rows(kind, raw, n, threads=threads))
    assert np.array_equal(found, wanted)


def test_gather_rows(rng):
    x = rng.standard_normal((7, 37)).astype(np.float32)
    ids, out = np.array([[6], [0], [6], [2]], np.int32), Fenced(4, 37, 40)
    run(
        Kernel.of("gather_rows"), threads=2, x=Fenced.of(x, 50), ids=Fenced.of(ids), out=out,
        live=3, n=37, x_stride=50, out_stride=40,
    )  # fmt: skip
    assert out.strays(3) == 0 and np.array_equal(out.values[:3], x[[6, 0, 6]])
