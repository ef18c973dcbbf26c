"""Elements of an SVG, and what pictures have in common."""

from __future__ import annotations

from html import escape

LINE, MARGIN = "#9aa1ab", 24
_TEXT = "#22262c"


class Drawing:
    """Elements of an SVG, and the room they take."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.width = self.height = 0.0

    def rect(self, x: float, y: float, w: float, h: float, fill: str, more: str = "") -> None:
        """A box of that colour; more: further attributes, as of all of these."""
        self.parts.append(
            f'<rect x="{x:.4g}" y="{y:.4g}" width="{w:.4g}" height="{h:.4g}" fill="{fill}" {more}/>'
        )
        self.width, self.height = max(self.width, x + w), max(self.height, y + h)

    def text(self, x: float, y: float, text: str, size: int = 11, more: str = "") -> None:
        """Text that begins at x, on the line y."""
        self.parts.append(
            f'<text x="{x:.4g}" y="{y:.4g}" font-size="{size}" {more}>{escape(text)}</text>'
        )
        self.height = max(self.height, y + 4)

    def path(self, d: str, more: str) -> None:
        """A line along the path data `d`."""
        self.parts.append(f'<path d="{d}" fill="none" {more}/>')

    def svg(self) -> str:
        """The whole picture."""
        w, h = self.width + MARGIN, self.height + MARGIN
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{w:.0f}" height="{h:.0f}" '
            f'viewBox="0 0 {w:.0f} {h:.0f}" font-family="Helvetica, Arial, sans-serif" '
            f'fill="{_TEXT}">\n<rect width="100%" height="100%" fill="#ffffff"/>\n'
            + "\n".join(self.parts)
            + "\n</svg>\n"
        )
