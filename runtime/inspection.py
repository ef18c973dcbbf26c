"""What DEBUG shows and VALIDATE checks while a model runs.

DEBUG=1 one line per plan, 2 a table of its rows with time and GB/s, 3 the plan with its buffers,
4 the graph. VALIDATE=1 runs each row alone, compares it with the reference backend, and stops at
the first that differs.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.errors import BackendError

if TYPE_CHECKING:
    from runtime.model import Model

# Rounding activations to int8 moves a layer's values by about 1e-4 (measured on the golden
# models, where weights are random); a wrong kernel moves them by 1e-1 and more.
_TOLERANCE = {"int8": 2e-2, "f32": 1e-6}


def run_inspected(
    model: Model, program: Any, inputs: Mapping[str, np.ndarray], live: Mapping[str, int],
    validate: bool, level: int,
) -> np.ndarray:  # fmt: skip
    """Run one step as VALIDATE and DEBUG ask; the logits."""
    if not hasattr(program, "profile"):
        return program.run(inputs, live)[0]
    if level >= 3 and not getattr(program, "shown", False):
        program.shown = True
        print(program.plan, file=sys.stderr)
        if level >= 4:
            print(model.graph(live["tokens"], max(1, live["outputs"])), file=sys.stderr)
    if validate:
        return _validate(model, program, inputs, live)
    (rows, *_), nanoseconds = program.profile(inputs, live)
    _print_times(program.plan, nanoseconds, live)
    return rows


def _print_times(plan: Any, nanoseconds: np.ndarray, live: Mapping[str, int]) -> None:
    """A table of rows of the plan by time, largest first; rows of the same calls are one line."""
    from rich.console import Console
    from rich.table import Table

    total: dict[str, list[float]] = defaultdict(lambda: [0, 0, 0])
    for instruction, spent in zip(plan.instructions, nanoseconds, strict=True):
        row = total[str(instruction)]
        for i, value in enumerate((1, spent, instruction.nbytes)):
            row[i] += value
    table = Table(title=f"step of {live['tokens']} tokens, {nanoseconds.sum() / 1e6:.2f} ms")
    for name in ("calls of a row", "rows", "µs", "share", "GB/s"):
        table.add_column(name, justify="left" if name.startswith("calls") else "right")
    everything = max(1, int(nanoseconds.sum()))
    for name, (count, spent, nbytes) in sorted(total.items(), key=lambda item: -item[1][1]):
        rate = f"{nbytes / max(1, spent):.1f}"
        share = f"{100 * spent / everything:.1f} %"
        table.add_row(name, str(int(count)), f"{spent / 1e3:.1f}", share, rate)
    Console(stderr=True, width=110).print(table)


def _validate(
    model: Model, program: Any, inputs: Mapping[str, np.ndarray], live: Mapping[str, int]
) -> np.ndarray:
    """Each row's named results against the reference's, which keeps its own cache."""
    reference = _reference(model)
    expected = reference.program(model.graph(live["tokens"], max(1, live["outputs"])))
    expected.run(inputs, live)
    tolerance = _TOLERANCE[model.backend.options.activations]  # type: ignore[attr-defined]

    def compare(n: int, results: list[tuple[Any, np.ndarray]]) -> None:
        for tensor, got in results:
            want = expected.values.get(tensor.name)
            if want is None or want.size == 0 or want.dtype.kind != "f":
                continue
            if getattr(tensor.shape[0], "name", "") == "outputs" and len(want) == live["tokens"]:
                want = want[inputs["output_rows"]]  # rows were picked early in this plan
            rows = got[: len(want)].reshape(want.shape)
            if not np.isfinite(rows).all() and np.isfinite(want).all():
                raise BackendError(f"VALIDATE: {tensor.name} (row {n}) is not finite")
            error = float(((rows - want) ** 2).sum() / max(1e-30, float((want**2).sum())))
            if error > tolerance:
                row = program.plan.instructions[n]
                raise BackendError(
                    f"VALIDATE: {tensor.name} (row {n}, {row}) differs from the reference: "
                    f"NMSE {error:.1e} > {tolerance:.0e}"
                )

    return program.run_each(inputs, live, compare)[0]


def _reference(model: Model) -> Any:
    """The model's shadow on the reference backend; its first use looks at every weight."""
    if not hasattr(model, "_shadow"):
        from runtime.backends.reference import ReferenceBackend

        warn_of_nan(model)
        model._shadow = ReferenceBackend(model.file)  # type: ignore[attr-defined]
    return model._shadow  # type: ignore[attr-defined]


def warn_of_nan(model: Model) -> list[str]:
    """Names of the weights that hold NaN or infinity; each is named once on stderr."""
    found = []
    for name, tensor in model.file.tensors.items():
        if (
            tensor.dtype.name not in ("i8", "i16", "i32", "i64")
            and not np.isfinite(tensor.to_float32()).all()
        ):
            found.append(name)
            print(f"VALIDATE: weight {name!r} holds NaN or infinite values", file=sys.stderr)
    return found
