"""The IQ types: codes and scales against a plain search, special rows.

Their errors beside those of llama.cpp are in `test_quantising.py`.
"""

from __future__ import annotations

import numpy as np
import pytest
from kernel_calls import ISAS, library
from quantise_cases import errors, measured_rows

import runtime.gguf  # noqa: F401  (provides the code books)
from runtime.backends.cpu.quantising import Quantiser, quantisable
from runtime.ops.blocks import BLOCK_FORMATS, BlockFormat, count_of
from runtime.ops.codebooks import code_book
from runtime.ops.dtypes import DTYPES
from runtime.ops.quant_blocks import scales, struct_of
from runtime.ops.quants import dequantize

KINDS = [kind for kind in quantisable() if kind.startswith("iq")]
OTHER = "iq3_xxs"  # the type tested on the other instruction set


@pytest.fixture(scope="module")
def quantiser():
    with Quantiser(2, library(ISAS[0])) as made:
        made.prepare(list(KINDS))
        yield made


def difference(raw: np.ndarray, x: np.ndarray, kind: str) -> np.ndarray:
    return dequantize(raw, DTYPES[kind], x.shape).astype(np.float64) - x


def relative_error(raw: np.ndarray, x: np.ndarray, kind: str) -> float:
    return float(np.linalg.norm(difference(raw, x, kind)) / np.linalg.norm(x.astype(np.float64)))


def least_errors(
    row: BlockFormat, x: np.ndarray, w: np.ndarray, t: float | np.ndarray
) -> np.ndarray:
    """The least errors of the groups of one block, [groups], t being their scales or that of all.

    Everything that can be stored is tried; of the signs at most one that is not the element's.
    """
    groups = count_of(row.scale.steps, row) if row.scale.steps else 1
    t = np.broadcast_to(t, groups)
    if row.levels:
        wrong = x.reshape(groups, -1, 1) - t[:, None, None] * np.array(row.levels, np.float64)
        return (w.reshape(groups, -1) * (wrong**2).min(-1)).sum(-1)
    entries = code_book(row.book).astype(np.float64)
    x, w = (v.reshape(-1, 1, entries.shape[1]) for v in (x, w))
    t = np.repeat(t, len(x) // groups)[:, None, None]
    book = t * entries
    if row.down:
        shifted = [(w * (x - book - t * by) ** 2).sum(-1).min(-1) for by in (0.125, -0.125)]
        spans = np.stack(shifted).reshape(2, count_of(row.down, row), -1).sum(-1)
        return spans.min(0).reshape(groups, -1).sum(-1)
    costs = (w * (abs(x) - book) ** 2).sum(-1)
    right = costs.min(-1)
    assert row.signs
    if row.signs.width == 8:
        return right.reshape(groups, -1).sum(-1)
    wrong = (costs + (4 * w * abs(x) * book).min(-1)).min(-1)
    odd = (x < 0).reshape(32, 8).sum(-1) % 2 == 1
    right, wrong = (v.reshape(32, -1) for v in (right, wrong))
    one_wrong = right.sum(-1) + (wrong - right).min(-1)
    return np.where(odd, one_wrong, right.sum(-1)).reshape(groups, -1).sum(-1)


def test_another_instruction_set_finds_as_good_codes(quantiser):
    x, importance = measured_rows()
    with Quantiser(1, library(ISAS[-1])) as other:
        one, two = (errors(x, q(x, OTHER), OTHER, importance) for q in (quantiser, other))
    assert one == pytest.approx(two, rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_the_best_for_their_scales(quantiser, kind):
    row = BLOCK_FORMATS[kind]
    x = measured_rows()[0][32 : 36 if row.down else 44, :256].copy()
    raw = quantiser(x, kind)
    of_groups = scales(row, row.scale, raw.view(struct_of(row)).reshape(-1))
    blocks = x.reshape(len(of_groups), -1)
    wrong = (difference(raw, x, kind) ** 2).reshape(*of_groups.shape, -1).sum(-1)
    for block, found, error in list(zip(blocks, of_groups, wrong, strict=True))[:12]:
        wide = block.astype(np.float64)
        best = least_errors(row, wide, np.ones_like(wide), found.astype(np.float64))
        np.testing.assert_allclose(error, best, rtol=3e-4, atol=1e-5 * error.max())


@pytest.mark.parametrize("kind", KINDS)
def test_no_scales_are_much_better(quantiser, kind):
    """Scales of a block around the one found, with every step for each group."""
    row, (x, w) = BLOCK_FORMATS[kind], measured_rows()
    x, w = x[7:8, : row.block], w[: row.block]
    raw = quantiser(x, kind, w)
    weights = w / w.astype(np.float64).mean() + 0.25  # see Quantiser
    found = scales(row, row.scale._replace(steps=None), raw.view(struct_of(row)).reshape(-1))
    numbers = range(1)
    if row.scale.steps:
        numbers = range(64 if row.levels else 8 if row.down else 16)
    steps = [row.scale.times * n + row.scale.plus for n in numbers] if row.scale.steps else [1]
    steps = [n for n in steps if abs(n) > max(steps) / 8]
    least, wide = np.inf, x[0].astype(np.float64)
    for d in np.linspace(0.85, 1.15, 13) * float(found.reshape(-1)[0]):
        each = [least_errors(row, wide, weights, d * n) for n in steps]
        least = min(least, np.min(each, 0).sum())
    assert (weights * difference(raw, x, kind)[0] ** 2).sum() < 1.015 * least


@pytest.mark.parametrize("kind", KINDS)
def test_special_rows(quantiser, kind):
    """Zeros are exact and so are too small values, constants nearly; size does not matter."""
    x = measured_rows()[0][:8].copy()
    x[1], x[2], x[4, 256:] = 0, 0.3, 0
    raw = quantiser(x, kind)
    back = dequantize(raw, DTYPES[kind], x.shape)
    assert not back[1].any() and not back[4, 256:].any()
    assert relative_error(raw[2], x[2], kind) < 0.01
    larger = x[5:] * np.float32(1e4)
    one, other = (
        relative_error(raw[5:], x[5:], kind),
        relative_error(quantiser(larger, kind), larger, kind),
    )
    assert one == pytest.approx(other, rel=0.03)
    assert not difference(quantiser(x * np.float32(1e-30), kind), 0 * x, kind).any()
