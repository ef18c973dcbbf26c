"""Everything that only a GPU can tell, in less than 8 minutes from a bare machine.

    python scripts/gpu_check.py --prepare .gpu      here: what is carried there (40 MB)
    python scripts/gpu_check.py --carried .gpu      there: results to tests/data/gpu/, or --out FILE
    python scripts/gpu_check.py --dry               on a driver without a GPU: times are "-"

Carry, beside the checkout: `.gpu`, which --prepare makes: every kernel compiled for the target, so
that nothing is compiled there, and the golden models, which lie outside of the checkout. Wheels
only where the machine has not all of: numpy numba llvmlite click rich tokenizers jinja2 pytest
cuda-bindings. compute-sanitizer is used where it is found. With a tool that runs one command there:

    carry [".gpu"], timeout_s 560, command
    PYTHONUNBUFFERED=1 python3 scripts/gpu_check.py --carried .gpu --out $OUT/check.json

Each part is a process of its own with a time of its own: one that fails, hangs or kills the GPU's
context costs no other. What a part found before it was ended is kept.

machine   what the GPU is, its copy bandwidth and tensor peak
loading   every kernel loads; which are refused
launches  host time of a launch by route, what a node of a graph adds, bytes that a graph takes
ops       the op grid against numpy
golden    golden models of all types against their limits
replays   1,000 steps of a replayed graph against the same launches one by one, bit for bit
splits    virtual devices on the one card against one device
sanitizer compute-sanitizer (memcheck, racecheck) over small cases of the op grid
speed     full-size random models: decode, prompt, shares of bandwidth and peak, gaps
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT, ROOT / "scripts", ROOT / "tests"):  # a checkout need not be installed
    sys.path.append(str(folder))

import gpu_check_machine as machine  # noqa: E402
import gpu_check_models as models  # noqa: E402
import gpu_check_ops as ops  # noqa: E402
import gpu_check_speed as speed  # noqa: E402
from gpu_check_setup import Check, Row, prepare  # noqa: E402

from runtime.errors import Error  # noqa: E402

DATA = ROOT / "tests" / "data" / "gpu"
_FOLDER = click.Path(file_okay=False, path_type=Path)


class Part(NamedTuple):
    """Rows of results, and the seconds it may take."""

    run: Callable[[Check], Iterator[Row]]
    seconds: float


PARTS = {
    "machine": Part(machine.machine, 25),
    "loading": Part(machine.loading, 45),
    "launches": Part(machine.launches, 25),
    "ops": Part(ops.ops, 60),
    "golden": Part(models.golden, 75),
    "replays": Part(models.replays, 45),
    "splits": Part(models.splits, 40),
    "sanitizer": Part(ops.sanitizer, 45),
    "speed": Part(speed.speed, 240),
}


@click.command(
    help="\b\n" + __doc__.replace("\n\n", "\n\n\b\n"),  # lines as they stand
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option("--dry", is_flag=True, help="A driver without a GPU; no times.")
@click.option("--prepare", "target_folder", type=_FOLDER, help="Make a folder.")
@click.option("--target", default="sm_90a", show_default=True, help="Of what --prepare compiles.")
@click.option("--carried", type=_FOLDER, help="The folder that was carried.")
@click.option("--device", default=0, help="Number of the GPU.")
@click.option("--seconds", default=470.0, show_default=True, help="Of all parts together.")
@click.option("--only", multiple=True, type=click.Choice(list(PARTS)), help="These parts.")
@click.option("--part", type=click.Choice(list(PARTS)), hidden=True, help="In this process.")
@click.option("--out", type=click.Path(path_type=Path), help="The JSON file.")
def main(
    dry: bool, target_folder: Path | None, target: str, carried: Path | None, device: int,
    seconds: float, only: tuple[str, ...], part: str | None, out: Path | None,
) -> None:  # fmt: skip
    if target_folder is not None:
        click.echo(prepare(target_folder, target))
        return
    if part is not None:
        assert out is not None, "a part writes to a file"
        keep(out, part, Check(dry, device, carried, out.parent))
        return
    check = Check(dry, device, carried)
    check.begin()
    wanted = {name: PARTS[name] for name in only or PARTS}
    report = run(check, wanted, seconds)
    show(report)
    path = out or (None if dry else DATA / f"{_slug(report)}-{report['date']}.json")
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        pictures(report, path)
        path.write_text(json.dumps(report, indent=1) + "\n")
        click.echo(f"written to {path}")
    sys.exit(any("error" in found for found in report["parts"].values()))


def run(check: Check, wanted: dict[str, Part], seconds: float) -> dict[str, Any]:
    """The report of these parts, within that time."""
    start, parts = time.monotonic(), {}
    for name, part in wanted.items():
        begun = time.monotonic()
        left = min(part.seconds, seconds - (begun - start))
        click.echo(f"[{begun - start:4.0f} s] {name} ...", err=True)
        if left < 5:
            found: dict[str, Any] = {"rows": [], "error": f"not begun: {seconds} s were over"}
        elif check.dry:
            found = collected(part, check)
        else:
            found = apart(name, check, left)
        found["took_s"] = None if check.dry else time.monotonic() - begun
        parts[name] = found
    return plain({"dry": check.dry, "date": datetime.date.today().isoformat(), "parts": parts})


def apart(name: str, check: Check, seconds: float) -> dict[str, Any]:
    """A part in a process of its own, ended after so long."""
    folder = check.scratch / name
    folder.mkdir()
    kept = folder / "found.json"
    command = [sys.executable, __file__, "--part", name, "--out", str(kept)]
    command += ["--device", str(check.index)]
    if check.carried is not None:
        command += ["--carried", str(check.carried)]
    error = ""
    try:
        done = subprocess.run(command, timeout=seconds, stdout=sys.stderr)
        error = f"ended with {done.returncode}" if done.returncode else ""
    except subprocess.TimeoutExpired:
        error = f"ended after {seconds:.0f} s"
    try:
        found = json.loads(kept.read_text())
    except (OSError, ValueError):
        found = {"rows": []}
    shutil.rmtree(folder, ignore_errors=True)
    return found | ({"error": error} if error and "error" not in found else {})


def keep(path: Path, name: str, check: Check) -> None:
    """Run a part, and have in the file what it found so far."""
    for found in growing(PARTS[name], check):
        path.write_text(json.dumps(plain(found)))


def collected(part: Part, check: Check) -> dict[str, Any]:
    """All that a part finds."""
    *_, last = growing(part, check)
    return last


def growing(part: Part, check: Check) -> Iterator[dict[str, Any]]:
    """What a part has found after each row, and at the end its error."""
    found: dict[str, Any] = {"rows": []}
    yield found
    try:
        for row in part.run(check):
            found["rows"].append(row)
            yield found
    except Exception as failure:  # one part must not cost the rest of a rare run
        found["error"] = f"{type(failure).__name__}: {failure}"
    wrong = [str(row["name"]) for row in found["rows"] if not row.get("right", True)]
    if wrong and "error" not in found:
        found["error"] = f"wrong: {', '.join(wrong[:8])}" + " ..." * (len(wrong) > 8)
    yield found


def plain(value: Any) -> Any:
    """JSON values; what was not measured is null."""
    if isinstance(value, dict):
        return {str(key): plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


def show(report: dict[str, Any]) -> None:
    """A table of each part, and its error."""
    if report["dry"]:
        click.echo("DRIVER WITHOUT A GPU: nothing was timed")
    for name, part in report["parts"].items():
        took = part["took_s"]
        click.echo(f"\n{name}" + (f", {took:.0f} s" if took is not None else ""))
        if "error" in part:
            click.echo(f"  ERROR {part['error']}")
        for row in part["rows"]:
            others = (
                f"{k} {_text(v)}" for k, v in row.items() if k not in ("name", "right", "svg")
            )
            mark = "" if row.get("right", True) else "  WRONG"
            click.echo(f"  {row['name']}: {', '.join(others)}{mark}")


def pictures(report: dict[str, Any], path: Path) -> None:
    """Write each picture of a row beside the report, which then has its name."""
    for part in report["parts"].values():
        for row in part["rows"]:
            if row.get("svg"):
                file = path.with_name(f"{path.stem}-{_slug_of(row['name'])}.svg")
                file.write_text(row["svg"], encoding="utf-8")
                row["svg"] = file.name


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def _slug(report: dict[str, Any]) -> str:
    """The GPU's name as a file's."""
    with contextlib.suppress(KeyError, IndexError):
        return _slug_of(report["parts"]["machine"]["rows"][0]["gpu"])
    return "gpu"


def _slug_of(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was made is removed
    try:
        main()
    except Error as error:
        sys.exit(f"error: {error}")
