"""Where the labels of a roofline's lines stand: beside their line, where no mark is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from runtime.report.drawing import Drawing

_WIDE, _ABOVE, _BELOW = 6.3, 9.0, 3.0  # of a letter, and of a line of text about its base
_CLEAR = 3.0  # between a label and a mark; where that is nowhere, as much as there is
_FIRST, _STEP, _STEPS = 0.06, 0.02, 30  # along a slope, as shares of it
_SHIFT = 20.0  # along a ceiling
_HALO = 'stroke="#ffffff" stroke-width="3"'


class Mark(NamedTuple):
    """A place that is taken, and how far around it."""

    x: float
    y: float
    size: float


class Labels:
    """Labels of one chart, drawn after its marks."""

    def __init__(self, out: Drawing, marks: Sequence[Mark]) -> None:
        self._out, self._marks = out, marks
        self._boxes: list[tuple[float, float, float, float]] = []

    def slope(
        self, start: tuple[float, float], end: tuple[float, float], text: str, above: bool
    ) -> None:
        """Along a line, as near to its start as there is room."""
        (x1, y1), (x2, y2) = start, end
        angle, length = math.atan2(y2 - y1, x2 - x1), _WIDE * len(text)
        base = -6 if above else 14

        def at(share: float) -> tuple[float, float]:
            return x1 + share * (x2 - x1), y1 + share * (y2 - y1)

        def room(share: float) -> float:
            x, y = at(share)
            box = (0.0, base - _ABOVE, length, base + _BELOW)
            return _room(box, [_turned(mark, x, y, -angle) for mark in self._marks])

        x, y = at(max((_FIRST + n * _STEP for n in range(_STEPS)), key=room))
        turn = f'transform="rotate({math.degrees(angle):.1f} {x:.1f} {y:.1f})"'
        self._write(x, y + base, text, turn)

    def ceiling(self, left: float, right: float, y: float, text: str) -> None:
        """On a level line, as near to its right end as there is room, above it or below."""
        length = _WIDE * len(text)
        ends = [right - n * _SHIFT for n in range(max(1, int((right - left - length) / _SHIFT)))]
        places = [(x, y + side) for x in ends for side in (-5, 13)]

        def box(place: tuple[float, float]) -> tuple[float, float, float, float]:
            return place[0] - length, place[1] - _ABOVE, place[0], place[1] + _BELOW

        def room(place: tuple[float, float]) -> float:
            mine = box(place)
            free = not any(
                mine[0] < b[2] and b[0] < mine[2] and mine[1] < b[3] and b[1] < mine[3]
                for b in self._boxes
            )
            return _room(mine, self._marks) if free else -math.inf

        place = max(places, key=room)
        self._boxes.append(box(place))
        self._write(*place, text, 'text-anchor="end"')

    def _write(self, x: float, y: float, text: str, more: str) -> None:
        """With a white edge, as an element of its own: not all programs draw edges first."""
        self._out.text(x, y, text, 11, f"{more} {_HALO}")
        self._out.text(x, y, text, 11, more)


def _turned(mark: Mark, x: float, y: float, angle: float) -> Mark:
    """As seen from a place, with a turn."""
    dx, dy, sine, cosine = mark.x - x, mark.y - y, math.sin(angle), math.cos(angle)
    return Mark(dx * cosine - dy * sine, dx * sine + dy * cosine, mark.size)


def _room(box: tuple[float, float, float, float], marks: Sequence[Mark]) -> float:
    """Between a box and the nearest mark, where that is less than has to be."""

    def between(mark: Mark) -> float:
        dx = max(box[0] - mark.x, 0.0, mark.x - box[2])
        dy = max(box[1] - mark.y, 0.0, mark.y - box[3])
        return math.hypot(dx, dy) - mark.size

    return min([_CLEAR, *map(between, marks)])
