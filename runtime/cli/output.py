"""Text for people: numbers with units, aligned tables, bars."""

from __future__ import annotations

import shutil
import unicodedata
from collections.abc import Sequence
from typing import Any

import click

from runtime.units import in_units

_FULL, _EIGHTHS = "█", " ▏▎▍▌▋▊▉"


def note(text: str, quiet: bool = False) -> None:
    """A line on stderr, dim on a terminal."""
    if not quiet:
        click.secho(printable(text), err=True, dim=True)


def printable(text: str) -> str:
    """`text` without characters that would steer a terminal: they come from files, too."""
    if text.isprintable():
        return text
    return "".join(f"\\x{ord(c):02x}" if _steers(c) else c for c in text)


def _steers(character: str) -> bool:
    return character != "\n" and unicodedata.category(character) == "Cc"


def is_terminal(stream: Any) -> bool:
    """Whether a stream is a terminal; one that is closed or was never there is none."""
    try:
        return stream is not None and stream.isatty()
    except ValueError:
        return False


def size(nbytes: float) -> str:
    """Bytes as a person reads them: "358.78 MiB"."""
    return in_units(nbytes, 1024, ("B", "KiB", "MiB", "GiB"), (0, 2, 2, 2))


def count(n: float) -> str:
    """A large number as a person reads it: "596.05 M"."""
    return in_units(n, 1000, ("", "K", "M", "B"), (0, 2, 2, 2))


def table(rows: Sequence[Sequence[str]], header: Sequence[str], right: str = "") -> str:
    """Aligned columns. `right` names the columns, by their header, that are flush right."""
    header = [printable(cell) for cell in header]
    rows = [[printable(cell) for cell in row] for row in rows]
    flush_right = [bool(name) and name in right.split(",") for name in header]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        parts = (
            cell.rjust(width) if is_right else cell.ljust(width)
            for cell, width, is_right in zip(cells, widths, flush_right, strict=True)
        )
        return "  ".join(parts).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *map(line, rows)])


def pairs(rows: Sequence[tuple[str, str]]) -> str:
    """A name and what it is on each line."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name.ljust(width)}  {printable(value)}" for name, value in rows)


def bar(share: float, width: int) -> str:
    """A bar that fills `share` (0 to 1) of `width` characters, to an eighth of a character."""
    eighths = round(max(0.0, min(1.0, share)) * width * 8)
    if share > 0:
        eighths = max(1, eighths)
    return (_FULL * (eighths // 8) + _EIGHTHS[eighths % 8].strip()).ljust(width)


def bars(title: str, amounts: dict[str, float]) -> str:
    """A horizontal bar for each amount of bytes, largest first, with size and share."""
    total = sum(amounts.values()) or 1.0
    names = max((len(name) for name in amounts), default=0)
    width = max(10, min(50, shutil.get_terminal_size().columns - names - 26))
    lines = [
        f"  {name.ljust(names)}  {bar(n / total, width)}  {size(n):>11}  {100 * n / total:5.1f} %"
        for name, n in sorted(amounts.items(), key=lambda item: -item[1])
    ]
    return "\n".join([title, *lines])
