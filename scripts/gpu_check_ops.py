"""The op grid on the GPU against numpy, and its small cases under compute-sanitizer."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from gpu_check_setup import Check, Row

from runtime.ops.dtypes import BF16
from runtime.ops.errors import BackendError
from runtime.ops.quants import dequantize
from runtime.ops.registry import OPS

_SANITIZERS = Path("/usr/local/cuda/bin/compute-sanitizer"), Path("/opt/nvidia")
_DRY = "add", "select_rows", "softmax"  # ops: the grid has tests of its own
_SOME = 40  # points under the sanitizer, which is slow
_TOOLS = "memcheck", "racecheck"


def ops(check: Check, every: int = 1) -> Iterator[Row]:
    """Every point of the grid that a rule takes; rows are those that are wrong, then the counts.

    every: one point of so many.
    """
    points = [point.values for point in _points()]
    if check.dry:
        points = [point for point in points if point[0] in _DRY and point[2] in ("whole", "partly")]
    points = points[::every]
    equal, declined = 0, dict[str, int]()
    with check.device():  # keeps the context from point to point: making one takes long
        for name, n, variant in points:
            says = _says(check, name, n, variant)
            if says is None:
                declined[name] = declined.get(name, 0) + 1
            elif says:
                yield {"name": f"{name}-{n}-{variant}", "says": says, "right": False}
            else:
                equal += 1
    counts = {"points": len(points), "equal": equal, "declined": sum(declined.values())}
    yield {"name": "grid"} | counts | {"declined_ops": declined}


def _points() -> list:
    from op_grid import INPUTS
    from test_ops import RUN

    return [point for point in RUN if point.values[2].split()[0] not in INPUTS]


def _says(check: Check, name: str, n: int, variant: str) -> str | None:
    """What is wrong with one point, or ""; None: no rule takes it."""
    from op_grid import Built
    from test_ops import _check, _fill, _left, _wanted

    built = Built(name, OPS[name].cases[n], variant)
    results, left = _wanted(built)
    backend = check.backend(built.file(), activations="f32")
    try:
        backend.plan(built.graph)
    except BackendError:
        backend.close()
        return None
    try:
        program = backend.program(built.graph)
        _fill(backend, built)
        for found, want in zip(program.run(built.inputs, built.live), results, strict=True):
            if built.node.dtype is BF16:
                found = dequantize(found, BF16, found.shape)
            _check(np.asarray(found), want, max(built.case.tolerance, 1e-10))
        for key, value in left.items():
            _check(_left(backend, built, key), value, max(built.case.tolerance, 1e-6))
    except (AssertionError, BackendError) as error:
        return " ".join(f"{type(error).__name__} {error}".split())[:200]
    finally:
        backend.close()
    return ""


def sanitizer(check: Check) -> Iterator[Row]:
    """Errors that compute-sanitizer finds."""
    tool = None if check.dry else find()
    if tool is None:
        yield {"name": "compute-sanitizer", "says": "not here"}
        return
    points = len(_points())
    every = max(1, points // _SOME)
    for kind in _TOOLS:
        given = f"Check(False, {check.index}, {check.carried and str(check.carried)!r})"
        code = (
            f"import sys; sys.path[:0] = {sys.path!r}\n"
            "import gpu_check_ops as o; from gpu_check_setup import Check\n"
            f"print(list(o.ops({given}, {every})))"
        )
        command = [str(tool), "--tool", kind, "--error-exitcode", "9", sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True)
        found = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", done.stdout)
        errors = int(found[1]) if found else None
        lines = [line.strip() for line in done.stdout.splitlines() if line.startswith("=========")]
        wrong = done.returncode != 0 or errors != 0
        said = lines[1:6] if wrong else []
        yield {"name": kind, "errors": errors, "every": every, "says": said, "right": not wrong}


def find() -> Path | None:
    """compute-sanitizer, where CUDA's toolkit has it."""
    on_path = shutil.which("compute-sanitizer")
    if on_path:
        return Path(on_path)
    first, others = _SANITIZERS
    if first.is_file():
        return first
    return next(iter(sorted(others.rglob("compute-sanitizer"))), None) if others.is_dir() else None
