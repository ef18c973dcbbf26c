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


def counted_as(n: int, what: str) -> str:
    """ "1 window", "2 windows"."""
    return f"{n} {what}" if n == 1 else f"{n} {what}s"
