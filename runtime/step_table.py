"""The table that DEBUG=2 and 3 draw of a step: time, bytes and bandwidth of its instructions."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from runtime.ops.cost import Seen, cost

_LAYER = re.compile(r"^blk\.\d+\.")
_SHOWN = ("format", "k_type", "v_type", "type", "coding")  # constants that tell kernels apart
_WIDTH = 120  # characters where there is no terminal to ask


@dataclass
class Line:
    """One or several instructions of a plan: what they call and on what, nanoseconds and bytes."""

    calls: str
    subjects: str
    count: int
    nanoseconds: int
    nbytes: float


def lines(plan: Any, nanoseconds: np.ndarray, seen: Seen) -> list[Line]:
    """A line for every instruction, in order; `nanoseconds` int64 [instructions]."""
    return [
        Line(
            _counted(_kernel(c.kernel) for c in one.calls),
            ", ".join(dict.fromkeys(_subject(c) for c in one.calls)),
            1, int(spent), sum(cost(c.node, seen).bytes for c in one.calls),
        )
        for one, spent in zip(plan.instructions, nanoseconds, strict=True)
    ]  # fmt: skip


def merged(found: Sequence[Line]) -> list[Line]:
    """Instructions that do the same in different layers as one line; the longest first."""
    groups: dict[tuple[str, str], Line] = {}
    for line in found:
        subjects = ", ".join(_LAYER.sub("", name) for name in line.subjects.split(", "))
        into = groups.setdefault((line.calls, subjects), Line(line.calls, subjects, 0, 0, 0.0))
        into.count += line.count
        into.nanoseconds += line.nanoseconds
        into.nbytes += line.nbytes
    return sorted(groups.values(), key=lambda line: -line.nanoseconds)


def draw(found: Sequence[Line], title: str, bandwidth: float | None) -> None:
    """Print the lines and their sum on stderr; `bandwidth` in bytes/s, None where not known."""
    import sys

    from rich.bar import Bar
    from rich.console import Console
    from rich.table import Table

    total = Line("all", "", 0, 0, 0.0)
    for line in found:
        total.count += line.count
        total.nanoseconds += line.nanoseconds
        total.nbytes += line.nbytes
    caption = f"of memory: share of the {bandwidth / 1e9:.1f} GB/s measured" if bandwidth else None
    table = Table(title=title, caption=caption, show_footer=True)
    whole = max(1, total.nanoseconds)
    ends = _figures(total, whole, bandwidth)
    table.add_column("calls", footer="all", overflow="fold")
    table.add_column("on", overflow="fold")
    names = ("count", "µs", "time", "MB", "GB/s", "of memory")
    for name, footer in zip(names, ends, strict=True):
        table.add_column(name, footer=footer, justify="right", no_wrap=True)
        if name == "time":
            table.add_column("", width=8)
    for line in found:
        count, spent, share, *rest = _figures(line, whole, bandwidth)
        bar = Bar(size=1, begin=0, end=line.nanoseconds / whole, width=8)
        table.add_row(line.calls, line.subjects, count, spent, share, bar, *rest)
    width = None if sys.stderr.isatty() else _WIDTH
    Console(stderr=True, width=width).print(table)


def _figures(line: Line, whole: int, bandwidth: float | None) -> list[str]:
    """How many, µs, share of the time, MB, GB/s and share of the bandwidth, as text."""
    rate = line.nbytes / max(1, line.nanoseconds)
    return [
        str(line.count), f"{line.nanoseconds / 1e3:.1f}", f"{100 * line.nanoseconds / whole:.1f} %",
        f"{line.nbytes / 1e6:.2f}", f"{rate:.1f}",
        f"{100e9 * rate / bandwidth:.0f} %" if bandwidth else "",
    ]  # fmt: skip


def _subject(call: Any) -> str:
    """What a call works on: its matrix, else its result, else its vector of weights."""
    keys = {b.memory: b.key.removesuffix(".weight") for b in reversed(call.reads)}
    matrix = keys.get("repacked") or keys.get("raw")
    return matrix or call.node.name or keys.get("vector") or call.node.op


def _kernel(kernel: Any) -> str:
    """A kernel's name and types: "matmul Q4_0"."""
    constants = dict(kernel.constants)
    types = dict.fromkeys(str(constants[name]) for name in _SHOWN if name in constants)
    return " ".join([kernel.name, *types])


def _counted(names: Iterable[str]) -> str:
    """Names with commas between them, equal ones once with how often."""
    return ", ".join(f"{n} {name}" if n > 1 else name for name, n in Counter(names).items())
