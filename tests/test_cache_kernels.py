"""Rope and cache writes, alone and as one kernel, on memory that is fenced."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
from kernel_calls import ISAS, Fenced, at_the_front, fenced_twice, library, run

from runtime import ops
from runtime.backends.cpu.compile.isa import available
from runtime.backends.cpu.pages import to_plain
from runtime.backends.plan.kernel import Kernel
from runtime.ops.kv_formats import KV_FORMATS, PAGE, kv_format, padded_head
from runtime.ops.registry import OPS

EPS = 1e-6
STYLES = ("neox", "normal")


@pytest.fixture(scope="module", autouse=True)
def compiled():
    writes = [
        Kernel.of("kv_write", which=which, type=kind) for which in "kv" for kind in KV_FORMATS
    ]
    posts = [
        Kernel.of("qkv_post", style="neox", k_type="q8_0", v_type="f16"),
        Kernel.of("qkv_post", style="none", k_type="f32", v_type="f32"),
    ]
    ropes = [Kernel.of("rope", style=style) for style in STYLES]
    library(ISAS[0]).prepare([*writes, *posts, *ropes, Kernel.of("rope_angles")])


def normed(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    wide = x.astype(np.float64)
    return wide / np.sqrt((wide * wide).mean(-1, keepdims=True) + EPS) * w


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


def block_nbytes(kind: str, dim: int) -> int:
    return PAGE * kv_format(kind).token_nbytes(dim)


def page_memory(kind: str, heads: int, dim: int) -> Fenced:
    memory = Fenced(1, N_PAGES * heads * block_nbytes(kind, dim) // 4, dtype=np.int32)
    memory.values[:] = 0
    return memory


def plain_pages(memory: Fenced, kind: str, heads: int, dim: int, which: str) -> np.ndarray:
    """float32 [slots, heads, dim]."""
    assert memory.strays(1) == 0
    leaf = ops.state("pages", (N_PAGES, PAGE, heads, dim), kv_format(kind).dtype, which)
    raw = np.ascontiguousarray(memory.values).view(np.uint8).reshape(N_PAGES, -1)
    return to_plain(raw, leaf).reshape(-1, heads, dim)


def write(
    which: str, kind: str, x: np.ndarray, isa: str = ISAS[0], threads: int = 1,
    memory: Fenced | None = None,
) -> np.ndarray:  # fmt: skip
    """All slots of pages after x[:, heads, dim] was written to SLOTS."""
    rows, heads, dim = x.shape
    memory = memory or page_memory(kind, heads, dim)
    run(
        Kernel.of("kv_write", which=which, type=kind), isa, threads, pages=memory, live=rows,
        x=Fenced.of(x.reshape(rows, -1), heads * dim + 3), kv_slots=Fenced.of(SLOTS),
        page_bytes=heads * block_nbytes(kind, dim), n_kv_heads=heads, head_dim=dim,
        x_stride=heads * dim + 3,
    )  # fmt: skip
    return plain_pages(memory, kind, heads, dim, which)


@pytest.mark.parametrize("kind", KV_FORMATS)
@pytest.mark.parametrize("which", ["k", "v"])
def test_kv_write(rng, which, kind):
    check_kv_write(rng, which, kind, (*range(1, 65), 100, 128))


def check_kv_write(rng, which: str, kind: str, dims: Iterable[int], isa: str = ISAS[0]) -> None:
    for dim in dims:
        x = (rng.standard_normal((6, 2, dim)) * [[1e-7], [50]]).astype(np.float32)
        wanted = np.zeros((N_PAGES * PAGE, 2, dim), np.float32)
        wanted[SLOTS[:, 0]] = kv_format(kind).rounded(x)
        found = fenced_twice(lambda n, x=x: write(which, kind, x, isa, n))
        assert np.array_equal(found, wanted), f"head size {dim}"
        behind, coding = padding(kind, x, which, isa), kv_format(kind).coding
        if coding is None or not (coding.has_minimum or coding.book):  # they have no exact zero
            assert not behind.any(), "what is behind a head's dims is zero"
        assert np.isfinite(behind).all()


def padding(kind: str, x: np.ndarray, which: str, isa: str) -> np.ndarray:
    """The dims of written tokens that the head does not have, in pages that were all ones."""
    dim = x.shape[2]
    whole = np.zeros((*x.shape[:2], padded_head(dim)), np.float32)
    memory = page_memory(kind, x.shape[1], dim)
    memory.values.view(np.uint8)[:] = 1
    write(which, kind, x, isa, memory=memory)
    return plain_pages(memory, kind, x.shape[1], whole.shape[2], which)[SLOTS[:, 0], :, dim:]


@pytest.mark.sweep
@pytest.mark.parametrize("isa", available())
@pytest.mark.parametrize("kind", KV_FORMATS)
def test_kv_write_of_every_head_size_on_every_processor(rng, kind, isa):
    for which in "kv":
        check_kv_write(rng, which, kind, range(1, 257), isa)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_kv_write_rounds_to_nearest_even(rng, kind):
    x = extreme_rows(rng)
    assert np.array_equal(write("v", kind, x)[SLOTS[:, 0]], kv_format(kind).rounded(x))


def extreme_rows(rng: np.random.Generator) -> np.ndarray:
    """[6, 2, 32] with f16's subnormals, ties, overflow and specials."""
    x = rng.standard_normal((6, 2, 32)) * 10.0 ** rng.integers(-9, 6, (6, 2, 32))
    x[0, 0, :8] = 65504, 65519.996, 65520, -1e9, np.inf, -np.inf, 2**-25, 2**-24 * 1.5
    x[1, 1, :4] = 1 + 2**-11, 1 + 3 * 2**-11, 2**-14 - 2**-25, -0.0
    return x.astype(np.float32)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_kv_write_without_fused_multiply_add(rng, kind):
    library("generic").prepare([Kernel.of("kv_write", which="k", type=kind)])
    y = extreme_rows(rng)
    assert write("k", kind, y, "generic").tobytes() == write("k", kind, y).tobytes()


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("style", "dim", "half"), [("neox", 64, 24), ("neox", 256, 32),
                                                    ("neox", 100, 50), ("neox", 1024, 20),
                                                    ("none", 64, 0), ("none", 37, 0)])  # fmt: skip
def test_qkv_post(rng, style, dim, half, norm):
    check_qkv_post(rng, style, dim, half, norm)


@pytest.mark.parametrize("dim, block", [(64, 64), (100, 64), (14, 8), (1024, 512), (2, 2)])
def test_qkv_post_rotates_quantised_heads(rng, dim, block):
    check_qkv_post(rng, "neox", dim, dim // 2, True, block)


@pytest.mark.parametrize("norm", [False, True])
def test_qkv_post_of_every_remainder(rng, norm):
    for dim in range(1, 65):
        check_qkv_post(rng, "neox", dim, dim // 2, norm)


def check_qkv_post(rng, style: str, dim: int, half: int, norm: bool, block: int = 0) -> None:
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
            **{n: Fenced.of(x.reshape(6, -1)) for n, x in (("k", k), ("v", v))},
            q=Fenced.like(apart),
            q_stride=heads * 2 * dim, q_head_stride=2 * dim, k_stride=kv_heads * dim,
            v_stride=kv_heads * dim, eps=EPS,
            q_norm=Fenced.of(weights[0]) if norm else 0,
            k_norm=Fenced.of(weights[1]) if norm else 0,
            angles=Fenced.like(angles) if half else 0, half=half, q_out=out,
            q_out_stride=heads * dim + 3, live=6,
            k_pages=memory[0], v_pages=memory[1], kv_slots=Fenced.of(SLOTS), n_heads=heads,
            n_kv_heads=kv_heads, head_dim=dim,
            k_page_bytes=kv_heads * block_nbytes(types[0], dim),
            v_page_bytes=kv_heads * block_nbytes(types[1], dim), k_rotation=block, v_rotation=0,
        )  # fmt: skip
        assert out.strays(6) == 0
        pages = zip(memory, types, "kv", strict=True)
        written = [plain_pages(m, kind, kv_heads, dim, w)[SLOTS[:, 0]] for m, kind, w in pages]
        return (out.values[:6].copy(), *written)

    def wanted(x: np.ndarray, w: np.ndarray) -> np.ndarray:
        y = normed(x, w) if norm else x.astype(np.float64)
        if style == "none":
            return y
        y = OPS["rope"].reference(y, angles.astype(np.float64), style=style)
        return OPS["hadamard"].reference(y, block=block) if block else y

    new_q, new_k, new_v = post(1)
    np.testing.assert_allclose(new_q.reshape(q.shape), wanted(q, weights[0]), rtol=2e-6, atol=2e-6)
    exact = wanted(k, weights[1]).astype(np.float32)
    step = np.abs(exact).max() / 127 if types[0] == "q8_0" else 2e-6
    np.testing.assert_allclose(new_k, kv_format(types[0]).rounded(exact), rtol=2e-6, atol=step)
    assert (np.abs(new_k - exact) <= 0.7 * step + 2e-6).all()
    assert np.array_equal(new_v, kv_format(types[1]).rounded(v))
    with at_the_front():
        again = post(3)
    for other, first in zip(again, (new_q, new_k, new_v), strict=True):
        assert other.tobytes() == first.tobytes()
