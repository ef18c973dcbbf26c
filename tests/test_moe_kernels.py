"""Choice of experts, their tiles and the weighted sum against float64 and plain Python."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from kernel_calls import CANARY, ISAS, Fenced, library, run

from runtime.backends.plan.kernel import Kernel
from runtime.ops.registry import OPS

ROWS, LIVE = 5, 3
SHAPES = ((1, 1), (8, 2), (60, 8), (128, 8), (1024, 10), (37, 37), (16, 16), (33, 17))  # experts, k
SCORINGS, WIDTHS = ("softmax", "sigmoid", "softmax_topk"), (1, 4, 8, 16)
PLAIN = ("renumber", "top_k", "take", "softmax", "sigmoid", "normalize", "expert_sum", "row_scale")
THREADS = (1, 2, 3)


@pytest.fixture(scope="module", autouse=True)
def compiled():
    routers = [
        Kernel.of("router", scoring=scoring, normalize=normalize)
        for scoring, normalize in itertools.product(SCORINGS, (False, True))
    ]
    groups = [Kernel.of("expert_group", C=C) for C in WIDTHS]
    library(ISAS[0]).prepare([*routers, *groups, *map(Kernel.of, PLAIN)])


def scores(rng: np.random.Generator, rows: int, n: int) -> np.ndarray:
    return (3 * rng.standard_normal((rows, n))).astype(np.float32)


def top_k(x: np.ndarray, k: int, live: int, threads: int = 1, isa: str = ISAS[0]) -> np.ndarray:
    rows, n = x.shape
    source, out = Fenced.of(x, n + 3), Fenced(rows, k, dtype=np.int32)
    run(
        Kernel.of("top_k"), isa, threads, x=source, out=out, live=live, n=n, k=k, x_stride=n + 3
    )  # fmt: skip
    assert out.strays(live) == 0, "top_k wrote outside its rows"
    return out.values[:live].copy()


def by_rows(name: str, x: np.ndarray) -> np.ndarray:
    rows, n = x.shape
    out = Fenced(rows, n)
    run(
        Kernel.of(name), x=Fenced.of(x), out=out, live=rows, n=n, x_stride=n, out_stride=n
    )  # fmt: skip
    return out.values.copy()


def take(x: np.ndarray, ids: np.ndarray) -> np.ndarray:
    rows, k = ids.shape
    out = Fenced(rows + 1, k)
    run(
        Kernel.of("take"), threads=2, x=Fenced.of(x, x.shape[1] + 1), ids=Fenced.of(ids), out=out,
        live=rows, k=k, x_stride=x.shape[1] + 1,
    )  # fmt: skip
    assert out.strays(rows) == 0, "take wrote outside its rows"
    return out.values[:rows].copy()


def router(
    x: np.ndarray, k: int, scoring: str, normalize: bool, live: int = LIVE, threads: int = 1,
    scale: float = 1.0, isa: str = ISAS[0],
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    rows, n = x.shape
    ids, weights = Fenced(rows, k, dtype=np.int32), Fenced(rows, k)
    tiles, n_tiles = Fenced(rows * k, 2, dtype=np.int32), Fenced(1, 2, dtype=np.int32)
    run(
        Kernel.of("router", scoring=scoring, normalize=normalize), isa, threads,
        logits=Fenced.of(x, n + 3), ids=ids, weights=weights, tiles=tiles, n_tiles=n_tiles,
        numbers=0, own=0, live=live, n_experts=n, k=k, logits_stride=n + 3, scale=scale,
    )  # fmt: skip
    assert ids.strays(live) == 0 and weights.strays(live) == 0, "router wrote outside its rows"
    assert tiles.strays(live * k) == 0 and n_tiles.values.view(np.int64)[0, 0] == live * k
    wanted = np.stack([ids.values[:live].ravel(), np.arange(live * k)], axis=1)
    assert np.array_equal(tiles.values[: live * k], wanted), "every choice is a tile"
    return ids.values[:live].copy(), weights.values[:live].copy()


def router_reference(
    x: np.ndarray, k: int, scoring: str, normalize: bool, scale: float
) -> tuple[np.ndarray, np.ndarray]:
    wide = x.astype(np.float64)
    ids = OPS["top_k"].reference(wide, k=k)
    if scoring == "softmax_topk":
        weights = OPS["softmax"].reference(np.take_along_axis(wide, ids, -1))
    else:
        weights = np.take_along_axis(OPS[scoring].reference(wide), ids, -1)
    return ids, scale * (OPS["normalize"].reference(weights) if normalize else weights)


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_top_k(rng, n, k):
    x = scores(rng, ROWS, n)
    wanted = OPS["top_k"].reference(x.astype(np.float64), k=k)[:LIVE]
    for threads in THREADS:
        assert np.array_equal(top_k(x, k, LIVE, threads), wanted)


@pytest.mark.parametrize("isa", ISAS)
def test_top_k_ties_and_special_values(rng, isa):
    inf, nan = np.inf, np.nan
    x = np.array([
        [0.0, -0.0, 0.0, -0.0, 0.0, -0.0, 0.0, -0.0],
        [-inf, -inf, 5, -inf, 5, 5, -inf, -inf],
        [nan, 1, nan, -inf, inf, -1, nan, inf],
        [nan] * 8,
        [-1e-45, 1e-45, -3e38, 3e38, 0, 1e-45, -1e-45, -3e38],
    ], np.float32)  # fmt: skip
    wanted = OPS["top_k"].reference(x.astype(np.float64), k=8)
    assert np.array_equal(top_k(x, 8, 5, isa=isa), wanted)
    many = rng.integers(0, 4, (ROWS, 300)).astype(np.float32)
    wanted = OPS["top_k"].reference(many, k=150)
    assert np.array_equal(top_k(many, 150, ROWS, isa=isa), wanted)


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_take(rng, n, k):
    x = scores(rng, ROWS, n)
    ids = rng.integers(0, n, (ROWS, k)).astype(np.int32)
    assert np.array_equal(take(x, ids), np.take_along_axis(x, ids, -1))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_router(rng, n, k, scoring, normalize):
    x = scores(rng, ROWS, n)
    wanted_ids, wanted = router_reference(x[:LIVE], k, scoring, normalize, 2.5)
    first = router(x, k, scoring, normalize, scale=2.5)
    assert np.array_equal(first[0], wanted_ids)
    np.testing.assert_allclose(first[1], wanted, rtol=3e-6, atol=1e-30)
    for threads in THREADS[1:]:
        again = router(x, k, scoring, normalize, threads=threads, scale=2.5)
        assert [a.tobytes() for a in again] == [a.tobytes() for a in first]


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize(("n", "k"), [(60, 8), (33, 17)])
def test_router_has_the_bits_of_the_plain_kernels(rng, n, k, scoring, normalize):
    x = scores(rng, ROWS, n)
    if scoring == "softmax_topk":
        ids = top_k(x, k, ROWS)
        weights = by_rows("softmax", take(x, ids))
    else:
        shares = by_rows(scoring, x)
        ids = top_k(shares, k, ROWS)
        weights = take(shares, ids)
    weights = by_rows("normalize", weights) if normalize else weights
    found = router(x, k, scoring, normalize, live=ROWS)
    assert np.array_equal(found[0], ids)
    assert found[1].tobytes() == weights.tobytes()


def own_numbers(rng: np.random.Generator, n: int) -> np.ndarray:
    """Of n experts every other one or so is here, numbered in order; the rest is -1."""
    here = rng.random(n) < 0.5
    return np.where(here, np.cumsum(here) - 1, -1).astype(np.int32)


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_renumber(rng, n, k):
    ids = rng.integers(0, n, (ROWS, k)).astype(np.int32)
    numbers = own_numbers(rng, n)
    for threads in THREADS:
        out = Fenced(ROWS, k, dtype=np.int32)
        run(
            Kernel.of("renumber"), ISAS[0], threads, ids=Fenced.of(ids),
            numbers=Fenced.of(numbers[None]), out=out, live=LIVE, k=k,
        )  # fmt: skip
        assert out.strays(LIVE) == 0
        assert np.array_equal(out.values[:LIVE], numbers[ids[:LIVE]])


@pytest.mark.parametrize("live", [0, 1])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_router_of_a_device_that_has_some_of_the_experts(rng, n, k, live):
    """The same ids and weights; own numbers, and tiles of no others."""
    x = scores(rng, 1, n)
    wanted_ids, weights = router(x, k, "softmax", True, live=1)
    for numbers in (own_numbers(rng, n), np.full(n, -1, np.int32), np.arange(n, dtype=np.int32)):
        for threads in THREADS:
            ids, own = (Fenced(1, k, dtype=np.int32) for _ in range(2))
            found, tiles = Fenced(1, k), Fenced(k, 2, dtype=np.int32)
            n_tiles = Fenced(1, 2, dtype=np.int32)
            run(
                Kernel.of("router", scoring="softmax", normalize=True), ISAS[0], threads,
                logits=Fenced.of(x), ids=ids, weights=found, tiles=tiles, n_tiles=n_tiles,
                numbers=Fenced.of(numbers[None]), own=own, live=live, n_experts=n, k=k,
                logits_stride=n, scale=1.0,
            )  # fmt: skip
            chosen = numbers[wanted_ids[0]]
            wanted = [[e, i] for i, e in enumerate(chosen.tolist()) if e >= 0] if live else []
            count = int(n_tiles.values.view(np.int64)[0, 0])
            assert tiles.values[:count].tolist() == wanted and tiles.strays(count) == 0
            assert own.strays(live) == ids.strays(live) == found.strays(live) == 0
            if live:
                assert np.array_equal(ids.values, wanted_ids) and np.array_equal(
                    own.values[0], chosen
                )
                assert found.values.tobytes() == weights.tobytes()


def test_router_without_fused_multiply_add(rng):
    x = scores(rng, ROWS, 60)
    ids, weights = router(x, 8, "softmax", True, isa="generic")
    wanted_ids, wanted = router_reference(x[:LIVE], 8, "softmax", True, 1.0)
    assert np.array_equal(ids, wanted_ids)
    np.testing.assert_allclose(weights, wanted, rtol=3e-6)


@pytest.mark.parametrize("scoring", SCORINGS)
def test_router_chooses_where_scores_saturate(scoring):
    """Logits that differ are told apart, even where their float32 scores are equal."""
    x = np.array([[500, 20, 30, 25, -500, -400, -600, -300]], np.float32)
    ids, weights = router(x, 7, scoring, True, live=1)
    assert ids.tolist() == [[0, 2, 3, 1, 7, 5, 4]]
    assert np.isfinite(weights).all() and abs(weights.sum() - 1) < 1e-6


def test_router_gives_valid_experts_for_any_scores():
    x = np.array([[np.nan] * 8, [np.inf] * 8, [-np.inf] * 8], np.float32)
    for scoring in SCORINGS:
        ids, _ = router(x, 4, scoring, True, live=3)
        assert ids.tolist() == [[0, 1, 2, 3]] * 3


def tiles_of(ids: np.ndarray, C: int, experts: int) -> list[list[int]]:
    """The tiles as records, said plainly."""
    records = []
    for expert in range(experts):
        rows = np.flatnonzero(ids.ravel() == expert).tolist()
        for at in range(0, len(rows), C):
            cut = rows[at : at + C]
            records.append([expert, *cut, *[-1] * (C - len(cut))])
    return records


def expert_group(ids: np.ndarray, C: int, experts: int, live: int, capacity: int, threads: int):
    k = ids.shape[1]
    tiles, n_tiles = Fenced(capacity, 1 + C, dtype=np.int32), Fenced(1, 2, dtype=np.int32)
    run(
        Kernel.of("expert_group", C=C), threads=threads, ids=Fenced.of(ids), tiles=tiles,
        n_tiles=n_tiles, live=live, n_experts=experts, k=k, scratch=Fenced(experts + 1, 2),
    )  # fmt: skip
    count = int(n_tiles.values.view(np.int64)[0, 0])
    assert tiles.strays(count) == 0 and n_tiles.strays(1) == 0, "expert_group wrote too much"
    return tiles.values[:count].tolist()


@pytest.mark.parametrize("C", WIDTHS)
@pytest.mark.parametrize(("tokens", "k", "experts"), [(1, 1, 1), (7, 2, 8), (40, 8, 60), (9, 4, 4)])
def test_expert_group(rng, C, tokens, k, experts):
    ids = rng.permuted(np.tile(np.arange(experts), (tokens, 1)), axis=1)[:, :k].astype(np.int32)
    capacity = tokens * k // C + min(experts, tokens * k)
    for live, threads in itertools.product((0, 1, tokens), (1, 3)):
        given = ids.copy()
        given.view(np.uint32)[live:] = CANARY
        found = expert_group(given, C, experts, live, capacity, threads)
        assert found == tiles_of(ids[:live], C, experts)


@pytest.mark.parametrize("C", WIDTHS)
def test_expert_group_leaves_out_experts_of_other_devices(rng, C):
    for least in (-3, -1, 5):  # many are elsewhere, some, all but one
        ids = np.maximum(rng.integers(least, 6, (11, 4)), -1).astype(np.int32)
        ids = np.where(ids < least, -1, ids).astype(np.int32)
        assert expert_group(ids, C, 6, 11, 44 // C + 6, 3) == tiles_of(ids, C, 6)
    none = np.full((5, 2), -1, np.int32)
    assert expert_group(none, C, 6, 5, 10 // C + 6, 1) == []


def test_expert_group_of_one_popular_expert():
    ids = np.full((21, 1), 5, np.int32)
    assert expert_group(ids, 8, 6, 21, 4, 2) == tiles_of(ids, 8, 6)


def expert_sum(
    y, weights, add, live: int, threads: int, isa: str = ISAS[0], shared=None, gate=None, ids=None
) -> np.ndarray:  # fmt: skip
    rows, k, n = y.shape
    out = Fenced(rows, n, n + 3)
    terms = {"shared": (shared, n + 2), "gate": (gate, 3), "add": (add, n + 5)}
    places = {name: 0 if x is None else Fenced.of(x, m) for name, (x, m) in terms.items()}
    run(
        Kernel.of("expert_sum"), isa, threads, y=Fenced.of(y.reshape(rows, -1)),
        weights=Fenced.of(weights), ids=0 if ids is None else Fenced.of(ids), out=out, live=live,
        n=n, k=k, out_stride=n + 3, **places,
        **{f"{name}_stride": m for name, (_, m) in terms.items()},
    )  # fmt: skip
    assert out.strays(live) == 0, "expert_sum wrote outside its rows"
    return out.values[:live].copy()


@pytest.mark.parametrize("isa", ISAS)
def test_expert_bias_of_experts_that_are_elsewhere(rng, isa):
    """Rows of those may hold anything, but nothing outside of the biases is read."""
    k, n = 3, 37
    y, bias = (rng.standard_normal(s).astype(np.float32) for s in ((ROWS * k, n), (4, n)))
    ids = rng.integers(-1, 4, (ROWS, k)).astype(np.int32)
    here = ids[:LIVE].ravel() >= 0
    wanted = y[: LIVE * k] + bias[ids[:LIVE].ravel()]
    for threads in THREADS:
        out = Fenced(ROWS * k, n)
        run(
            Kernel.of("expert_bias"), isa, threads, y=Fenced.of(y), bias=Fenced.of(bias),
            ids=Fenced.of(ids), out=out, live=LIVE * k, n=n, y_stride=n, out_stride=n,
        )  # fmt: skip
        assert out.strays(LIVE * k) == 0
        assert np.array_equal(out.values[: LIVE * k][here], wanted[here])


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(("k", "n"), [(1, 1), (2, 16), (3, 37), (8, 160)])
def test_expert_sum(rng, k, n, residual):
    y = rng.standard_normal((ROWS, k, n)).astype(np.float32)
    weights = rng.random((ROWS, k)).astype(np.float32)
    add = rng.standard_normal((ROWS, n)).astype(np.float32) if residual else None
    wanted = OPS["expert_sum"].reference(y.astype(np.float64), weights.astype(np.float64))
    wanted = (wanted if add is None else wanted + add)[:LIVE]
    for isa in ISAS:
        first = expert_sum(y, weights, add, LIVE, 1, isa)
        np.testing.assert_allclose(first, wanted, rtol=1e-6, atol=2e-6)
    first = expert_sum(y, weights, add, LIVE, 1)
    for threads in THREADS[1:]:
        assert expert_sum(y, weights, add, LIVE, threads).tobytes() == first.tobytes()
    alone = expert_sum(y[1:2], weights[1:2], None if add is None else add[1:2], 1, 1)
    assert alone.tobytes() == first[1:2].tobytes()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_expert_sum_with_a_shared_expert(rng, gated, residual):
    """The bits of the kernels expert_sum, sigmoid, row_scale and add, one after the other."""
    k, n = 3, 101
    y = rng.standard_normal((ROWS, k, n)).astype(np.float32)
    weights = rng.random((ROWS, k)).astype(np.float32)
    shared, add = (rng.standard_normal((ROWS, n)).astype(np.float32) for _ in range(2))
    gate = rng.standard_normal((ROWS, 1)).astype(np.float32)
    scaled = Fenced.of(shared)
    if gated:
        run(
            Kernel.of("row_scale"), threads=2, x=Fenced.of(shared),
            y=Fenced.of(by_rows("sigmoid", gate), 5), out=scaled, live=ROWS, n=n, x_stride=n,
            y_stride=5, out_stride=n,
        )  # fmt: skip
    wanted = expert_sum(y, weights, None, ROWS, 1) + scaled.values + (add if residual else 0)
    for threads in THREADS:
        found = expert_sum(
            y, weights, add if residual else None, LIVE, threads, shared=shared,
            gate=gate if gated else None,
        )  # fmt: skip
        assert found.tobytes() == wanted[:LIVE].tobytes()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("k", "n"), [(1, 1), (3, 37), (8, 160)])
def test_expert_sum_leaves_out_experts_of_other_devices(rng, k, n, isa):
    """Whatever lies in their rows; the bits are those of the sum of the others alone."""
    y = rng.standard_normal((ROWS, k, n)).astype(np.float32)
    weights, add = rng.random((ROWS, k)).astype(np.float32), np.ones((ROWS, n), np.float32)
    ids = rng.integers(-1, 2, (ROWS, k)).astype(np.int32)
    ids[0] = -1
    zeros = np.where(ids[..., None] < 0, 0, y)
    wanted = expert_sum(zeros, weights, add, LIVE, 1, isa)
    for threads in THREADS:
        poisoned = np.where(ids[..., None] < 0, np.float32(np.nan), y)
        found = expert_sum(poisoned, weights, add, LIVE, threads, isa, ids=ids)
        assert found.tobytes() == wanted.tobytes()


def test_expert_sum_adds_in_the_order_of_ranks():
    y = np.array([[[1e8], [1.0], [-1e8]]], np.float32)
    assert expert_sum(y, np.ones((1, 3), np.float32), None, 1, 1).tolist() == [[0.0]]
