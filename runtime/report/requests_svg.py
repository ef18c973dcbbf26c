"""A picture of requests over time: who was in which step, with what."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from runtime.report.drawing import LINE, MARGIN, Drawing

_WIDTH, _ROW, _GAP = 1000.0, 16, 3
_LABEL = 34
_PROMPT, _TOKEN, _WAITS = "#4e79a7", "#59a14f", "#eef0f3"


class Step(NamedTuple):
    """Seconds when it began and that it took; (number of a request, tokens, of a prompt)."""

    began: float
    seconds: float
    parts: list[tuple[int, int, bool]]


class Steps:
    """Steps as they come, of requests that are submitted together."""

    def __init__(self, title: str) -> None:
        self.title, self.steps = title, list[Step]()
        self.began, self._raw = 0.0, list[tuple[float, float, list[tuple[Any, int, bool]]]]()
        self.requests = 0

    def add(self, began: float, seconds: float, parts: list[tuple[Any, int, bool]]) -> None:
        """A step of (task, tokens, whether of a prompt)."""
        self._raw.append((began, seconds, parts))

    def begin(self, began: float, tasks: Sequence[Any]) -> None:
        """When and in what order they were submitted."""
        self.began, self._tasks, self.requests = began, list(tasks), len(tasks)

    def numbered(self) -> list[Step]:
        """All steps, tasks by their numbers."""
        number = {id(task): n for n, task in enumerate(self._tasks)}
        return [
            Step(at - self.began, seconds, [(number[id(t)], n, p) for t, n, p in parts])
            for at, seconds, parts in self._raw
        ]

    def tokens_until(self, moment: float) -> int:
        """Tokens of answers that were chosen by then."""
        return sum(
            sum(not of_prompt for _, _, of_prompt in parts)
            for at, seconds, parts in self._raw
            if at + seconds <= moment
        ) + len(self._tasks)


def picture(steps: Steps) -> str:
    """The picture, SVG: a row for each request, a box for each step it was in."""
    found, out = steps.numbered(), Drawing()
    end = max((step.began + step.seconds for step in found), default=1.0)
    scale, left = _WIDTH / end, float(MARGIN + _LABEL)
    out.text(MARGIN, 34, steps.title, 17, 'font-weight="bold"')
    said = "prompts are read beside the answers that are under way, which wait for no more than one"
    out.text(MARGIN, 54, f"{len(found)} steps in {1e3 * end:.0f} ms: {said}", 12)
    x = float(left)
    for colour, text in ((_PROMPT, "tokens of a prompt (darker: more)"), (_TOKEN, "a token of an "
                         "answer"), (_WAITS, "waits, or is over")):  # fmt: skip
        out.rect(x, 66, 14, 12, colour)
        out.text(x + 20, 76, text)
        x += 230
    top = 92.0
    for n in range(steps.requests):
        y = top + n * (_ROW + _GAP)
        out.text(MARGIN, y + 12, f"{n + 1}")
        out.rect(left, y, _WIDTH, _ROW, _WAITS)
    most = max((n for step in found for _, n, _ in step.parts), default=1)
    for step in found:
        x, width = left + step.began * scale, max(step.seconds * scale, 0.3)
        for number, tokens, of_prompt in step.parts:
            y = top + number * (_ROW + _GAP)
            fade = f'fill-opacity="{0.45 + 0.55 * tokens / most:.2f}"' if of_prompt else ""
            out.rect(x, y, width, _ROW, _PROMPT if of_prompt else _TOKEN, fade)
    bottom = top + steps.requests * (_ROW + _GAP) + 4
    for part in range(11):
        x = left + _WIDTH * part / 10
        out.path(f"M{x:.1f} {top} L{x:.1f} {bottom}", f'stroke="{LINE}" stroke-width="0.4"')
        out.text(x - 8, bottom + 14, f"{1e3 * end * part / 10:.0f} ms", 10)
    return out.svg()
