"""A roofline as a picture: memory's slope and the units' ceilings, and a model's phases below."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from runtime.report.drawing import LINE, MARGIN, Drawing
from runtime.report.roofline import CLASSES, Point, Roofline
from runtime.report.roofline_labels import Labels, Mark
from runtime.units import counted_as

_COLOURS = ("#4e79a7", "#59a14f", "#b07aa1", "#f28e2b", "#e15759", "#76b7b2")
_LEFT, _TOP, _WIDTH, _HEIGHT = MARGIN + 58, 120, 620, 400  # of the chart
_GRID, _QUIET = 'stroke="#e4e6ea"', 'fill="#5b626d"'
_DECADES = 6  # of rates, at most: what is slower still is in the table alone
_END, _MIDDLE = 'text-anchor="end"', 'text-anchor="middle"'
_RING = 3.0  # pixels that a ring is wider than its mark
_SOLID, _DASHED = 'stroke-width="2"', 'stroke-width="1" stroke-dasharray="5 4"'
_LEAST = 0.005  # share of a phase's time from which a class is drawn
_ROW = 17
_COLUMNS = (
    ("phase", 0), ("what", 150), ("time", 290), ("of step", 345), ("GB/s", 410), ("GMAC/s", 480),
    ("MACs/byte", 560), ("of memory", 645), ("of units", 710),
)  # fmt: skip


def picture(found: Roofline) -> str:
    """SVG; each point tells its phase, its class and its figures."""
    out = Drawing()
    out.text(MARGIN, 34, found.title, 17, 'font-weight="bold"')
    read = ", ".join(f"{gb:.1f} GB/s by {counted_as(n, 'thread')}" for n, gb in _gb(found))
    out.text(MARGIN, 56, f"{found.how}; memory is read at {read}", 12)
    out.text(MARGIN, 76, "Left of the ridge memory bounds, right of it the units; above the slope "
             "is what caches give.", 12)  # fmt: skip
    chart = _Chart(found)
    _grid(out, chart)
    lines = _roofs(out, chart, found)
    points = sorted(_drawn(found), key=lambda p: -_share(found, p))
    labels = Labels(out, [_mark(out, chart, found, p, points[n:]) for n, p in enumerate(points)])
    for label, where in lines:
        getattr(labels, label)(*where)
    _legend(out, found)
    _table(out, found)
    return out.svg()


class _Chart:
    """Where figures lie: both axes are logarithmic, in whole decades."""

    def __init__(self, found: Roofline) -> None:
        points = _drawn(found)
        ridge = found.peak / found.bandwidth
        xs = [p.intensity for p in points] + [ridge]
        ys = [p.rate for p in points] + [*found.units.values()]
        self.x = math.floor(math.log10(min(xs) / 1.5)), math.ceil(math.log10(max(xs) * 2))
        self.y = math.floor(math.log10(min(ys) / 1.5)), math.ceil(math.log10(max(ys) * 1.3))

    def across(self, intensity: float) -> float:
        low, high = self.x
        return _LEFT + _WIDTH * (math.log10(intensity) - low) / (high - low)

    def up(self, rate: float) -> float:
        low, high = self.y
        return _TOP + _HEIGHT * (high - math.log10(rate)) / (high - low)


def _gb(found: Roofline) -> Iterator[tuple[int, float]]:
    for threads, rate in found.bandwidths.items():
        yield threads, rate / 1e9


def _share(found: Roofline, point: Point) -> float:
    """Of the time of its phase."""
    whole = sum(p.seconds for p in found.points if p.phase == point.phase)
    return point.seconds / whole if whole else 0.0


def _drawn(found: Roofline) -> list[Point]:
    """Points with a place in the chart, and enough time to matter."""
    least = found.peak / 10**_DECADES
    return [
        p for p in found.points if p.intensity and p.rate > least and _share(found, p) >= _LEAST
    ]


def _grid(out: Drawing, chart: _Chart) -> None:
    for power in range(chart.x[0], chart.x[1] + 1):
        x = chart.across(10.0**power)
        out.path(f"M{x:.1f} {_TOP}v{_HEIGHT}", _GRID)
        out.text(x, _TOP + _HEIGHT + 17, f"{10.0**power:g}", 11, f"{_MIDDLE} {_QUIET}")
    for power in range(chart.y[0], chart.y[1] + 1):
        y = chart.up(10.0**power)
        out.path(f"M{_LEFT} {y:.1f}h{_WIDTH}", _GRID)
        out.text(_LEFT - 7, y + 4, f"{10.0**power / 1e9:g}", 11, f"{_END} {_QUIET}")
    out.text(_LEFT, _TOP - 12, "GMAC/s", 12, f'font-weight="bold" {_MIDDLE}')
    out.text(_LEFT + _WIDTH, _TOP + _HEIGHT + 36, "multiply-adds per byte of memory", 12,
             f'font-weight="bold" {_END}')  # fmt: skip
    out.width = max(out.width, _LEFT + _WIDTH)


def _roofs(out: Drawing, chart: _Chart, found: Roofline) -> list[tuple[str, tuple[Any, ...]]]:
    """Memory's slopes up to the fastest unit, of one thread and of all; a ceiling of each unit.

    What is to be written beside them comes back: a method of `Labels`, its arguments.
    """
    least, right = 10.0 ** chart.x[0], 10.0 ** chart.x[1]
    labels: list[tuple[str, tuple[Any, ...]]] = []
    threads = [*found.bandwidths]
    for n in dict.fromkeys((threads[0], threads[-1])):
        rate = found.bandwidths[n]
        start = max(least, 10.0 ** chart.y[0] / rate)
        ends = (start, found.peak / rate)
        (x1, y1), (x2, y2) = ((chart.across(i), chart.up(i * rate)) for i in ends)
        style = _SOLID if n == threads[-1] else _DASHED
        out.path(f"M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}", f'stroke="#22262c" {style}')
        name = f"{counted_as(n, 'thread')} read {rate / 1e9:.1f} GB/s"
        labels.append(("slope", ((x1, y1), (x2, y2), name, n == threads[-1])))
    for name, rate in found.units.items():
        x, y = chart.across(rate / found.bandwidth), chart.up(rate)
        style = f'stroke="#22262c" {_SOLID}' if rate == found.peak else f'stroke="{LINE}"'
        out.path(f"M{x:.1f} {y:.1f}H{chart.across(right):.1f}", style)
        labels.append(("ceiling", (x, _LEFT + _WIDTH - 4, y, f"{name} {rate / 1e9:,.0f}")))
    return labels


def _place(chart: _Chart, found: Roofline, point: Point) -> Mark:
    """An area for the share of its phase's time."""
    size = 3.5 + 9 * math.sqrt(_share(found, point))
    return Mark(chart.across(point.intensity), chart.up(point.rate), size)


def _mark(
    out: Drawing, chart: _Chart, found: Roofline, point: Point, points: Sequence[Point]
) -> Mark:
    """A shape for the class, a colour for the phase; a ring where a later point hides it.

    points: from this one on. What it takes up comes back.
    """
    x, y, size = _place(chart, found, point)
    colour = _COLOURS[found.phases().index(point.phase) % len(_COLOURS)]
    told = escape(
        f"{point.phase}, {point.kind}: {1e3 * point.seconds:.2f} ms, "
        f"{point.rate / 1e9:.1f} GMAC/s at {point.intensity:.3g} MACs/byte, "
        f"{_reached(found, point)}"
    )
    out.parts.append(
        f'<path d="{_shape(point.kind, x, y, size)}" fill="{colour}" '
        f'stroke="#ffffff" stroke-width="1.2"><title>{told}</title></path>'
    )
    others = (_place(chart, found, other) for other in points[1:])
    if not any(math.hypot(o.x - x, o.y - y) < size / 2 and o.size > 0.6 * size for o in others):
        return Mark(x, y, size)
    out.path(_shape(point.kind, x, y, size + _RING), f'stroke="{colour}" {_SOLID}')
    return Mark(x, y, size + _RING)


def _shape(kind: str, x: float, y: float, r: float) -> str:
    """A disc, a square, a triangle or a diamond about a place, as path data."""
    if kind == "matmul":
        half = f"a{r:.1f} {r:.1f} 0 1 0"
        return f"M{x - r:.1f} {y:.1f}{half} {2 * r:.1f} 0{half} {-2 * r:.1f} 0z"
    corners = {
        "attention": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
        "delta-net": [(0, -1.2), (1.1, 0.8), (-1.1, 0.8)],
        "rest": [(0, -1.2), (1.2, 0), (0, 1.2), (-1.2, 0)],
    }[kind]
    return "M" + "L".join(f"{x + r * dx:.1f} {y + r * dy:.1f}" for dx, dy in corners) + "z"


def _reached(found: Roofline, point: Point) -> str:
    memory, units = found.shares(point)
    return f"{100 * memory:.0f} % of memory, {100 * units:.0f} % of units"


def _legend(out: Drawing, found: Roofline) -> None:
    """Shapes beside the chart's head; the colours are the table's."""
    x = _LEFT + 70
    for kind in CLASSES:
        if any(point.kind == kind for point in _drawn(found)):
            out.path(_shape(kind, x, _TOP - 16, 5), 'stroke="#5b626d"')
            out.text(x + 10, _TOP - 12, kind, 11)
            x += 28 + 7 * len(kind)


def _table(out: Drawing, found: Roofline) -> None:
    """A line for each class of each phase."""
    y = _TOP + _HEIGHT + 66
    for name, x in _COLUMNS:
        out.text(MARGIN + x, y, name, 11, f'font-weight="bold" {_anchor(name)}')
    out.path(f"M{MARGIN} {y + 6}h{_COLUMNS[-1][1]}", f'stroke="{LINE}"')
    for n, phase in enumerate(found.phases()):
        y += 6
        points = [p for p in found.points if p.phase == phase]
        for i, point in enumerate(points):
            y += _ROW
            if i == 0:
                out.rect(MARGIN, y - 9, 10, 10, _COLOURS[n % len(_COLOURS)], 'rx="2"')
            cells = _cells(found, point, phase if i == 0 else "")
            for (name, x), cell in zip(_COLUMNS, cells, strict=True):
                shift = 16 if name == "phase" else 0
                out.text(MARGIN + x + shift, y, cell, 11, _anchor(name))
    out.width = max(out.width, MARGIN + _COLUMNS[-1][1])


def _anchor(name: str) -> str:
    return "" if name in ("phase", "what") else _END


def _cells(found: Roofline, point: Point, phase: str) -> tuple[str, ...]:
    seconds = max(point.seconds, 1e-12)
    return (
        phase, point.kind, f"{1e3 * point.seconds:.2f} ms", f"{100 * _share(found, point):.0f} %",
        f"{point.nbytes / seconds / 1e9:.1f}", f"{point.rate / 1e9:.1f}",
        f"{point.intensity:.3g}", *(f"{100 * share:.0f} %" for share in found.shares(point)),
    )  # fmt: skip
