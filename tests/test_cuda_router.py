"""The router's kernels on the simulator: which experts, in which order, with which weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cuda_calls import error, simulate, unset
from cuda_models import fake_cuda
from stored_tensors import Stored, file_of

from runtime import ops
from runtime.backends.cuda.kernels.router import PER_LANE, SCORINGS
from runtime.ops.dtypes import F32
from runtime.ops.elementwise import sigmoid
from runtime.ops.moe import normalize, softmax, take, top_k

NOWHERE = np.zeros(1, np.int32)


def _expected(
    logits: np.ndarray, k: int, scoring: str, normalized: bool, scale: float
) -> tuple[np.ndarray, np.ndarray]:
    ids = top_k.reference(logits, k=k)
    wide = logits.astype(np.float64)
    if scoring == "softmax_topk":
        weights = softmax.reference(take.reference(wide, ids))
    else:
        every = softmax.reference(wide) if scoring == "softmax" else sigmoid.reference(wide)
        weights = take.reference(every, ids)
    weights = normalize.reference(weights) if normalized else weights
    return ids, weights * scale


def _per(n: int) -> int:
    return next(per for per in PER_LANE if n <= 32 * per)


def _choose(
    logits: np.ndarray, k: int, scoring: str = "softmax", normalized: bool = False,
    scale: float = 1.0, numbers: np.ndarray = NOWHERE, stride: int = 0,
) -> tuple[np.ndarray, ...]:  # fmt: skip
    rows, n = len(logits), logits.shape[1] - stride
    ids, own = np.full((2, rows, k), -9, np.int32)
    weights = unset(rows, k)
    rest = n, k, SCORINGS.index(scoring), int(normalized), scale, int(len(numbers) > 1)
    call = logits, n + stride, ids, weights, numbers, own, *rest
    simulate("router", rows, *call, constants={"per": _per(n)})
    return ids, weights, own


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize(
    ("rows", "n", "k", "normalized", "scale"),
    [(2, 4, 4, True, 1.0), (3, 32, 1, False, 2.5), (2, 60, 32, False, 1.0), (1, 131, 8, True, 0.5)],
)
def test_router(rng, scoring: str, rows: int, n: int, k: int, normalized: bool, scale: float):
    logits = (3 * rng.standard_normal((rows, n + 3))).astype(np.float32)
    ids, weights, _ = _choose(logits, k, scoring, normalized, scale, stride=3)
    wanted, shares = _expected(logits[:, :n], k, scoring, normalized, scale)
    np.testing.assert_array_equal(ids, wanted)
    assert error(weights, shares) < 2e-6


def test_equal_logits_are_taken_from_the_first_on(rng):
    logits = rng.integers(0, 3, (4, 70)).astype(np.float32)
    logits[1] = 0
    logits[2] = np.where(np.arange(70) % 2, 0.0, -0.0)
    ids, _, _ = _choose(logits, 9)
    np.testing.assert_array_equal(ids, top_k.reference(logits, k=9))


def test_numbers_that_are_none_come_last_and_all_ids_are_experts():
    logits = np.full((2, 40), np.nan, np.float32)
    logits[0, [3, 30]] = -np.inf, 1
    ids, _, _ = _choose(logits, 4)
    np.testing.assert_array_equal(ids, [[30, 3, 0, 1], [0, 1, 2, 3]])


def test_a_device_numbers_its_own(rng):
    logits = rng.standard_normal((2, 8)).astype(np.float32)
    numbers = np.array([-1, 0, 1, -1, 2, 3, -1, 4], np.int32)
    ids, _, own = _choose(logits, 3, numbers=numbers)
    np.testing.assert_array_equal(own, numbers[ids])


@pytest.mark.parametrize(
    ("rows", "n", "k", "inner", "bias"),
    [(1, 40, 3, 36, True), (1, 5, 5, 2052, False), (9, 5, 2, 132, True)],
)
def test_product_and_choice_in_one_launch(rng, rows: int, n: int, k: int, inner: int, bias: bool):
    """Every block may be the last one; the tickets are 0 again, so it can run once more."""
    x, w, b = (rng.standard_normal(s).astype(np.float32) for s in ((rows, inner), (n, inner), (n,)))
    columns = 1 if rows == 1 else 8
    blocks = -(-rows // columns)
    tickets, logits = np.zeros(blocks, np.uint32), unset(rows, n)
    found: list[tuple[Any, ...]] = []
    for seed in (1, 2):
        ids, own = np.full((2, rows, k), -9, np.int32)
        weights = unset(rows, k)
        call = (w, x, b, logits, tickets, rows, inner // 4, int(bias), ids, weights, NOWHERE, own)
        constants = {"per": _per(n), "columns": columns}
        grid = -(-n // 2), blocks
        simulate("router_linear", grid, *call, n, k, 0, 1, 1.0, 0, constants=constants, seed=seed)
        assert not tickets.any()
        found.append((ids, weights, logits.copy()))
    exact = x.astype(np.float64) @ w.T.astype(np.float64) + (b if bias else 0)
    assert error(logits, exact) < 1e-6
    wanted, shares = _expected(logits, k, "softmax", True, 1.0)
    np.testing.assert_array_equal(found[0][0], wanted)
    assert error(found[0][1], shares) < 2e-6
    for first, second in zip(*found, strict=True):
        np.testing.assert_array_equal(first, second)


def test_a_token_alone_has_the_bits_it_has_among_others(rng):
    x, w = (rng.standard_normal(s).astype(np.float32) for s in ((3, 132), (5, 132)))
    found = []
    for given, columns in ((x, 8), (x[1:2], 1)):
        count = len(given)
        ids, logits, weights = np.zeros((2, count, 2), np.int32), unset(count, 5), unset(count, 2)
        call = w, given, w, logits, np.zeros(1, np.uint32), count, 33, 0, ids[0], weights
        rest = NOWHERE, ids[1], 5, 2, 0, 0, 1.0, 0
        constants = {"per": 4, "columns": columns}
        simulate("router_linear", (3, 1), *call, *rest, constants=constants)
        found.append((logits, weights))
    for among, alone in zip(*found, strict=True):
        np.testing.assert_array_equal(among[1], alone[0])


@pytest.mark.parametrize(
    ("tokens", "inner", "fused"), [(1, 64, True), (3, 64, True), (3, 36, False)]
)
def test_scores_and_choice_are_one_launch_of_a_plan(rng, tokens: int, inner: int, fused: bool):
    """Of a product of floats that nothing else reads; all of a mixture's choices of a device."""
    n, k = 12, 4
    w, b = (rng.standard_normal(s).astype(np.float32) for s in ((n, inner), (n,)))
    numbers = np.array([-1, 0, -1, 1, 2, 3, -1, 4, 5, -1, 6, 7], np.int32)
    x = rng.standard_normal((tokens, inner)).astype(np.float32)
    given = ops.step_input("x", (ops.Dim("tokens", tokens), inner), F32)
    scores = ops.matmul(given, ops.weight("w", w.shape, F32))
    scores = ops.add(scores, ops.weight("b", b.shape, F32))
    shares = ops.softmax(scores)
    ids = ops.top_k(shares, k=k)
    weights = ops.scale(ops.normalize(ops.take(shares, ids)), factor=2.5)
    own = ops.renumber(ids, ops.constant("numbers", numbers))
    backend = fake_cuda(file_of({"w": Stored(w), "b": Stored(b)}))
    program = backend.program(ops.Graph((weights, ids, own)))
    kernels = [call.kernel.name for call in program.plan.calls()]
    assert [name for name in kernels if "router" in name] == [
        "router_linear" if fused else "router"
    ]
    assert fused is (len(kernels) == 1)
    found = [np.array(out) for out in program.run({"x": x}, {"tokens": tokens})]
    backend.close()
    logits = (x.astype(np.float64) @ w.T + b).astype(np.float32)
    wanted, expected = _expected(logits, k, "softmax", True, 2.5)
    np.testing.assert_array_equal(found[1], wanted)
    np.testing.assert_array_equal(found[2], numbers[wanted])
    assert error(found[0], expected) < 2e-6
