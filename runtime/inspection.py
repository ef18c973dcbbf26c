"""What DEBUG shows and VALIDATE checks while a model runs.

DEBUG=1 one line per plan; 2 a table of each step with time, bytes and share of memory bandwidth,
where rows of the plan that do the same in different layers are one line; 3 every row for itself,
and the plan with its buffers; 4 the graph. VALIDATE=1 runs each row alone, compares it with the
reference backend, stops at the first that differs, and says so when none did.
"""

from __future__ import annotations

import functools
import math
import sys
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.errors import BackendError, Error

if TYPE_CHECKING:
    from runtime.engine.engine import Engine

# Rounding activations to int8 moves a layer's values by about 1e-4 (measured on the golden
# models, where weights are random); a wrong kernel moves them by 1e-1 and more.
_TOLERANCE = {"int8": 2e-2, "f32": 1e-6}


def run_inspected(
    engine: Engine, program: Any, inputs: Mapping[str, np.ndarray], live: Mapping[str, int],
    validate: bool, level: int,
) -> np.ndarray:  # fmt: skip
    """Run one step as VALIDATE and DEBUG ask; the logits."""
    if not program.plan.instructions:
        return program.run(inputs, live)[0]
    if level >= 3 and not getattr(program, "shown", False):
        program.shown = True
        print(program.plan, file=sys.stderr)
        if level >= 4:
            print(engine.graphs.graph(live["tokens"], max(1, live["outputs"])), file=sys.stderr)
    if validate:
        return _validate(engine, program, inputs, live)
    (rows, *_), nanoseconds = program.profile(inputs, live)
    _show_times(engine, program.plan, nanoseconds, inputs, live, level)
    return rows


def _show_times(
    engine: Engine, plan: Any, nanoseconds: np.ndarray, inputs: Mapping[str, np.ndarray],
    live: Mapping[str, int], level: int,
) -> None:  # fmt: skip
    """The table of a step: rows that do the same together, or each for itself from level 3."""
    from runtime.step_table import draw, lines, merged
    from runtime.traffic import seen_by

    seen = seen_by(inputs, live, engine.backend.page_nbytes)
    found = lines(plan, nanoseconds, seen)
    tokens, spent = live["tokens"], nanoseconds.sum() / 1e6
    title = f"step of {tokens} token{'s' * (tokens != 1)}, context {max(seen.lengths)}"
    draw(
        found if level >= 3 else merged(found),
        f"{title}, {spent:.2f} ms",
        _bandwidth(engine.backend.threads),
    )


@functools.cache
def _bandwidth(threads: int) -> float | None:
    """Bytes per second that memory gives to as many threads; None where it cannot be measured."""
    from runtime.backends.cpu.run.bandwidth import read_bandwidth

    try:
        return read_bandwidth(threads)
    except Error:
        return None


@dataclass
class _Tally:
    """What VALIDATE compared so far."""

    steps: int = 0
    results: int = 0
    worst: float = 0.0
    name: str = ""
    sound: bool = True

    def add(self, name: str, error: float) -> None:
        self.results += 1
        self.sound = self.sound and math.isfinite(error)
        if error >= self.worst:
            self.worst, self.name = error, name

    def report(self) -> None:
        """One line when all is well; what is wrong has been said where it was found."""
        if self.sound and self.results:
            plural = "s" * (self.steps != 1)
            print(
                f"VALIDATE: {self.results} results of {self.steps} step{plural} agree with the "
                f"reference (largest NMSE {self.worst:.1e}, {self.name})",
                file=sys.stderr,
            )


def _tally(engine: Engine) -> _Tally:
    """The model's tally, which reports when the model is closed or the program ends."""
    if engine.validated is None:
        tally = _Tally()
        engine.validated = weakref.finalize(engine, tally.report)
        _tallies[engine] = tally
    return _tallies[engine]


_tallies: weakref.WeakKeyDictionary[Engine, _Tally] = weakref.WeakKeyDictionary()


def _validate(
    engine: Engine, program: Any, inputs: Mapping[str, np.ndarray], live: Mapping[str, int]
) -> np.ndarray:
    """Each row's named results against the reference's, which keeps its own cache."""
    reference = _reference(engine)
    expected = reference.program(engine.graphs.graph(live["tokens"], max(1, live["outputs"])))
    expected.run(inputs, live)
    tolerance = _TOLERANCE[engine.backend.planner.options.activations]  # type: ignore[attr-defined]
    tally = _tally(engine)
    tally.steps += 1

    def compare(n: int, results: list[tuple[Any, np.ndarray]]) -> None:
        for tensor, got in results:
            want = expected.values.get(tensor.name)
            if tensor.op == "conv_post":  # more is done in it than in the plain node of its name
                continue
            if want is None or want.size == 0 or want.dtype.kind != "f":
                continue
            if getattr(tensor.shape[0], "name", "") == "outputs" and len(want) == live["tokens"]:
                want = want[inputs["output_rows"]]  # rows were picked early in this plan
            rows = got[: len(want)].reshape(want.shape)
            if not np.isfinite(rows).all() and np.isfinite(want).all():
                tally.sound = False
                raise BackendError(f"VALIDATE: {tensor.name} (row {n}) is not finite")
            error = float(((rows - want) ** 2).sum() / max(1e-30, float((want**2).sum())))
            tally.add(tensor.name, error)
            if error > tolerance:
                tally.sound = False
                row = program.plan.instructions[n]
                raise BackendError(
                    f"VALIDATE: {tensor.name} (row {n}, {row}) differs from the reference: "
                    f"NMSE {error:.1e} > {tolerance:.0e}"
                )

    return program.run_each(inputs, live, compare)[0]


def _reference(engine: Engine) -> Any:
    """The model's shadow on the reference backend; its first use looks at every weight."""
    if not hasattr(engine, "_shadow"):
        from runtime.backends.reference import ReferenceBackend

        warn_of_nan(engine)
        shadow = ReferenceBackend(engine.file)
        step = engine.graphs.inputs(1, 1)
        leaves = *step.k.values(), *step.v.values()
        engine.pools.pages.copy_too(partial(shadow.copy_pages, leaves))
        engine._shadow = shadow  # type: ignore[attr-defined]
    return engine._shadow  # type: ignore[attr-defined]


def warn_of_nan(engine: Engine) -> list[str]:
    """Names of the weights that hold NaN or infinity; each is named once on stderr."""
    found = []
    for name, tensor in engine.file.tensors.items():
        if (
            tensor.dtype.name not in ("i8", "i16", "i32", "i64")
            and not np.isfinite(tensor.to_float32()).all()
        ):
            found.append(name)
            print(f"VALIDATE: weight {name!r} holds NaN or infinite values", file=sys.stderr)
    return found
