"""The attention kernel by itself: cache types, shapes, masks, and bits that depend on nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from kernel_calls import ISAS, Fenced, fenced_twice, library, run

from runtime import ops
from runtime.backends.cpu.compile.isa import available
from runtime.backends.cpu.pages import from_plain, from_planes, to_plain, to_planes
from runtime.backends.cpu.sizes import attention_scratch_nbytes
from runtime.backends.plan.kernel import Kernel
from runtime.ops.attention import attention
from runtime.ops.kv_formats import KV_FORMATS, PAGE, kv_format, padded_head

TYPES = tuple(KV_FORMATS)
# Each type for K and for V, beside itself or another: the passes over K and over V know nothing
# of each other. All pairs are a sweep.
CODED = (("q8_0", "q8_0"), ("q6_0", "q5_1"), ("q5_1", "q6_0"), ("q5_0", "iq4_nl"),
         ("iq4_nl", "q4_1"), ("q4_1", "q5_0"), ("q4_0", "q4_0"))  # fmt: skip
FLOATS = (("f32", "f32"), ("f16", "bf16"), ("bf16", "f16"))
PAIRS = (*FLOATS, *CODED, ("f16", "f16"), ("f32", "q8_0"), ("q8_0", "f16"), ("f16", "f32"))


@dataclass
class Case:
    """Sequences with consecutive new tokens each, over pages of one layer."""

    heads: int = 4
    kv_heads: int = 2
    k_dim: int = 64
    v_dim: int = 64
    k_type: str = "f32"
    v_type: str = "f32"
    spans: tuple[tuple[int, int], ...] = ((5, 9), (40, 3), (0, 37))  # first new place, tokens
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False
    spread: float = 1.0  # scores of about this size
    rotation: int = 0
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    leaves: dict[str, ops.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(3)
        tokens = sum(n for _, n in self.spans)
        width = max(-(-(start + n) // PAGE) for start, n in self.spans) + 1
        pages = len(self.spans) * width + 2
        self.scale = self.spread * self.k_dim**-0.5
        self.arrays = {
            "q": rng.standard_normal((tokens, self.heads, self.k_dim)).astype(np.float32),
            "block_table": rng.permutation(pages)[: len(self.spans) * width]
            .reshape(len(self.spans), width)
            .astype(np.int32),
            "sequences": np.repeat(np.arange(len(self.spans)), [n for _, n in self.spans]),
            "places": np.concatenate([np.arange(s, s + n) for s, n in self.spans]),
            "sinks": rng.standard_normal(self.heads).astype(np.float32),
        }
        self.arrays["places"] = self.arrays["places"].astype(np.int32)
        for which, kind, dim in (("k", self.k_type, self.k_dim), ("v", self.v_type, self.v_dim)):
            shape = (pages, PAGE, self.kv_heads, dim)
            leaf = ops.state(which, shape, kv_format(kind).dtype, which)
            # Behind the dims of a head lie other numbers, which nobody may notice.
            whole = rng.standard_normal((*shape[:3], padded_head(dim))).astype(np.float32)
            memory = from_plain(whole, leaf)
            self.arrays[which] = np.ascontiguousarray(memory)
            self.arrays[f"{which}_plain"] = to_plain(memory, leaf)
            self.leaves[which] = leaf

    def expected(self) -> np.ndarray:
        a = self.arrays
        wide = [a[name].astype(np.float64) for name in ("q", "k_plain", "v_plain")]
        sinks = (a["sinks"].astype(np.float64),) if self.sinks else ()
        return attention.reference(
            *wide, a["block_table"], a["sequences"], a["places"], *sinks, scale=self.scale,
            window=self.window, softcap=self.softcap, rotation=self.rotation,
        )  # fmt: skip

    def tiles(self, most: int = 8) -> np.ndarray:
        found, first = [], 0
        for row, (_, n) in enumerate(self.spans):
            found += [(first + i, min(most, n - i), row, -1) for i in range(0, n, most)]
            first += n
        return np.array(found, np.int32)

    def run(
        self, n_threads: int = 1, tiles: np.ndarray | None = None, isa: str = ISAS[0]
    ) -> np.ndarray:
        """The kernel's result; every thread's part in turn. All memory is fenced."""
        a, tiles = self.arrays, self.tiles() if tiles is None else tiles
        tokens, used = len(a["q"]), self.heads * self.v_dim
        stride, step = used + 24, self.k_dim + 8
        q = Fenced.of(a["q"].reshape(-1, self.k_dim), step)  # the canaries between are NaN
        out = Fenced(tokens, used, stride)
        nbytes = attention_scratch_nbytes(self.heads, self.kv_heads, self.k_dim, self.v_dim)
        scratch = Fenced(n_threads, nbytes // 4)
        run(
            Kernel.of("attention", k_type=self.k_type, v_type=self.v_type), isa, n_threads, q=q,
            q_stride=self.heads * step, q_head_stride=step, k_pages=Fenced.like(a["k"]),
            v_pages=Fenced.like(a["v"]),
            k_page_bytes=self.kv_heads * PAGE * kv_format(self.k_type).token_nbytes(self.k_dim),
            v_page_bytes=self.kv_heads * PAGE * kv_format(self.v_type).token_nbytes(self.v_dim),
            block_table=Fenced.of(a["block_table"]), block_table_stride=a["block_table"].shape[1],
            tiles=Fenced.of(tiles), n_tiles=np.array([len(tiles)]),
            places=Fenced.of(a["places"][None]), out=out, out_stride=stride, n_heads=self.heads,
            n_kv_heads=self.kv_heads, k_dim=self.k_dim, v_dim=self.v_dim, scale=float(self.scale),
            window=self.window, softcap=float(self.softcap),
            sinks=Fenced.of(a["sinks"][None]) if self.sinks else 0, scratch=scratch,
            scratch_bytes=nbytes, rotation=self.rotation,
        )  # fmt: skip
        assert out.strays(tokens) == 0, "wrote between two tokens"
        assert scratch.strays(n_threads) == 0, "wrote past its scratch"
        return out.values.reshape(tokens, self.heads, self.v_dim).copy()


def check(case: Case, tolerance: float = 0.0, isa: str = ISAS[0]) -> None:
    coded = kv_format(case.k_type).coding or kv_format(case.v_type).coding
    tolerance = tolerance or (1e-7 if coded else 1e-11)  # q and weights have 15 bits
    found, wanted = fenced_twice(lambda threads: case.run(threads, isa=isa)), case.expected()
    error = np.sum((found - wanted) ** 2) / np.sum(wanted**2)
    assert error <= tolerance, f"normalised error {error:.2e}"


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    library(ISAS[0]).prepare([Kernel.of("attention", k_type=k, v_type=v) for k, v in PAIRS])


@pytest.mark.parametrize("k_type, v_type", PAIRS)
def test_cache_types(k_type: str, v_type: str) -> None:
    check(Case(k_type=k_type, v_type=v_type))


@pytest.mark.sweep
@pytest.mark.parametrize("k_type", TYPES)
@pytest.mark.parametrize("v_type", TYPES)
def test_all_pairs_of_cache_types(k_type: str, v_type: str) -> None:
    check(Case(k_type=k_type, v_type=v_type))


@pytest.mark.parametrize("heads, kv_heads", [(3, 3), (4, 2), (6, 2), (7, 1), (16, 2), (16, 1)])
@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_grouped_heads(heads: int, kv_heads: int, kind: str) -> None:
    check(Case(heads=heads, kv_heads=kv_heads, k_type=kind, v_type=kind))


def of_sizes(k_dim: int, v_dim: int, kind: str, **more: Any) -> Case:
    return Case(k_dim=k_dim, v_dim=v_dim, k_type=kind, v_type=kind, **more)


@pytest.mark.parametrize("k_dim, v_dim", [(8, 8), (32, 32), (40, 40), (80, 80), (128, 128),
                                          (96, 64), (192, 128), (256, 256), (14, 14), (20, 28),
                                          (100, 100), (112, 72), (1, 3), (255, 241)])  # fmt: skip
@pytest.mark.parametrize("kinds", (*FLOATS, *CODED))
def test_head_sizes(k_dim: int, v_dim: int, kinds: tuple[str, str]) -> None:
    sizes = {"k_dim": k_dim, "v_dim": v_dim, "k_type": kinds[0], "v_type": kinds[1]}
    check(Case(**sizes))
    check(Case(**sizes, spans=((70, 1),)))


@pytest.mark.parametrize("dim, block", [(64, 64), (100, 64), (128, 32), (14, 8)])
def test_results_rotated_back(dim: int, block: int) -> None:
    check(of_sizes(dim, dim, "q8_0", rotation=block))


SHORT = ((5, 4), (40, 3))


@pytest.mark.parametrize("kind", ["f32", "q8_0", "q4_0"])
def test_every_remainder_of_head_sizes(kind: str) -> None:
    """K and V of other sizes, both in every remainder of 64."""
    for n in range(1, 65):
        check(of_sizes(n, n * 7 % 64 + 1, kind, spans=SHORT))


@pytest.mark.sweep
@pytest.mark.parametrize("isa", available())
@pytest.mark.parametrize("kind", TYPES)
def test_every_head_size_on_every_processor(kind: str, isa: str) -> None:
    for n in range(1, 257):
        check(of_sizes(n, n * 7 % 256 + 1, kind, spans=SHORT), isa=isa)


@pytest.mark.parametrize("window", [1, 2, 31, 32, 33, 50, 1000])
def test_window(window: int) -> None:
    check(Case(window=window, spans=((0, 80), (90, 10), (200, 1))))


@pytest.mark.parametrize("softcap, spread", [(30.0, 1.0), (50.0, 30.0), (0.5, 1.0)])
def test_softcap(softcap: float, spread: float) -> None:
    check(Case(softcap=softcap, spread=spread))


def test_sinks() -> None:
    check(Case(sinks=True))
    gpt = Case(heads=16, sinks=True, window=128, spans=((0, 300), (700, 3), (127, 1), (128, 1)))
    check(gpt)  # eight query heads a KV head, a window of four pages
    np.testing.assert_array_equal(bits(gpt.run(3)), bits(gpt.run(tiles=gpt.tiles(1))))
    check(Case(sinks=True, window=20, softcap=30.0, k_dim=40, v_dim=40))


def test_large_scores_and_a_distant_sink() -> None:
    case = Case(spread=40.0, sinks=True)
    case.arrays["sinks"][:] = [-math.inf, 200.0, 0.0, 60.0]
    check(case, 1e-9)  # scores near 100 are rounded by 4e-6


def test_long_context() -> None:
    check(Case(k_type="f16", v_type="f16", spans=((1500, 9), (3000, 1))))


VARIED = [
    Case(heads=6, kv_heads=2, window=w, sinks=bool(w), softcap=cap, k_type=t, v_type=t,
         k_dim=d, v_dim=d)
    for w, cap, t, d in [(0, 0.0, "f32", 40), (45, 0.0, "f16", 64), (0, 20.0, "q8_0", 64)]
]  # fmt: skip


@pytest.mark.parametrize("case", VARIED, ids=["plain", "window", "softcap"])
def test_bits_are_those_of_single_tokens(case: Case) -> None:
    alone = case.run(tiles=case.tiles(1))
    for most in (2, 3, 5, 8):
        np.testing.assert_array_equal(bits(case.run(tiles=case.tiles(most))), bits(alone))


@pytest.mark.parametrize("case", VARIED, ids=["plain", "window", "softcap"])
def test_bits_do_not_depend_on_threads(case: Case) -> None:
    alone = case.run()
    for n_threads in (2, 3, 64):  # 64: more threads than items, so that items are cut
        np.testing.assert_array_equal(bits(case.run(n_threads)), bits(alone))


@pytest.mark.parametrize("heads, kv_heads", [(16, 1), (8, 8), (5, 1)])
def test_bits_do_not_depend_on_the_register_block(heads: int, kv_heads: int) -> None:
    case = Case(heads=heads, kv_heads=kv_heads, k_type="f16", v_type="f16", spans=((70, 1),))
    alone = case.run()
    for n_threads in (2, 3, 4, 8, 16):
        np.testing.assert_array_equal(bits(case.run(n_threads)), bits(alone))


def bits(values: np.ndarray) -> np.ndarray:
    return values.view(np.uint32)


@pytest.mark.parametrize("k_type, v_type", [("f32", "f32"), ("f16", "f16"), ("bf16", "f16"),
                                            ("q8_0", "q8_0"), ("q6_0", "q5_1")])  # fmt: skip
def test_rows_not_written_yet_may_be_anything(k_type: str, v_type: str) -> None:
    case = Case(k_type=k_type, v_type=v_type, spans=((0, 1), (33, 5), (60, 9)))
    clean = case.run()
    seen = np.zeros(case.arrays["k_plain"].shape[:2], bool)
    for row, (start, n) in zip(case.arrays["block_table"], case.spans, strict=True):
        for place in range(start + n):
            seen[row[place // PAGE], place % PAGE] = True
    spoil(case, "k", ~seen)
    spoil(case, "v", ~seen)
    np.testing.assert_array_equal(bits(case.run()), bits(clean))


def spoil(case: Case, which: str, where: np.ndarray) -> None:
    """Every byte that K or V has of the tokens `where` becomes 0xFF: NaN in each float type."""
    leaf = case.leaves[which]
    planes = [np.ascontiguousarray(plane) for plane in to_planes(case.arrays[which], leaf)]
    for plane in planes:
        plane.view(np.uint8)[where] = 0xFF
    case.arrays[which][:] = from_planes(planes, leaf)


def test_a_nan_stays_in_its_row() -> None:
    case = Case()
    case.arrays["q"][3, 1, 5] = math.nan
    found = case.run()
    assert np.isnan(found[3, 1]).all()
    found[3, 1] = 0
    assert np.isfinite(found).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("window", [0, 6])
@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0", "q5_1"])
def test_what_is_not_finite_in_v_is_nothing_to_those_who_do_not_see_it(
    kind: str, window: int, bad: float
) -> None:
    case = Case(k_type=kind, v_type=kind, window=window, spans=((0, 40),))
    page, token = int(case.arrays["block_table"][0, 0]), 9
    clean = case.run()
    values = case.arrays["v_plain"].copy()
    values[page, token, :, 3] = bad
    case.arrays["v"] = np.ascontiguousarray(from_plain(values, case.leaves["v"]))
    found = case.run()
    last = token + window if window else 40
    assert not np.isfinite(found[token:last]).all(axis=(1, 2)).any()
    for rows in (slice(0, token), slice(last, 40)):
        np.testing.assert_array_equal(bits(found[rows]), bits(clean[rows]))
    np.testing.assert_array_equal(bits(case.run(tiles=case.tiles(1)))[:token], bits(found)[:token])


@pytest.mark.parametrize("isa", [name for name in ("generic", "avx2") if name in available()])
def test_other_instruction_sets(isa: str) -> None:
    for kind in ("f16", "q8_0"):
        check(of_sizes(64, 64, kind, heads=6, sinks=True, window=40, softcap=30.0), isa=isa)
    for dim in (40, 100, 7):
        case = of_sizes(dim, dim, "f16", heads=10)
        check(case, isa=isa)
        alone = case.run(tiles=case.tiles(1), isa=isa)
        np.testing.assert_array_equal(case.run(isa=isa), alone)
