"""The probe's report as tables."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table

Row = dict[str, Any]


def show(report: Row, console: Console | None = None) -> None:
    """Print it; what was not measured is "-"."""
    console = console or Console(width=max(Console().width, 120))
    if report["fake"]:
        console.print("[bold red]FAKE DRIVER: no GPU was used, nothing was timed")
    gpu, parts = report["gpu"], report["parts"]
    cuda = report["driver"]["cuda"]
    console.print(
        f"{gpu['name']}, {gpu['target']}, {gpu['multiprocessors']} multiprocessors; driver with "
        f"CUDA {cuda // 1000}.{cuda % 1000 // 10}; {report['date']}"
    )
    console.print(", ".join(f"{k} {v}" for k, v in report["toolchain"].items()))
    for name, part in parts.items():
        if "error" in part:
            console.print(f"[bold red]{name}: {part['error']}", soft_wrap=True)
    _summary(console, report["fake"], parts)
    title = "Against numpy" + (" (simulated)" if report["fake"] else "")
    rows = parts["numerics"].get("rows", [])
    keys = ("kernel", "shape", "error", "tolerance", "right")
    _print(console, title, ("kernel", "shape", "error", "at most", "right"), rows, keys)
    _speeds(console, parts)


def _summary(console: Console, fake: bool, parts: Row) -> None:
    table = Table("what", "value", title="FAKE" if fake else None)
    loading, shared, step = (parts[n] for n in ("loading", "shared memory", "replays"))
    if "kernels" in loading:
        loaded = loading["kernels"] - len(loading["refused"])
        table.add_row("kernels loaded", f"{loaded} of {loading['kernels']}")
        table.add_row("compile or read them, s", _text(loading["prepare_s"]))
    if "most" in shared:
        table.add_row("shared memory of a block, bytes", f"{shared['most']}: {shared['right']}")
    for name in ("launch cost", "node gap"):
        for route, value in parts[name].get("us", {}).items():
            table.add_row(f"{name}, {route}, us", _text(value))
    for kind, differing in step.get("differing", {}).items():
        what = f"replays of {step['nodes']} nodes, {kind} edges, that differ"
        table.add_row(what, f"{differing} of {step['replays']}")
        table.add_row(f"  us per node, {kind} edges", _text(step[f"{kind}_us_per_node"]))
    table.add_row("copy bandwidth, GB/s", _text(parts["speed"].get("copy_gb_per_s")))
    table.add_row("int8 peak, TFLOP/s", _text(parts["tile"].get("int8_peak_tflops")))
    console.print(table)


def _speeds(console: Console, parts: Row) -> None:
    rows = [r | {"us": _times(r.get("seconds"), 1e6)} for r in parts["speed"].get("rows", [])]
    heads = "kernel", "shape", "copies", "us", "GB/s", "share of copy"
    keys = "kernel", "shape", "copies", "us", "gb_per_s", "share"
    _print(console, "Speed", heads, rows, keys)
    rows = [r | {"us": _times(r.get("seconds"), 1e6)} for r in parts["tile"].get("rows", [])]
    heads = "kernel", "rows x k x columns", "us", "TFLOP/s", "share of peak"
    _print(console, "Tile", heads, rows, ("kernel", "shape", "us", "tflops", "share"))


def _print(
    console: Console, title: str, heads: Iterable[str], rows: list[Row], keys: tuple[str, ...]
) -> None:
    table = Table(*heads, title=title)
    for row in rows:
        table.add_row(*[_text(row.get(key)) for key in keys])
    console.print(table)


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)
