"""Tokens that the device draws, against the samplers of the host."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_calls import simulate

from runtime.backends.base import Choice
from runtime.backends.cuda.kernels.sampling import MOST, PART
from runtime.text.samplers import filters
from runtime.text.samplers.candidates import Candidates, ordered, softmax


def _drawn(logits: np.ndarray, choices: list[Choice], seed: int = 1) -> np.ndarray:
    rows, stride = logits.shape
    parts = -(-stride // PART)
    keys = np.full((rows, parts, MOST), -(2**31), np.int32)
    ids = np.full((rows, parts, MOST), 0xCDCDCDCD, np.uint32)
    kinds = {"columns": "i4", "top_k": "i4"}
    given = {
        name: np.array([getattr(c, name) for c in choices], kinds.get(name, "f4"))
        for name in Choice._fields
    }
    call = logits, given["columns"], given["temperature"], given["top_k"], keys, ids, stride
    simulate("sample_parts", (parts, rows), *call, seed=seed)
    chosen, tokens = np.full((2, rows), -9, np.int32)
    rest = [given[name] for name in ("temperature", "top_k", "top_p", "min_p", "chance")]
    simulate("sample_merge", rows, keys, ids, *rest, chosen, tokens, parts, seed=seed)
    np.testing.assert_array_equal(tokens, np.maximum(chosen, 0))
    return chosen


def _expected(row: np.ndarray, choice: Choice) -> tuple[int, float]:
    """The token, and how far the chance is from where another one begins."""
    c = filters.top_k(Candidates(row[: choice.columns]), choice.top_k)
    if choice.temperature == 0:
        return int(ordered(c).ids[0]), 1.0
    c = filters.top_p(c, choice.top_p) if choice.top_p < 1 else c
    c = filters.min_p(c, choice.min_p) if choice.min_p else c
    c = ordered(filters.temperature(c, choice.temperature))
    sums = softmax(c.values).cumsum()
    at = min(int(sums.searchsorted(choice.chance * sums[-1], side="right")), len(sums) - 1)
    return int(c.ids[at]), float(abs(sums / sums[-1] - choice.chance).min())


@pytest.mark.parametrize("columns", [3, 70, 1500, PART + 40])
def test_tokens_are_those_of_the_host(rng, columns: int):
    """With every filter and without, and as much room behind the columns as there may be."""
    logits = (4 * rng.standard_normal((4, columns + 5))).astype(np.float32)
    logits[:, columns:] = np.nan
    top_k = min(8, columns)
    choices = [
        Choice(columns, 0.8, top_k, 0.9, 0.05, float(rng.random(dtype=np.float32))),
        Choice(columns, 3.0, top_k, 1.0, 0.0, 0.9),
        Choice(columns, 0.0, top_k, 0.5, 0.1, 0.7),
        Choice(columns, 9.0, top_k, 1.0, 0.2, 0.97),
    ]
    for row, choice, token in zip(logits, choices, _drawn(logits, choices), strict=True):
        wanted, far = _expected(row, choice)
        assert far > 1e-5, "a chance between two tokens: take another seed"
        assert token == wanted


def test_all_chances_together_are_the_distribution():
    logits = np.log(np.array([[0.1, 0.4, 0.2, 0.3]], np.float32)).repeat(10, 0)
    choices = [Choice(4, 1.0, 4, 1.0, 0.0, (i + 0.5) / 10) for i in range(10)]
    found = _drawn(logits, choices)
    np.testing.assert_array_equal(found, [1] * 4 + [3] * 3 + [2] * 2 + [0])


def test_equal_logits_are_in_the_order_of_their_ids(rng):
    logits = np.zeros((4, 300), np.float32)
    choices = [Choice(300, 1.0, 4, 1.0, 0.0, (i + 0.5) / 4) for i in range(4)]
    np.testing.assert_array_equal(_drawn(logits, choices), [0, 1, 2, 3])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_no_numbers_are_told(rng, bad: float):
    logits = rng.standard_normal((3, 40)).astype(np.float32)
    logits[1, 17] = bad
    choices = [Choice(40, 1.0, 2, 1.0, 0.0, 0.1), Choice(40, 1.0, 2), Choice(17, 0.0, 2)]
    found = _drawn(logits, choices)
    assert found[1] == -1 and (found[[0, 2]] >= 0).all()


def test_the_most_candidates():
    logits = np.linspace(1, 0, 200, dtype=np.float32)[None].repeat(2, 0)
    choices = [Choice(200, 1e6, MOST, 1.0, 0.0, 0.9999), Choice(200, 1.0, MOST, 0.0, 0.0, 0.9999)]
    np.testing.assert_array_equal(_drawn(logits, choices), [MOST - 1, 0])


@pytest.mark.parametrize("chance", [0.1, 0.55, 0.97])
def test_parts_beyond_the_lanes_of_a_warp(rng, chance: float):
    """Candidates of 40 parts, as the first launch leaves them; many are equal."""
    parts, k = 40, 6
    logits = rng.integers(0, 12, (parts, k)).astype(np.float32)
    logits = -np.sort(-logits, axis=1)
    keys, ids = np.zeros((1, parts, MOST), np.int32), np.zeros((1, parts, MOST), np.uint32)
    keys[0, :, :k] = logits.view(np.int32)
    ids[0, :, :k] = np.arange(parts * k).reshape(parts, k)
    choice = Choice(parts * k, 2.0, k, 1.0, 0.0, chance)
    numbers = [np.array([n], np.float32) for n in (2.0, 1.0, 0.0, chance)]
    chosen, tokens = np.full((2, 1), -9, np.int32)
    rest = numbers[0], np.array([k], np.int32), *numbers[1:], chosen, tokens, parts
    simulate("sample_merge", 1, keys, ids, *rest)
    wanted, far = _expected(logits.reshape(-1), choice)
    assert far > 1e-5
    assert chosen[0] == wanted


def test_a_chance_of_nearly_1_draws_nothing_that_cannot_be():
    logits = np.array([[5, 0, 0, -300]], np.float32)
    for top_k in (4, 40):
        (token,) = _drawn(logits, [Choice(4, 1.0, top_k, 1.0, 0.0, 0.99999999)])
        assert token in (1, 2)
