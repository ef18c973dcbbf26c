"""Attention over f16 pages on the simulator: ragged tiles, grouped heads, windows, sinks."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_calls import error, simulate, unset

from runtime.ops.attention import attention as attention_op
from runtime.ops.kv_formats import PAGE, kv_format


def _pages(rng, sequences: int, places: int, heads: int, dim: int):
    """Plain f16 pages [page, token, head, dim] of k and v, and a table of scattered pages."""
    count = -(-places // PAGE)
    table = rng.permutation(sequences * count).reshape(sequences, count).astype(np.uint32)
    shape = (sequences * count, PAGE, heads, dim)
    k, v = (rng.standard_normal(shape).astype(np.float16) for _ in "kv")
    return k, v, table


def _attend(q, k, v, table, tiles, places, split_pages: int, window: int = 0, sinks=None):
    tokens, heads, dim = q.shape
    kv_heads = k.shape[2]
    group, splits = heads // kv_heads, -(-table.shape[1] // split_pages)
    tiles = np.array([[*t, 0] for t in tiles], np.uint32)
    packed_k = np.ascontiguousarray(k.transpose(0, 2, 1, 3))
    packed_v = np.ascontiguousarray(v.transpose(0, 2, 3, 1))
    shape = (len(tiles), kv_heads, splits, 16)
    partial, stats, out = unset(*shape, dim), unset(*shape, 2), unset(tokens, heads, dim)
    constants, factor = {"dim": dim}, dim**-0.5 / np.log(2)
    simulate(
        "attention", (splits, kv_heads, len(tiles)), q, packed_k, packed_v, table, tiles, places,
        partial, stats, heads * dim, table.shape[1], group, split_pages, factor, window,
        constants=constants,
    )  # fmt: skip
    simulate(
        "attention_merge", (16, kv_heads, len(tiles)), partial, stats, tiles, places,
        np.zeros(1, np.float32) if sinks is None else sinks, out, splits, heads * dim, group,
        split_pages, int(sinks is not None), constants=constants,
    )  # fmt: skip
    return out


def _expected(q, k, v, table, tiles, places, **attrs):
    sequences = np.concatenate([[t[0]] * t[2] for t in tiles])
    sinks = attrs.pop("sinks", None)
    wide = (a.astype(np.float64) for a in (q, k, v))
    scale = q.shape[2] ** -0.5
    more = () if sinks is None else (sinks.astype(np.float64),)
    return attention_op.reference(*wide, table, sequences, places, *more, scale=scale, **attrs)


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 1, 64), (3, 3, 64), (2, 1, 128)])
def test_one_token(rng, heads: int, kv_heads: int, dim: int):
    k, v, table = _pages(rng, 1, 160, kv_heads, dim)
    q = rng.standard_normal((1, heads, dim)).astype(np.float32)
    tiles, places = [(0, 0, 1)], np.array([150], np.int32)
    out = _attend(q, k, v, table, tiles, places, split_pages=2)
    assert error(out, _expected(q, k, v, table, tiles, places)) < 1e-3


def test_a_ragged_batch_with_window_and_sinks(rng):
    k, v, table = _pages(rng, 2, 64, 2, 64)
    q = rng.standard_normal((7, 8, 64)).astype(np.float32)
    sinks = rng.standard_normal(8).astype(np.float32)
    tiles = [(1, 0, 4), (1, 4, 1), (0, 5, 2)]
    places = np.array([30, 31, 32, 33, 34, 0, 1], np.int32)
    for split_pages, options in ((1, {}), (2, {"window": 20}), (2, {"sinks": sinks})):
        out = _attend(q, k, v, table, tiles, places, split_pages, **options)
        assert error(out, _expected(q, k, v, table, tiles, places, **options)) < 1e-3


def test_hidden_keys_leave_no_trace(rng):
    """Bits do not depend on what lies behind a row's place, nor on the other rows of its tile."""
    k, v, table = _pages(rng, 1, 96, 1, 64)
    q = rng.standard_normal((2, 4, 64)).astype(np.float32)
    places = np.array([39, 40], np.int32)
    both = _attend(q, k, v, table, [(0, 0, 2)], places, split_pages=2)
    k[table[0, 1], 9:], v[table[0, 1], 9:] = np.nan, 7  # places 41 on: any finite v, even k = NaN
    alone = _attend(q[1:], k, v, table, [(0, 0, 1)], places[1:], split_pages=2)
    np.testing.assert_array_equal(alone[0], both[1])


@pytest.mark.parametrize("which", ["k", "v"])
def test_rows_reach_their_slots(rng, which: str):
    x = rng.standard_normal((3, 2, 64)).astype(np.float32)
    pages = np.zeros((3, 2, PAGE, 64) if which == "k" else (3, 2, 64, PAGE), np.float16)
    slots = np.array([5, 70, 33], np.int32)
    simulate("kv_write", (2, 3), x, pages, slots, 128, constants={"which": which, "dim": 64})
    plain = pages.transpose(0, 2, 1, 3) if which == "k" else pages.transpose(0, 3, 1, 2)
    expected = np.zeros((3 * PAGE, 2, 64), np.float32)
    expected[slots] = kv_format("f16").rounded(x)
    np.testing.assert_array_equal(plain.reshape(3 * PAGE, 2, 64), expected)
