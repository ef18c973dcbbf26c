"""Logits against exact ones: the worst row counts, and how many rows took another expert."""

from __future__ import annotations

import numpy as np


def row_errors(got: np.ndarray, want: np.ndarray) -> np.ndarray:
    """float64 [rows]: the squared error of each row over the square of the wanted row."""
    got, want = got.astype(np.float64), want.astype(np.float64)
    return ((got - want) ** 2).sum(1) / (want**2).sum(1)


def worst_row(got: np.ndarray, want: np.ndarray) -> float:
    """The largest of `row_errors`."""
    return float(row_errors(got, want).max())


def check_rows(
    got: np.ndarray, want: np.ndarray, limit: float, flips: int = 0, flipped: float = 1.0
) -> None:
    """All rows within `limit`, but for at most `flips` of them, which are within `flipped`.

    Such a row's token took another expert, because two scores of a router are closer than the
    arithmetic is exact. That moves a row, but not as far as an unrelated one, which is off by 2.
    """
    assert got.shape == want.shape and np.isfinite(got).all()
    errors = row_errors(got, want)
    beyond = np.flatnonzero(~(errors <= limit))
    worst = f"{len(beyond)} of {len(errors)} rows beyond {limit:.0e}, worst {errors.max():.1e}"
    assert len(beyond) <= flips, f"{worst}: rows {beyond[:10]}"
    assert errors.max() <= max(limit, flipped), worst
