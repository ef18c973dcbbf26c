"""Numbers with their units, as a person reads them."""

from __future__ import annotations

from collections.abc import Sequence


def in_units(n: float, step: int, units: Sequence[str], decimals: Sequence[int]) -> str:
    """`n` in the first unit of which there are fewer than `step`, or in the last: "358.78 MiB".

    units: each `step` times the one before it. decimals: digits behind the point, of each unit.
    """
    at = 0
    while abs(n) >= step and at + 1 < len(units):
        n, at = n / step, at + 1
    return f"{n:.{decimals[at]}f} {units[at]}".rstrip()
