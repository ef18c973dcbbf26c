"""Norms, packed activations, embedding rows, rope and cache writes, on memory that is fenced."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from kernel_calls import ISAS, Fenced, library, run
from packed_rows import Packed, pack

import runtime.gguf  # noqa: F401  (provides the code books)
from runtime import ops
from runtime.backends.cpu.kernel import Kernel
from runtime.backends.cpu.kernels.compile import compile_kernel
from runtime.backends.cpu.pages import to_plain
from runtime.backends.cpu.signatures import CONSTANTS, kv_block_nbytes
from runtime.backends.cpu.tile.reference_pack import pack_split
from runtime.ops.attention import PAGE
from runtime.ops.dtypes import DTYPES, nbytes_for
from runtime.ops.errors import BackendError
from runtime.ops.quants import dequantize
from runtime.ops.registry import OPS
from runtime.ops.rounding import KV_TYPES, round_to

EPS = 1e-6
NORM_LENGTHS = (1, 15, 16, 17, 63, 64, 100, 1024)
STYLES = ("neox", "normal")


def _kernels() -> list[Kernel]:
    split = [Kernel.of(name, C=8, kind="split") for name in ("pack", "rms_norm_pack")]
    packs = [
        Kernel.of(name, C=C, kind=kind)
        for name, widths in (("pack", (1, 4, 8)), ("rms_norm_pack", (8,)))
        for C in widths
        for kind in ("int8", "f32")
    ]
    silu = {"act": "silu"}
    writes = [Kernel.of("kv_write", which=which, type=kind) for which in "kv" for kind in KV_TYPES]
    posts = [
        Kernel.of("qkv_post", style="neox", k_type="q8_0", v_type="f16"),
        Kernel.of("qkv_post", style="none", k_type="f32", v_type="f32"),
    ]
    rows = [Kernel.of("get_rows", format=name) for name in CONSTANTS["get_rows"]["format"]]
    ropes = [Kernel.of("rope", style=style) for style in STYLES]
    moe = [
        each
        for kind in ("int8", "f32")
        for each in (
            Kernel.of("pack_rows", C=4, kind=kind),
            Kernel.of("swiglu_pack", C=8, kind=kind, **silu),
            Kernel.of("swiglu_pack_rows", C=4, kind=kind, **silu),
        )
    ]
    plain = [Kernel.of(n) for n in ("rms_norm", "swiglu", "gather_rows", "rope_angles")]
    return [*packs, *split, *writes, *posts, *rows, *ropes, *moe, *plain]


@pytest.fixture(scope="module", autouse=True)
def compiled():
    library(ISAS[0]).prepare(_kernels())


def test_declared_arguments_are_those_of_the_kernels():
    program = """
import importlib, inspect
from runtime.backends.cpu.kernels import target
target.choose("generic")
from runtime.backends.cpu.signatures import CONSTANTS, FILE_OF, SIGNATURES
for name, arguments in SIGNATURES.items():
    module = importlib.import_module("runtime.backends.cpu.kernels." + FILE_OF[name])
    constants = {k: v[0] for k, v in CONSTANTS.get(name, {}).items()}
    found = tuple(inspect.signature(module.KERNELS[name](**constants)).parameters)
    assert found == (*arguments, "thread", "n_threads"), (name, found)
    assert set(module.KERNELS) == {k for k, f in FILE_OF.items() if f == FILE_OF[name]}
"""
    paths = "import sys; sys.path[:] = sys.argv[1:]\n"
    done = subprocess.run(
        [sys.executable, "-c", paths + program, *sys.path], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-500:]


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
    d = np.where(peak < 1e-30, 0, peak / np.float32(127)).astype(np.float32)
    live, wide = slice(0, len(x)), quants.astype(np.int64)
    assert np.array_equal(side[live, :, 0].view(np.float32), d)
    error = np.abs(wide[live] * d[..., None].astype(np.float64) - blocks)
    assert (error <= 0.50001 * d[..., None] + 1e-30).all()
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


@pytest.mark.parametrize("kind", ["int8", "f32"])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_fused_packs_have_the_bits_of_their_parts(rng, kind, threads):
    n = 160
    x, u = (3 * rng.standard_normal((9, n)).astype(np.float32) for _ in range(2))
    w = rng.standard_normal(n).astype(np.float32)
    fused = pack("rms_norm_pack", 8, kind, x, threads=threads, w=Fenced.of(w[None]), eps=EPS)
    assert fused.bits() == pack("pack", 8, kind, normed(x, w)).bits()
    gated = Fenced(9, n)
    run(
        Kernel.of("swiglu"), x=Fenced.of(x), y=Fenced.of(u), out=gated, live=9, n=n, x_stride=n,
        y_stride=n, out_stride=n,
    )  # fmt: skip
    fused = pack("swiglu_pack", 8, kind, x, u, threads=threads)
    assert fused.bits() == pack("pack", 8, kind, gated.values.copy()).bits()


@pytest.mark.parametrize(
    ("name", "constants", "message"),
    [
        ("rms_nrom", {}, "no CPU kernel is called 'rms_nrom'"),
        ("rope", {}, "takes the constants"),
        ("rope", {"style": "neo"}, "style is one of"),
    ],
)
def test_kernels_that_do_not_exist(name, constants, message):
    with pytest.raises(BackendError, match=message):
        compile_kernel(name, constants, "generic")


def test_without_fused_multiply_add(rng):
    library("generic").prepare(
        [
            *(Kernel.of("get_rows", format=kind) for kind in ("f16", "bf16")),
            *(Kernel.of("kv_write", which="k", type=kind) for kind in ("f16", "bf16")),
            *(Kernel.of("pack", C=4, kind="int8"), Kernel.of("rms_norm")),
        ]
    )
    x = rng.standard_normal((5, 96)).astype(np.float32)
    assert pack("pack", 4, "int8", x, isa="generic").bits() == pack("pack", 4, "int8", x).bits()
    np.testing.assert_allclose(normed(x, None, "generic"), rms_norm(x), rtol=4e-7)
    for kind in ("f16", "bf16"):
        raw = rng.integers(0, 256, (7, 128)).astype(np.uint8)
        raw[:, 1::2] &= 0xBF  # no NaN: what becomes of its payload is the processor's affair
        assert get_rows(kind, raw, 64, "generic").tobytes() == get_rows(kind, raw, 64).tobytes()
        y = extreme_rows(rng)
        assert write("k", kind, y, "generic").tobytes() == write("k", kind, y).tobytes()


def extreme_rows(rng: np.random.Generator) -> np.ndarray:
    """[6, 2, 32] with f16's subnormals, ties, overflow and specials."""
    x = rng.standard_normal((6, 2, 32)) * 10.0 ** rng.integers(-9, 6, (6, 2, 32))
    x[0, 0, :8] = 65504, 65519.996, 65520, -1e9, np.inf, -np.inf, 2**-25, 2**-24 * 1.5
    x[1, 1, :4] = 1 + 2**-11, 1 + 3 * 2**-11, 2**-14 - 2**-25, -0.0
    return x.astype(np.float32)


@pytest.mark.parametrize("kind", ["int8", "f32"])
def test_gathered_packs(rng, kind):
    n, used = 64, 3
    tiles = np.array([[2, 5, 0, 4, -1], [7, 1, -1, -1, -1], [9, 9, 9, 9, 9]], np.int32)
    live = np.array([2], np.int64)
    rows = tiles[:2, 1:].ravel()
    wanted_rows = np.where(rows >= 0, rows, 0)

    def gathered(name: str, act: dict[str, str], **sources: Any) -> list[bytes]:
        packed = Packed(8, n, 4, kind)
        run(
            Kernel.of(name, C=4, kind=kind, **act), threads=2, tiles=Fenced.of(tiles[:2]),
            out=packed.memory, n_tiles=live, n=n, **sources,
        )  # fmt: skip
        packed.check()
        return packed.bits()

    def wanted(values: np.ndarray) -> list[bytes]:
        whole = pack("pack", 4, kind, np.where(rows[:, None] >= 0, values, 0).astype(np.float32))
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
    whole = pack("swiglu_pack", 8, kind, x[wanted_rows], up[wanted_rows]).bits()
    zero = pack("pack", 4, kind, np.zeros((1, n), np.float32)).bits()[0]
    assert found == [w if r >= 0 else zero for w, r in zip(whole, rows, strict=True)]


def get_rows(kind: str, raw: np.ndarray, n: int, isa: str = ISAS[0]) -> np.ndarray:
    ids = np.array([[3], [6], [0], [3], [1]], np.int32)
    out = Fenced(5, n, n + 2)
    run(
        Kernel.of("get_rows", format=kind), isa, 3, table=raw, ids=Fenced.of(ids), out=out,
        live=4, n=n, row_bytes=raw.shape[1], out_stride=n + 2,
    )  # fmt: skip
    assert out.strays(4) == 0
    return out.values[:4].copy()


@pytest.mark.parametrize("kind", CONSTANTS["get_rows"]["format"])
def test_get_rows_is_exact(rng, kind):
    dtype, n = DTYPES[kind], 512
    raw = rng.integers(0, 256, (7, nbytes_for(dtype, (n,)))).astype(np.uint8)
    if kind in ("f32", "bf16"):  # random bits would be signalling NaNs, whose bits may change
        raw[:, dtype.nbytes - 1 :: dtype.nbytes] &= 0x3F
    with np.errstate(all="ignore"):
        wanted = dequantize(raw, dtype, (7, n))[[3, 6, 0, 3]]
    assert np.array_equal(get_rows(kind, raw, n), wanted, equal_nan=True)


def test_gather_rows(rng):
    x = rng.standard_normal((7, 37)).astype(np.float32)
    ids, out = np.array([[6], [0], [6], [2]], np.int32), Fenced(4, 37, 40)
    run(
        Kernel.of("gather_rows"), threads=2, x=Fenced.of(x, 50), ids=Fenced.of(ids), out=out,
        live=3, n=37, x_stride=50, out_stride=40,
    )  # fmt: skip
    assert out.strays(3) == 0 and np.array_equal(out.values[:3], x[[6, 0, 6]])


def test_rope_angles_far_away():
    positions = np.array([[0], [1], [7], [40_000], [131_072], [1_000_000]], np.int32)
    frequencies = (10_000.0 ** (-np.arange(20) / 20)).astype(np.float32)
    out = Fenced(7, 40)
    run(
        Kernel.of("rope_angles"), threads=3, positions=Fenced.of(positions), out=out, live=6,
        width=1, components=0, inv_freq=Fenced.of(frequencies[None]), half=20, mscale=1.25,
    )  # fmt: skip
    wanted = OPS["rope_angles"].reference(positions[:, 0], frequencies, magnitude=1.25)
    assert out.strays(6) == 0
    np.testing.assert_allclose(out.values[:6].reshape(6, 20, 2), wanted, rtol=6e-8, atol=1e-12)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(("half", "dim"), [(16, 32), (20, 40), (8, 40), (64, 128), (24, 64)])
def test_rope(rng, style, half, dim):
    x = rng.standard_normal((4, 3 * dim)).astype(np.float32)
    apart = np.full((4, 3, dim + 9), np.nan, np.float32)  # the heads of a view
    apart[..., :dim] = x.reshape(4, 3, dim)
    angles = rng.standard_normal((4, half, 2)).astype(np.float32)

    def rotated(threads: int) -> np.ndarray:
        out = Fenced(4, 3 * dim, 3 * dim + 1)
        run(
            Kernel.of("rope", style=style), threads=threads, x=apart, angles=angles, out=out,
            live=3, n_heads=3, head_dim=dim, half=half, x_stride=3 * (dim + 9),
            x_head_stride=dim + 9, out_stride=3 * dim + 1,
        )  # fmt: skip
        assert out.strays(3) == 0
        return out.values[:3].reshape(3, 3, dim).copy()

    wide = x[:3].reshape(3, 3, dim).astype(np.float64), angles[:3].astype(np.float64)
    wanted = OPS["rope"].reference(*wide, style=style)
    np.testing.assert_allclose(rotated(1), wanted, rtol=0, atol=1e-6)
    assert rotated(2).tobytes() == rotated(1).tobytes()


N_PAGES, SLOTS = 4, np.array([[70], [3], [127], [0], [33], [32]], np.int32)


def page_memory(kind: str, heads: int, dim: int) -> Fenced:
    memory = Fenced(1, N_PAGES * heads * kv_block_nbytes(kind, dim) // 4, dtype=np.int32)
    memory.values[:] = 0
    return memory


def plain_pages(memory: Fenced, kind: str, heads: int, dim: int, which: str) -> np.ndarray:
    """float32 [slots, heads, dim]."""
    assert memory.strays(1) == 0
    leaf = ops.state("pages", (N_PAGES, PAGE, heads, dim), DTYPES[kind])
    raw = np.ascontiguousarray(memory.values).view(np.uint8).reshape(N_PAGES, -1)
    return to_plain(raw, leaf, which).reshape(-1, heads, dim)


def write(which: str, kind: str, x: np.ndarray, isa: str = ISAS[0], threads: int = 1) -> np.ndarray:
    """All slots of pages after x[:, heads, dim] was written to SLOTS."""
    rows, heads, dim = x.shape
    memory = page_memory(kind, heads, dim)
    run(
        Kernel.of("kv_write", which=which, type=kind), isa, threads, pages=memory, live=rows,
        x=Fenced.of(x.reshape(rows, -1), heads * dim + 3), slots=Fenced.of(SLOTS),
        page_bytes=heads * kv_block_nbytes(kind, dim), n_kv_heads=heads, head_dim=dim,
        x_stride=heads * dim + 3,
    )  # fmt: skip
    return plain_pages(memory, kind, heads, dim, which)


@pytest.mark.parametrize("kind", KV_TYPES)
@pytest.mark.parametrize("which", ["k", "v"])
def test_kv_write(rng, which, kind):
    for dim in (32, 128) if kind == "q8_0" else (32, 24, 40):
        x = (rng.standard_normal((6, 2, dim)) * [[1e-7], [50]]).astype(np.float32)
        wanted = np.zeros((N_PAGES * PAGE, 2, dim), np.float32)
        wanted[SLOTS[:, 0]] = round_to(x, kind)
        assert np.array_equal(write(which, kind, x), wanted)
        assert np.array_equal(write(which, kind, x, threads=3), wanted)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_kv_write_rounds_to_nearest_even(rng, kind):
    x = extreme_rows(rng)
    assert np.array_equal(write("v", kind, x)[SLOTS[:, 0]], round_to(x, kind))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("style", "dim", "half"), [("neox", 64, 24), ("neox", 256, 32),
                                                    ("none", 64, 0)])  # fmt: skip
def test_qkv_post(rng, style, dim, half, norm):
    heads, kv_heads = 6, 2
    types = ("q8_0", "f16") if style == "neox" else ("f32", "f32")
    q, k, v = (rng.standard_normal((6, h, dim)).astype(np.float32) for h in (heads, 2, 2))
    apart = np.concatenate([q, np.full_like(q, np.nan)], -1)  # a view of q and something else
    weights = rng.standard_normal((2, 1, dim)).astype(np.float32)
    angles = rng.standard_normal((6, half, 2)).astype(np.float32)

    def post(threads: int) -> tuple[np.ndarray, ...]:
        memory = [page_memory(kind, kv_heads, dim) for kind in types]
        out = Fenced(7, heads * dim, heads * dim + 3)
        run(
            Kernel.of("qkv_post", style=style, k_type=types[0], v_type=types[1]), threads=threads,
            **{n: Fenced.of(x.reshape(6, -1)) for n, x in (("k", k), ("v", v))}, q=apart,
            q_stride=heads * 2 * dim, q_head_stride=2 * dim, k_stride=kv_heads * dim,
            v_stride=kv_heads * dim, eps=EPS,
            q_norm=Fenced.of(weights[0]) if norm else 0,
            k_norm=Fenced.of(weights[1]) if norm else 0,
            angles=angles, half=half, q_out=out, q_out_stride=heads * dim + 3, live=6,
            k_pages=memory[0], v_pages=memory[1], slots=Fenced.of(SLOTS), n_heads=heads,
            n_kv_heads=kv_heads, head_dim=dim,
            k_page_bytes=kv_heads * kv_block_nbytes(types[0], dim),
            v_page_bytes=kv_heads * kv_block_nbytes(types[1], dim),
        )  # fmt: skip
        assert out.strays(6) == 0
        pages = zip(memory, types, "kv", strict=True)
        written = [plain_pages(m, kind, kv_heads, dim, w)[SLOTS[:, 0]] for m, kind, w in pages]
        return (out.values[:6].copy(), *written)

    def wanted(x: np.ndarray, w: np.ndarray) -> np.ndarray:
        y = rms_norm(x, w) if norm else x.astype(np.float64)
        if style == "none":
            return y
        return OPS["rope"].reference(y, angles.astype(np.float64), style=style)

    new_q, new_k, new_v = post(1)
    np.testing.assert_allclose(new_q.reshape(q.shape), wanted(q, weights[0]), rtol=2e-6, atol=2e-6)
    exact = wanted(k, weights[1]).astype(np.float32)
    step = np.abs(exact).max() / 127 if types[0] == "q8_0" else 2e-6
    np.testing.assert_allclose(new_k, round_to(exact, types[0]), rtol=2e-6, atol=step)
    assert (np.abs(new_k - exact) <= 0.51 * step + 2e-6).all()
    assert np.array_equal(new_v, round_to(v, types[1]))
    for again, first in zip(post(3), post(1), strict=True):
        assert again.tobytes() == first.tobytes()
