"""A decode step as a picture: its launches as bars by the stream's time, line after line."""

from __future__ import annotations

import math
from collections.abc import Iterator
from html import escape
from typing import Any

from runtime.report.drawing import LINE, MARGIN, Drawing

_WIDTH, _BAR, _ROW = 1000, 22, 34  # pixels of a line of time, of its bars, from line to line
_MOST_LINES, _SHOWN = 14, 10  # kernels in the legend that have a colour of their own
_COLOURS = (
    "#4c78a8", "#f58518", "#54a24b", "#e45756", "#72b7b2", "#b279a2", "#eeca3b", "#9d755d",
    "#ff9da6", "#79706e",
)  # fmt: skip
_OTHER = "#c9ccd1"
_STEPS = (1, 2, 5)


def picture(timeline: Any, title: str) -> str:
    """SVG of a `Timeline`; each bar tells its kernel, what it computes and its time."""
    drawing, bars = Drawing(), timeline.bars
    end = max((bar.start + bar.seconds for bar in bars), default=0.0)
    if not math.isfinite(end) or end <= 0:
        end, bars = 1e-6, []
    span = _rounded(end / min(_MOST_LINES, max(1, math.ceil(len(bars) / 24))))
    drawing.text(MARGIN, MARGIN + 6, title, 14, 'font-weight="bold"')
    drawing.text(MARGIN, MARGIN + 24, _summary(timeline, end), 11)
    kernels = _by_time(bars)
    colours = dict(zip(list(kernels)[:_SHOWN], _COLOURS, strict=False))
    top = MARGIN + 44
    lines = math.ceil(end / span)
    for n in range(lines):
        _axis(drawing, top + n * _ROW, n * span, span)
    for bar in bars:
        for n, x, width in _pieces(bar.start, bar.seconds, span):
            y, colour = top + n * _ROW, colours.get(bar.kernel, _OTHER)
            drawing.parts.append(_bar(x, y, width, colour, bar))
    drawing.width = max(drawing.width, MARGIN + _WIDTH + 40)  # and a line's end
    _legend(drawing, top + lines * _ROW + 20, kernels, colours, timeline.busy)
    return drawing.svg()


def _summary(timeline: Any, end: float) -> str:
    replayed = "not timed"
    if math.isfinite(timeline.replayed):
        replayed = (
            f"{_us(timeline.replayed)} as one graph, {_us(timeline.gap)} from one to the next"
        )
    return (
        f"{len(timeline.bars)} launches, {_us(timeline.busy)} in all; one by one {_us(end)} "
        f"(drawn), {replayed}"
    )


def _us(seconds: float) -> str:
    return f"{1e6 * seconds:,.1f} µs" if math.isfinite(seconds) else "-"


def _rounded(seconds: float) -> float:
    """The next of 1, 2 and 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(seconds))
    return next((n * power for n in _STEPS if n * power >= seconds), 10 * power)


def _axis(drawing: Drawing, y: float, start: float, span: float) -> None:
    drawing.path(f"M{MARGIN} {y + _BAR + 1}h{_WIDTH}", f'stroke="{LINE}" stroke-width="0.5"')
    drawing.text(MARGIN + _WIDTH + 6, y + _BAR - 6, f"{1e6 * (start + span):,.0f} µs", 9)


def _pieces(start: float, seconds: float, span: float) -> Iterator[tuple[int, float, float]]:
    """(line, x, width) of a bar, which may go on in the next line."""
    left = seconds
    while left > 0:
        line = int(start / span + 1e-9)
        room = (line + 1) * span - start
        part = min(left, room)
        yield line, MARGIN + (start - line * span) / span * _WIDTH, part / span * _WIDTH
        if part <= 0:
            return
        start, left = start + part, left - part


def _bar(x: float, y: float, width: float, colour: str, bar: Any) -> str:
    told = escape(f"{bar.kernel}: {bar.subject}, {_us(bar.seconds)} at {_us(bar.start)}")
    return (
        f'<rect x="{x:.2f}" y="{y:.1f}" width="{max(width, 0.2):.2f}" height="{_BAR}" '
        f'fill="{colour}"><title>{told}</title></rect>'
    )


def _by_time(bars: list[Any]) -> dict[str, tuple[int, float]]:
    """Kernel -> (launches, seconds), the longest first."""
    found: dict[str, tuple[int, float]] = {}
    for bar in bars:
        count, seconds = found.get(bar.kernel, (0, 0.0))
        found[bar.kernel] = count + 1, seconds + bar.seconds
    return dict(sorted(found.items(), key=lambda item: -item[1][1]))


def _legend(
    drawing: Drawing, y: float, kernels: dict[str, tuple[int, float]], colours: dict[str, str],
    busy: float,
) -> None:  # fmt: skip
    for n, (kernel, (count, seconds)) in enumerate(kernels.items()):
        if n == _SHOWN:
            others = list(kernels.values())[_SHOWN:]
            kernel, count = f"{len(others)} others", sum(c for c, _ in others)
            seconds = sum(s for _, s in others)
        at = y + 18 * n
        drawing.rect(MARGIN, at, 12, 12, colours.get(kernel, _OTHER))
        share = seconds / busy if busy else 0.0
        drawing.text(
            MARGIN + 20, at + 10, f"{kernel}: {count} x, {_us(seconds)}, {100 * share:.0f} %", 10
        )
        if n == _SHOWN:
            return
