"""Tables of `runtime bench`: markdown, CSV and JSON with llama-bench's columns and keys."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from typing import Any

from runtime import __version__
from runtime.cli import facts
from runtime.cli.bench import Result, deviation, mean

_BATCH = 512  # most tokens of one step

# header, width, flush right: as llama-bench draws them, then this program's own two
_COLUMNS = (
    ("model", 30, False),
    ("size", 10, True),
    ("params", 10, True),
    ("backend", 10, False),
    ("threads", 7, True),
    ("test", 15, True),
    ("t/s", 20, True),
    ("bandwidth_share", 15, True),
    ("GMAC/s", 8, True),
)


class Markdown:
    """A table whose rows are printed as they are measured."""

    def __init__(self) -> None:
        self._begun = False

    def row(self, result: Result) -> Iterator[str]:
        """The lines of one result; the table's head comes with the first."""
        if not self._begun:
            self._begun = True
            yield _line([name for name, _, _ in _COLUMNS])
            yield _line(["-" * (w - 1) + (":" if right else "-") for _, w, right in _COLUMNS])
        yield _line(_cells(result))

    def end(self) -> Iterator[str]:
        """What follows the last result."""
        yield f"\nbuild: {__version__}"


class Csv:
    """One quoted line per test, after a line of keys."""

    def __init__(self) -> None:
        self._begun = False

    def row(self, result: Result) -> Iterator[str]:
        """The line of one result; the keys come with the first."""
        values = {k: v for k, v in fields(result).items() if not isinstance(v, list)}
        if not self._begun:
            self._begun = True
            yield ",".join(values)
        text = io.StringIO()
        csv.writer(text, quoting=csv.QUOTE_ALL).writerow(
            ["" if v is None else v for v in values.values()]
        )
        yield text.getvalue().rstrip("\r\n")

    def end(self) -> Iterator[str]:
        """Nothing follows."""
        return iter(())


class Json:
    """A list of objects, printed when all is measured."""

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []

    def row(self, result: Result) -> Iterator[str]:
        """Nothing yet: the result is kept."""
        self._rows.append(fields(result))
        return iter(())

    def end(self) -> Iterator[str]:
        """The whole list."""
        yield json.dumps(self._rows, indent=2)


FORMATS: dict[str, type[Markdown | Csv | Json]] = {"md": Markdown, "csv": Csv, "json": Json}


def fields(result: Result) -> dict[str, Any]:
    """A result under llama-bench's keys, plus `bandwidth_share` and `gmac_per_s` (or None)."""
    from runtime.cli.devices import cpu_name

    file, speeds = result.model.file, result.speeds
    nanoseconds = [round(1e9 * s) for s in result.seconds]
    return {
        "build_commit": __version__,
        "build_number": 0,
        "cpu_info": cpu_name(),
        "gpu_info": "",
        "backends": "CPU",
        "model_filename": str(file.path),
        "model_type": facts.model_type(file),
        "model_size": file.tensors_nbytes,
        "model_n_params": facts.n_params(file),
        "n_batch": _BATCH,
        "n_ubatch": _BATCH,
        "n_threads": result.threads,
        "type_k": result.kv_types[0],
        "type_v": result.kv_types[1],
        "n_prompt": result.test.n_prompt,
        "n_gen": result.test.n_gen,
        "n_depth": result.test.n_depth,
        "test_time": result.started,
        "avg_ns": round(mean(nanoseconds)),
        "stddev_ns": round(deviation(nanoseconds)),
        "avg_ts": mean(speeds),
        "stddev_ts": deviation(speeds),
        "bandwidth_share": result.bandwidth_share,
        "gmac_per_s": result.gmac_per_s,
        "samples_ns": nanoseconds,
        "samples_ts": speeds,
    }


def _cells(result: Result) -> list[str]:
    file, speeds = result.model.file, result.speeds
    share, gmac = result.bandwidth_share, result.gmac_per_s
    return [
        facts.model_type(file),
        _size(file.tensors_nbytes),
        _params(facts.n_params(file)),
        "CPU",
        str(result.threads),
        result.test.name,
        f"{mean(speeds):.2f} ± {deviation(speeds):.2f}",
        "" if share is None else f"{share:.3f}",
        "" if gmac is None else f"{gmac:.1f}",
    ]


def _line(cells: list[str]) -> str:
    padded = (
        cell.rjust(width) if right else cell.ljust(width)
        for cell, (_, width, right) in zip(cells, _COLUMNS, strict=True)
    )
    return "| " + " | ".join(padded) + " |"


def _size(nbytes: int) -> str:
    gib = nbytes / 2**30
    return f"{gib:.2f} GiB" if gib >= 1 else f"{nbytes / 2**20:.2f} MiB"


def _params(n: int) -> str:
    return f"{n / 1e9:.2f} B" if n >= 10**9 else f"{n / 1e6:.2f} M"
