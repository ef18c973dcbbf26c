"""Tables of `runtime bench`, with llama-bench's columns and keys in llama-bench's order."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from statistics import fmean
from typing import Any

from runtime import __version__
from runtime.cli import facts
from runtime.cli.bench_plan import UBATCH, Setting
from runtime.cli.bench_result import Result, deviation

# header, width, flush right: as llama-bench draws them
_FIRST = (
    ("model", 30, False), ("size", 10, True), ("params", 10, True), ("backend", 10, False),
    ("threads", 7, True),
)  # fmt: skip
# shown where a setting is not the default: header, width, flush right; and the default
_CHANGED = (
    (("n_batch", 7, True), 2048), (("n_ubatch", 8, True), UBATCH),
    (("type_k", 6, True), "f16"), (("type_v", 6, True), "f16"),
    (("devices", 22, False), "cpu"), (("split_mode", 10, False), None),
    (("tensor_split", 12, False), None), (("gpu_layers", 10, True), None),
    (("cpu_moe", 7, True), False),
)  # fmt: skip
# the last two are this program's own, and on GPUs three more
_ON_GPU = (("tensor_share", 12, True), ("gap_us", 7, True), ("idle_us", 7, True))
_LAST = (("test", 15, True), ("t/s", 20, True), ("bandwidth_share", 15, True), ("GMAC/s", 8, True))

_OWN = ("bandwidth_share", "gmac_per_s", "tensor_share", "gap_us", "idle_us")  # keys

# Keys of llama-bench that only its own options change: these are its values on a CPU.
_AS_ON_CPU: dict[str, dict[str, Any]] = {
    "n_threads": {"cpu_mask": "0x0", "cpu_strict": False, "poll": 50},
    "type_v": {
        "n_gpu_layers": -1, "n_cpu_moe": 0, "split_mode": "layer", "main_gpu": 0,
        "no_kv_offload": False, "flash_attn": -1, "devices": "auto", "tensor_split": "0.00",
        "tensor_buft_overrides": "none", "load_mode": "auto", "lazy_mode": "auto",
        "embeddings": False, "no_op_offload": 0, "no_host": False, "repack": True,
        "fit_target": 0, "fit_min_ctx": 0,
    },
}  # fmt: skip


class Printer:
    """A format of the table: its lines, as they are measured."""

    def __init__(self, settings: Sequence[Setting]) -> None:
        """`settings`: all that will be measured."""

    def begin(self, first: Result) -> Iterable[str]:
        """What comes before the first result."""
        return ()

    def row(self, result: Result) -> Iterable[str]:
        """The lines of one result."""
        raise NotImplementedError

    def end(self) -> Iterable[str]:
        """What follows the last result."""
        return ()


class Markdown(Printer):
    """A table whose rows are printed as they are measured."""

    def __init__(self, settings: Sequence[Setting]) -> None:
        """`settings`: a column's need depends on all of them."""
        changed = [
            column
            for column, default in _CHANGED
            if {getattr(setting, column[0]) for setting in settings} != {default}
        ]
        gpu = any("cuda" in setting.devices.lower() for setting in settings)
        self._columns = (*_FIRST, *changed, *_LAST, *_ON_GPU * gpu)

    def begin(self, first: Result) -> Iterator[str]:
        """The table's head."""
        yield self._line({name: name for name, _, _ in self._columns})
        yield self._line({n: "-" * (w - 1) + (":" if r else "-") for n, w, r in self._columns})

    def row(self, result: Result) -> Iterator[str]:
        """The line of one result."""
        yield self._line(_cells(result))

    def end(self) -> Iterator[str]:
        """What follows the last result."""
        yield f"\nbuild: {__version__} (0)"

    def _line(self, cells: dict[str, str]) -> str:
        padded = (
            cells[name].rjust(width) if right else cells[name].ljust(width)
            for name, width, right in self._columns
        )
        return "| " + " | ".join(padded) + " |"


class Csv(Printer):
    """One quoted line per test, after a line of keys."""

    def begin(self, first: Result) -> Iterator[str]:
        """The keys."""
        yield ",".join(_flat(first))

    def row(self, result: Result) -> Iterator[str]:
        """The line of one result."""
        values = ["" if v is None else v for v in _flat(result).values()]
        text = io.StringIO()
        csv.writer(text, quoting=csv.QUOTE_ALL).writerow(values)
        yield text.getvalue().rstrip("\r\n")


class Sql(Printer):
    """Statements that make the table llama_bench and fill it."""

    def begin(self, first: Result) -> Iterator[str]:
        """The statement that makes the table."""
        columns = ",\n".join(f"  {k} {_sql_type(k, v)}" for k, v in _flat(first).items())
        yield f"CREATE TABLE IF NOT EXISTS llama_bench (\n{columns}\n);\n"

    def row(self, result: Result) -> Iterator[str]:
        """The statement that adds one result."""
        values = _flat(result)
        quoted = ", ".join(map(_quoted, values.values()))
        yield f"INSERT INTO llama_bench ({', '.join(values)}) VALUES ({quoted});"


class JsonLines(Printer):
    """An object per line, printed as it is measured."""

    def row(self, result: Result) -> Iterator[str]:
        """The object of one result."""
        yield json.dumps(fields(result))


class Json(Printer):
    """A list of objects, printed as they are measured."""

    def __init__(self, settings: Sequence[Setting]) -> None:
        self._between = ""

    def begin(self, first: Result) -> Iterator[str]:
        """The list opens."""
        yield "["

    def row(self, result: Result) -> Iterator[str]:
        """One object of the list."""
        text = json.dumps(fields(result), indent=2)
        yield self._between + "\n".join(f"  {line}" for line in text.splitlines())
        self._between = ","

    def end(self) -> Iterator[str]:
        """The list closes."""
        yield "]"


FORMATS: dict[str, type[Printer]] = {
    "md": Markdown, "json": Json, "jsonl": JsonLines, "csv": Csv, "sql": Sql,
}  # fmt: skip


def fields(result: Result) -> dict[str, Any]:
    """A result under llama-bench's keys; then ours, which are None where they say nothing."""
    from runtime.backends.cpu.run.cores import cpu_name

    file, speeds = result.model.file, result.speeds
    nanoseconds = [round(1e9 * s) for s in result.seconds]
    own = {
        "build_commit": __version__,
        "build_number": 0,
        "cpu_info": cpu_name(),
        "gpu_info": _gpu(result),
        "backends": _backend(result),
        "model_filename": str(file.path),
        "model_type": facts.model_type(file),
        "model_size": file.tensors_nbytes,
        "model_n_params": facts.n_params(file),
        "n_batch": result.setting.n_batch,
        "n_ubatch": result.setting.n_ubatch,
        "n_threads": result.model.threads,
        "type_k": result.model.kv_types[0],
        "type_v": result.model.kv_types[1],
        "n_prompt": result.test.n_prompt,
        "n_gen": result.test.n_gen,
        "n_depth": result.test.n_depth,
        "test_time": result.started,
        "avg_ns": round(fmean(nanoseconds)),
        "stddev_ns": round(deviation(nanoseconds)),
        "avg_ts": round(fmean(speeds), 6),
        "stddev_ts": round(deviation(speeds), 6),
        "samples_ns": nanoseconds,
        "samples_ts": speeds,
        **{key: getattr(result, key) for key in _OWN},
    }
    found: dict[str, Any] = {}
    for key, value in own.items():
        found[key] = value
        found |= _AS_ON_CPU.get(key, {})
    setting = result.setting
    layers, moe = setting.gpu_layers or found["n_gpu_layers"], setting.cpu_moe
    return found | {
        "split_mode": setting.split_mode or found["split_mode"],
        "main_gpu": setting.main_device or 0,
        "n_gpu_layers": int({"all": -2, "auto": -1}.get(layers, layers)),
        "n_cpu_moe": -1 if moe is True else moe,
        "devices": setting.devices,
        "tensor_split": setting.tensor_split or found["tensor_split"],
    }


def _flat(result: Result) -> dict[str, Any]:
    """The fields without the samples, and 0 or 1 for no and yes, as llama-bench's tables have."""
    return {
        key: int(value) if isinstance(value, bool) else value
        for key, value in fields(result).items()
        if not isinstance(value, list)
    }


def _sql_type(key: str, value: Any) -> str:
    if key in _OWN or isinstance(value, float):
        return "REAL"
    return "INTEGER" if isinstance(value, int) else "TEXT"


def _quoted(value: Any) -> str:
    return "NULL" if value is None else "'" + str(value).replace("'", "''") + "'"


def _cells(result: Result) -> dict[str, str]:
    file, speeds, setting = result.model.file, result.speeds, result.setting
    return {
        "model": facts.model_type(file),
        "size": _size(file.tensors_nbytes),
        "params": _params(facts.n_params(file)),
        "backend": _backend(result),
        "threads": str(result.model.threads),
        "n_batch": str(setting.n_batch),
        "n_ubatch": str(setting.n_ubatch),
        "type_k": setting.type_k,
        "type_v": setting.type_v,
        "devices": setting.devices,
        "split_mode": setting.split_mode or "",
        "tensor_split": setting.tensor_split or "",
        "gpu_layers": setting.gpu_layers or "",
        "cpu_moe": "all" if setting.cpu_moe is True else str(setting.cpu_moe),
        "test": result.test.name,
        "t/s": f"{fmean(speeds):.2f} ± {deviation(speeds):.2f}",
        "bandwidth_share": _decimal(result.bandwidth_share, 3),
        "GMAC/s": _decimal(result.gmac_per_s, 1),
        "tensor_share": _decimal(result.tensor_share, 3),
        "gap_us": _decimal(result.gap_us, 2),
        "idle_us": _decimal(result.idle_us, 2),
    }


def _decimal(value: float | None, places: int) -> str:
    return "" if value is None else f"{value:.{places}f}"


def _backend(result: Result) -> str:
    return "CUDA" if "cuda" in result.model.backend.name else "CPU"


def _gpu(result: Result) -> str:
    name = result.model.backend.name
    return name if "cuda" in name else ""


def _size(nbytes: int) -> str:
    gib = nbytes / 2**30
    return f"{gib:.2f} GiB" if gib >= 1 else f"{nbytes / 2**20:.2f} MiB"


def _params(n: int) -> str:
    return f"{n / 1e9:.2f} B" if n >= 10**9 else f"{n / 1e6:.2f} M"
