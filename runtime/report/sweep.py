"""A sweep of cache or weight types as a table, in Markdown, CSV or JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from typing import NamedTuple

from runtime.quality.divergence import Estimate, as_data
from runtime.quality.sweep import Row
from runtime.units import counted_as, in_units

PLAIN = " plain"  # ends the name of a cache that is not rotated, beside one that is


class Table(NamedTuple):
    """What is to be shown: of which model, of which kind ("cache" or "types"); the base is first.

    threads: those that the speeds were measured with. file, text: names of the model's and the
    text's. cache: of all rows, where they differ in something else.
    """

    model: str
    kind: str
    rows: Sequence[Row]
    threads: int
    file: str = ""
    text: str = ""
    cache: str = ""

    @property
    def made_with(self) -> str:
        """One line on what was measured."""
        cache = f", cache {self.cache}" if self.cache else ""
        threads = counted_as(self.threads, "thread")
        return f"model {self.file}, text {self.text}{cache}, {threads}"

    @property
    def how(self) -> str:
        """One line on how it was measured."""
        quality, base = self.rows[0].perplexity, self.rows[0].name
        windows = f"{counted_as(quality.windows, 'window')} of {quality.window} tokens"
        return f"KLD from {base}, {windows}, {quality.tokens} of them scored"


def markdown(table: Table) -> str:
    """Aligned, to be read as it is and to be pasted."""
    of = "bytes/token" if table.kind == "cache" else "bytes"
    header = [table.kind.removesuffix("s"), of, "bits", "perplexity", "mean KLD", "99 % KLD",
              "same top, %", *table.rows[0].speeds]  # fmt: skip
    cells = [header, *map(_cells, table.rows)]
    if any(row.file for row in table.rows[1:]):
        for row, file in zip(cells, ["file", *(row.file for row in table.rows)], strict=True):
            row.append(file)
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [_line(cells[0], widths), _line(rule, widths), *(_line(c, widths) for c in cells[1:])]
    return "\n".join([f"{table.model}: {table.how}", f"{table.made_with}\n", *lines])


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = [cells[0].ljust(widths[0])]
    padded += [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
    return f"| {' | '.join(padded)} |"


def _cells(row: Row) -> list[str]:
    kl, quality = row.perplexity.kl, row.perplexity
    found = [row.name, nbytes(row.nbytes), f"{row.bits:.2f}",
             _estimate(Estimate(quality.value, quality.error), 4)]  # fmt: skip
    found += (
        ["base", "", ""]
        if kl is None
        else [f"{_small(kl.kld.mean.value)} ± {_small(kl.kld.mean.error)}",
              _small(kl.kld.percentiles[99]), _estimate(kl.same_top.scaled(100), 2)]
    )  # fmt: skip
    return [*found, *(_estimate(speed, 1) for speed in row.speeds.values())]


def _estimate(found: Estimate, digits: int) -> str:
    return f"{found.value:.{digits}f} ± {found.error:.{digits}f}"


def _small(value: float) -> str:
    return f"{value:.5f}" if abs(value) >= 1e-3 else f"{value:.1e}"


def nbytes(n: float) -> str:
    """Bytes in powers of 1024."""
    return in_units(n, 1024, ("B", "KiB", "MiB", "GiB"), (0, 2, 2, 2))


def as_csv(table: Table) -> str:
    """A line of names and one for each variant; errors beside their values."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    speeds = table.rows[0].speeds
    names = ["name", "bytes", "bits", "perplexity", "perplexity_error", "kld", "kld_error",
             "kld_99", "same_top", "same_top_error"]  # fmt: skip
    about = {"model": table.file, "text": table.text, "threads": table.threads}
    about |= {"cache": table.cache} if table.cache else {}
    timed_names = [f"{name}{end}" for name in speeds for end in ("", " deviation")]
    writer.writerow([*names, *timed_names, "file", *about])
    for row in table.rows:
        kl = row.perplexity.kl
        found = ("",) * 5 if kl is None else (*kl.kld.mean, kl.kld.percentiles[99], *kl.same_top)
        timed = [number for speed in row.speeds.values() for number in speed]
        writer.writerow([*row[:3], *row.perplexity[:2], *found, *timed, row.file, *about.values()])
    return text.getvalue().rstrip("\n")


def as_json(table: Table) -> str:
    """Everything."""
    rows = [as_data(row) for row in table.rows]
    about = {"model": table.model, "sweep": table.kind, "threads": table.threads,
             "file": table.file, "text": table.text, "cache": table.cache}  # fmt: skip
    return json.dumps({**about, "rows": rows}, indent=1)


FORMATS: dict[str, Callable[[Table], str]] = {"md": markdown, "csv": as_csv, "json": as_json}
