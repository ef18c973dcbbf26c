"""A sweep as a picture: divergence against bytes, and speeds as bars by depth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

from runtime.quality.sweep import Row
from runtime.report.drawing import LINE, MARGIN, Drawing
from runtime.report.sweep import PLAIN, Table, nbytes

_POINT, _BEST = "#4e79a7", "#e15759"
_BARS = {"pp": ("#4e79a7", "prompt"), "tg": ("#f28e2b", "decode")}
_FADE = (1.0, 0.62, 0.38, 0.24)  # of each depth's colour
_LEFT, _TOP, _WIDTH, _LEAST = MARGIN + 66, 124, 430, 250  # of the chart, and its least height
_BAR, _GAP, _LENGTH = 13, 12, 190  # of bars: height, space between variants, longest
_FLOOR = 1e-8  # what is less is not told apart from nothing
_CHAR = 6.3  # width of a character of a label
_AWAY = [sign * 8 * n for n in range(12) for sign in (-1, 1)]  # how far up or down a label may be
_ASIDE = [8 + 24 * n for n in range(5)]  # and how far aside
_GRID, _QUIET = 'stroke="#e4e6ea"', 'fill="#5b626d"'
_HALO = 'paint-order="stroke" stroke="#ffffff" stroke-width="3"'
_END, _MIDDLE = 'text-anchor="end"', 'text-anchor="middle"'


def draw(table: Table) -> str:
    """The picture, SVG."""
    out = Drawing()
    kind = "cache types" if table.kind == "cache" else "weight types"
    out.text(MARGIN, 34, f"{table.model}: {kind}", 17, 'font-weight="bold"')
    out.text(MARGIN, 56, table.how, 12)
    out.text(MARGIN, 74, table.made_with, 12)
    out.width = MARGIN + _CHAR * max(len(table.how), len(table.made_with))
    depths = sum(name.startswith("tg") for name in table.rows[0].speeds)
    each = _BAR * max(depths, len(table.rows[0].speeds) - depths) + _GAP
    height = max(_LEAST, each * len(table.rows)) if table.rows[0].speeds else 330
    compared = [row for row in table.rows if row.perplexity.kl is not None]
    if compared:
        _chart(out, table, compared, height)
    right = _LEFT + _WIDTH + 40 if compared else MARGIN
    if table.rows[0].speeds:
        _speeds(out, table.rows, right, height)
    return out.svg()


def _kld(row: Row) -> float:
    assert row.perplexity.kl is not None, "the base is not drawn"
    return max(_FLOOR, row.perplexity.kl.kld.mean.value)


def _error(row: Row) -> float:
    assert row.perplexity.kl is not None, "the base is not drawn"
    return row.perplexity.kl.kld.mean.error


def _chart(out: Drawing, table: Table, rows: Sequence[Row], height: float) -> None:
    """Points over a logarithmic axis, and a line through those that nothing smaller beats."""
    klds = [_kld(row) for row in rows]
    low = math.floor(math.log10(min((kld for kld in klds if kld > _FLOOR), default=_FLOOR)))
    most_kld = max(kld + _error(row) for row, kld in zip(rows, klds, strict=True))
    high = max(low + 1, math.ceil(math.log10(most_kld)))
    most = max(row.nbytes for row in rows) * 1.12
    least = 0 if min(row.nbytes for row in rows) < most / 3 else most / 4
    bottom = _TOP + height

    def at(row: Row, kld: float | None = None) -> tuple[float, float]:
        share = (math.log10(_kld(row) if kld is None else kld) - low) / (high - low)
        x = _LEFT + _WIDTH * (row.nbytes - least) / (most - least)
        return x, min(bottom, bottom - height * share)

    per = " per token" if table.kind == "cache" else ""
    what = f"mean KL divergence from {table.rows[0].name} (log), against bytes{per}"
    out.text(_LEFT, _TOP - 14, what, 12, 'font-weight="bold"')
    out.width = max(out.width, _LEFT + _WIDTH)
    hollow = "; hollow: not rotated" if any(row.name.endswith(PLAIN) for row in rows) else ""
    note = f"red: of its size and below, the closest to {table.rows[0].name}{hollow}"
    out.text(_LEFT, bottom + 38, note, 11, f'fill="{_BEST}"')
    for power in range(low, high + 1):
        y = bottom - height * (power - low) / (high - low)
        out.path(f"M{_LEFT} {y:.1f} H{_LEFT + _WIDTH}", _GRID)
        out.text(_LEFT - 8, y + 4, f"{10.0**power:g}", 11, f"{_END} {_QUIET}")
    for tick in _ticks(least, most):
        x = _LEFT + _WIDTH * (tick - least) / (most - least)
        out.path(f"M{x:.1f} {_TOP} V{bottom}", _GRID)
        out.text(x, bottom + 18, nbytes(tick).replace(".00", ""), 11, f"{_MIDDLE} {_QUIET}")
    best = _unbeaten(rows)
    line = " L".join(f"{x:.1f} {y:.1f}" for x, y in map(at, best))
    out.path(f"M{line}", f'stroke="{_BEST}" stroke-width="1.2" stroke-dasharray="4 3"')
    taken: list[tuple[float, float, float, float]] = [(*at(row), 0, 0) for row in rows]
    for row in rows:
        x, y = at(row)
        colour = _BEST if row in best else _POINT
        assert row.perplexity.kl is not None, "the base is not drawn"
        value, error = row.perplexity.kl.kld.mean
        ends = [at(row, max(10.0**low, value + sign * error))[1] for sign in (-1, 1)]
        out.path(f"M{x:.1f} {ends[0]:.1f} V{ends[1]:.1f}", f'stroke="{colour}"')
        plain, nothing = row.name.endswith(PLAIN), " (about 0)" * (value <= _FLOOR)
        more = f'fill="{"#ffffff" if plain else colour}" stroke="{colour}" stroke-width="1.4"'
        out.parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" {more}/>')
        _label(out, row.name + nothing, x, y, taken)


def _label(
    out: Drawing, text: str, x: float, y: float, taken: list[tuple[float, float, float, float]]
) -> None:
    """Beside a point, where nothing is yet; a line leads to a label that is further away."""
    w, h = _CHAR * len(text) + 4, 13
    places = [
        (left, y - 6 + dy, side)
        for dx, dy in sorted(product(_ASIDE, _AWAY), key=lambda away: away[0] + abs(away[1]))
        for left, side in ((x + dx, 1), (x - w - dx, -1))
    ]

    def free(place: tuple[float, float, int]) -> bool:
        a, b, _ = place
        within = a > _LEFT and a + w < _LEFT + _WIDTH and b > _TOP - h / 2
        return within and not any(
            a < c + cw + 4 and c - 4 < a + w and b < d + dh + 3 and d - 3 < b + h
            for c, d, cw, dh in taken
        )

    a, b, side = next(filter(free, places), places[0])
    taken.append((a, b, w, h))
    out.text(a + 2, b + 10, text, 11, _HALO)
    end = a if side > 0 else a + w
    if abs(b + 6 - y) > h or abs(end - x) > _ASIDE[0]:
        out.path(f"M{x:.1f} {y:.1f} L{end:.1f} {b + 6:.1f}", f'stroke="{LINE}" stroke-width="0.7"')
    out.width = max(out.width, a + w)


def _unbeaten(rows: Sequence[Row]) -> list[Row]:
    """Those that diverge less than all that are as small, the smallest first."""
    found: list[Row] = []
    for row in sorted(rows, key=lambda row: (row.nbytes, _kld(row))):
        if not found or _kld(row) < _kld(found[-1]):
            found.append(row)
    return found


def _ticks(least: float, most: float) -> list[float]:
    """Some four round numbers of bytes between two."""
    step = 2.0 ** math.floor(math.log2((most - least) / 4))
    step *= 2 if (most - least) / step > 7 else 1
    return [n * step for n in range(math.ceil(least / step), int(most / step) + 1)]


def _speeds(out: Drawing, rows: Sequence[Row], left: float, height: float) -> None:
    """Bars side by side: prompts, decodes; of each variant one below another by depth."""
    names = [*rows[0].speeds]
    label = _CHAR * max(len(row.name) for row in rows) + 12
    each = height / len(rows)
    for n, row in enumerate(rows):
        y = _TOP + each * (n + 0.5)
        out.text(left + label - 8, y + 4, row.name, 11, _END)
    left += label
    for start, (colour, what) in _BARS.items():
        shown = [name for name in names if name.startswith(start)]
        if not shown:
            continue
        longest = max(row.speeds[name].value for row in rows for name in shown)
        title = f"{what}, tokens/s ({shown[0].partition(' ')[0]})"
        out.text(left, _TOP - 14, title, 12, 'font-weight="bold"')
        for n, row in enumerate(rows):
            y = _TOP + each * (n + 0.5) - _BAR * len(shown) / 2
            for name, fade in zip(shown, _FADE, strict=False):
                speed = row.speeds[name].value
                w = _LENGTH * speed / longest
                out.rect(left, y, w, _BAR - 2, colour, f'fill-opacity="{fade}"')
                out.text(
                    left + w + 5,
                    y + 9,
                    f"{speed:,.0f}" if speed >= 100 else f"{speed:.3g}",
                    10,
                    _QUIET,
                )
                y += _BAR
        x = left
        for name, fade in zip(shown, _FADE, strict=False):
            depth = name.partition("@ d")[2] or "0"
            out.rect(x, _TOP + height + 9, 12, 11, colour, f'fill-opacity="{fade}"')
            out.text(x + 16, _TOP + height + 18, f"depth {depth}", 11, _QUIET)
            x += 26 + _CHAR * len(f"depth {depth}")
        out.path(f"M{left} {_TOP} V{_TOP + height}", f'stroke="{LINE}"')
        left += _LENGTH + 76
        out.width = max(out.width, left - 30)
