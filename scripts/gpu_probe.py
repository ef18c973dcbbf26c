"""What only a GPU can tell: does the code load, is it right, how fast is it. Under 8 minutes.

    python scripts/gpu_probe.py                     results to tests/data/gpu/, by GPU and date
    python scripts/gpu_probe.py --fake              on a driver without a GPU: times are "-"

Times are the device's own (events around replays of a graph), the best of several. A node's gap is
what cutting the same work into 300 launches adds per launch. Copy bandwidth counts bytes read and
bytes written. Matrix-vector products with `copies` read weights that the L2 cache cannot hold; the
kernels of one copy may find their data in it. `--fake` checks every call of the driver and runs
small cases on the simulator, so the script is known to work where a GPU is met at last.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np

sys.path.append(str(Path(__file__).resolve().parent.parent))  # a checkout need not be installed

import gpu_probe_cases as cases
import gpu_probe_timing as timing
from gpu_probe_step import replays
from gpu_probe_tables import show
from gpu_probe_timing import Gpu

from runtime.backends.cuda.catalogue import KERNELS
from runtime.backends.cuda.driver import SHARED_NBYTES
from runtime.backends.cuda.launcher import Device
from runtime.backends.cuda.library import TOOLCHAIN, library, toolchain_digest
from runtime.backends.cuda.opening import open_driver
from runtime.ops.errors import Error

TESTS = Path(__file__).resolve().parent.parent / "tests"
DATA = TESTS / "data" / "gpu"
SHAPES = (4096, 4096), (4096, 14336), (151_936, 4096)
FAKE_SHAPES = ((6, 256),)
TILES = (4096, 4096, 512), (14336, 4096, 512), (4096, 4096, 2048)


@click.command(help=__doc__)
@click.option("--fake", is_flag=True, help="A driver without a GPU; no times.")
@click.option("--device", default=0, help="Number of the GPU.")
@click.option("--seconds", default=420, help="Begin no new part after this long.")
@click.option("--out", type=click.Path(path_type=Path), help="The JSON file.")
def main(fake: bool, device: int, seconds: int, out: Path | None) -> None:
    try:
        report = probe(opened(fake, device), seconds)
    except Error as error:
        raise click.ClickException(str(error)) from None
    show(report)
    if out or not fake:
        path = out or default_path(report)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n")
        click.echo(f"written to {path}")
    sys.exit(any("error" in part for part in report["parts"].values()))


def opened(fake: bool, index: int) -> Device:
    """The GPU, or the one that is not there."""
    if fake:
        sys.path.append(str(TESTS))
        from fake_driver import FakeDriver
        from fake_nodes import FakeLibrary

        return Device(FakeDriver(execute=True), 0, FakeLibrary())
    driver = open_driver()
    return Device(driver, index)


def default_path(report: dict[str, Any]) -> Path:
    """NAME-DATE.json among the results that are kept."""
    name = re.sub(r"[^a-z0-9]+", "-", report["gpu"]["name"].lower()).strip("-")
    return DATA / f"{name}-{report['date']}.json"


def probe(device: Device, seconds: float = 420) -> dict[str, Any]:
    """Everything, as JSON values; a part that fails holds its `error`, the others go on."""
    start, gpu = time.monotonic(), Gpu(device)
    info = device.info
    report: dict[str, Any] = {
        "fake": device.driver.fake,
        "date": datetime.date.today().isoformat(),
        "host": {"system": platform.platform(), "python": platform.python_version()},
        "gpu": vars(info) | {"target": device.target},
        "driver": {"cuda": device.driver.version()},
        "toolchain": _versions(),
        "parts": {},
    }
    for name, part in PARTS.items():
        begun = time.monotonic()
        if begun - start > seconds:
            report["parts"][name] = {"error": f"not begun: {seconds} s were over"}
            continue
        try:
            found = part(gpu)
        except Exception as error:  # one part must not cost the rest of a rare run
            found = {"error": f"{type(error).__name__}: {error}"}
        found["took_s"] = None if gpu.small else time.monotonic() - begun
        report["parts"][name] = found
    return _plain(report)


def _versions() -> dict[str, str]:
    found = {}
    for name in (*TOOLCHAIN, "cuda-bindings", "cuda-core"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _plain(value: Any) -> Any:
    """JSON values; what was not measured is null."""
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value


def loading(gpu: Gpu) -> dict[str, Any]:
    """Compile what the cache has not, load all; kernels that the driver refuses."""
    kernels, device = KERNELS.every(), gpu.device
    start = time.monotonic()
    if not gpu.small:
        library(device.target).prepare(kernels)
    compiled, refused = time.monotonic(), {}
    for kernel in kernels:
        try:
            device.function(kernel)
        except Error as error:
            refused[str(kernel)] = str(error)
    times = {"prepare_s": compiled - start, "load_s": time.monotonic() - compiled}
    times = dict.fromkeys(times, math.nan) if gpu.small else times
    found = {"kernels": len(kernels), "refused": refused, "toolchain": toolchain_digest()[:16]}
    return found | times | ({"error": "kernels were refused"} if refused else {})


def numerics(gpu: Gpu) -> dict[str, Any]:
    """Every kernel against numpy, at odd small sizes and at those of models."""
    rows = []
    row: dict[str, Any]
    for sizes in (cases.SMALL,) if gpu.small else (cases.SMALL, cases.LARGE):
        for case in cases.cases(np.random.default_rng(1), sizes):
            row = {"kernel": case.name, "shape": case.shape, "tolerance": case.tolerance}
            try:
                row["error"] = case_error(gpu, case)
            except Error as failure:
                row["failure"] = str(failure)
            rows.append(row | {"right": bool(row.get("error", math.inf) <= case.tolerance)})
    wrong = [row["kernel"] for row in rows if not row["right"]]
    return {"rows": rows} | ({"error": f"wrong: {', '.join(wrong)}"} if wrong else {})


def case_error(gpu: Gpu, case: cases.Case) -> float:
    """What the case's check says of what the device computed."""
    with gpu.device.arena(case.nbytes + 512 * len(case.arrays), "case") as arena:
        buffers, launches = timing.placed(gpu, arena, case)
        for launch in launches:
            launch.run(gpu.stream)
        outputs = [
            buffers[name].read(np.empty_like(case.arrays[name]), gpu.stream)
            for name in case.outputs
        ]
    return case.check(*outputs)


def launches(gpu: Gpu) -> dict[str, Any]:
    """Host time of a launch by route."""
    return {"us": timing.launch_costs(gpu)}


def gaps(gpu: Gpu) -> dict[str, Any]:
    """Between nodes of a graph."""
    return {"us": timing.node_gaps(gpu)}


def shared_memory(gpu: Gpu) -> dict[str, Any]:
    """A kernel that needs more than 48 KiB, then one given all that a block may have."""
    case = cases.tile(np.random.default_rng(1), "Q8_0", 5, 64, 3)
    most, driver = gpu.device.info.shared_nbytes, gpu.device.driver
    function = gpu.device.function(case.steps[0][0])
    errors = [case_error(gpu, case)]
    driver.allow_shared(function.handle, most)
    with gpu.device.arena(case.nbytes + (1 << 16), "shared") as arena:
        buffers, (launch,) = timing.placed(gpu, arena, case)
        launch.shape = (*launch.shape[:-1], most)
        launch.run(gpu.stream)
        out = buffers["out"].read(np.empty_like(case.arrays["out"]), gpu.stream)
        errors.append(case.check(out))
    right = max(errors) <= case.tolerance
    sizes = {"default": SHARED_NBYTES, "kernel": function.entry.shared_nbytes, "most": most}
    return sizes | {"right": right} | ({} if right else {"error": f"errors {errors}"})


def speed(gpu: Gpu) -> dict[str, Any]:
    """Kernels of a decode step and the matrix-vector products against the copy bandwidth."""
    bandwidth = timing.copy_bandwidth(gpu)
    rows = [_speed_row(row, bandwidth) for row in _speeds(gpu)]
    return {"copy_gb_per_s": bandwidth / 1e9, "rows": rows}


def _speeds(gpu: Gpu) -> Iterator[dict[str, Any]]:
    for format in cases.PACK:
        for rows, k in FAKE_SHAPES if gpu.small else SHAPES:
            found = timing.matvec_speed(gpu, format, rows, k)
            yield {"kernel": f"matvec {format}", "shape": f"{rows}x{k}"} | found
    if gpu.small:
        return
    for case in cases.cases(np.random.default_rng(1), cases.LARGE):
        if not case.name.startswith("tile"):
            took = timing.case_seconds(gpu, case)
            row = {"kernel": case.name, "shape": case.shape, "copies": 1}
            yield row | {"nbytes": case.nbytes, "seconds": took}


def _speed_row(row: dict[str, Any], bandwidth: float) -> dict[str, Any]:
    rate = row["nbytes"] / row["seconds"]
    return row | {"gb_per_s": rate / 1e9, "share": rate / bandwidth}


def tiles(gpu: Gpu) -> dict[str, Any]:
    """Products of prompts."""
    rows = []
    for format in ("Q8_0", "Q4_0"):
        for shape in ((6, 64, 3),) if gpu.small else TILES:
            found = timing.tile_speed(gpu, format, *shape)
            rows.append({"kernel": f"tile {format}", "shape": "x".join(map(str, shape))} | found)
    return {"int8_peak_tflops": timing.int8_peak(gpu) / 1e12, "rows": rows}


PARTS: dict[str, Callable[[Gpu], dict[str, Any]]] = {
    "loading": loading,
    "numerics": numerics,
    "shared memory": shared_memory,
    "launch cost": launches,
    "node gap": gaps,
    "replays": replays,
    "speed": speed,
    "tile": tiles,
}

if __name__ == "__main__":
    main()
