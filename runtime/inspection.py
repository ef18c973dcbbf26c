"""What DEBUG shows and VALIDATE checks while a model runs.

DEBUG=1 one line per plan; 2 a table of each step with time, bytes and share of memory bandwidth,
where instructions that do the same in different layers are one line; 3 each for itself,
and the plan with its buffers; 4 the graph. VALIDATE=1 runs each alone and compares every call
with what its op means (validation.py), stops at the first that differs, and says so when none did.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.backends.base import Apart, Backend, Program
from runtime.errors import Error

if TYPE_CHECKING:
    from runtime.engine.engine import Engine
    from runtime.validation import Validation


_shown: weakref.WeakSet[Program] = weakref.WeakSet()  # whose plans were printed
_unjudged: weakref.WeakSet[Engine] = weakref.WeakSet()  # of which was said that they are not


def run_inspected(
    engine: Engine, program: Program, inputs: Mapping[str, np.ndarray], live: Mapping[str, int],
    validate: bool, level: int,
) -> Sequence[np.ndarray]:  # fmt: skip
    """Run one step as VALIDATE and DEBUG ask; its results."""
    if not program.plan.instructions:
        return program.run(inputs, live)
    if level >= 3 and program not in _shown:
        _shown.add(program)
        print(program.plan, file=sys.stderr)
        if level >= 4:
            print(engine.graphs.graph(live["tokens"], max(1, live["outputs"])), file=sys.stderr)
    if validate and program.observable:
        return _validation(engine).run(program, inputs, live)
    if validate and engine not in _unjudged:
        _unjudged.add(engine)
        print(
            f"VALIDATE: nothing is compared on {engine.backend.name}: it judges the calls of one "
            "device that runs alone",
            file=sys.stderr,
        )
    if level < 2:
        return program.run(inputs, live)
    results, nanoseconds = program.profile(inputs, live)
    if nanoseconds.any():  # the null device takes no time
        _show_times(engine, program.plan, nanoseconds, inputs, live, level)
    return results


def _show_times(
    engine: Engine, plan: Any, nanoseconds: np.ndarray, inputs: Mapping[str, np.ndarray],
    live: Mapping[str, int], level: int,
) -> None:  # fmt: skip
    """The table of a step: instructions that do the same as one line; from level 3 each."""
    from runtime.step_table import draw, lines, merged
    from runtime.traffic import seen_by

    seen = seen_by(inputs, live, engine.backend.page_nbytes)
    found = lines(plan, nanoseconds, seen)
    tokens, spent = live["tokens"], nanoseconds.sum() / 1e6
    title = f"step of {tokens} token{'s' * (tokens != 1)}, context {max(seen.lengths)}"
    draw(
        found if level >= 3 else merged(found),
        f"{title}, {spent:.2f} ms",
        _bandwidth_of(engine.backend),
    )


def _bandwidth_of(backend: Backend) -> float | None:
    """Of the memory that a backend works in; None where it cannot be measured."""
    if isinstance(backend, Apart):
        return backend.bandwidth()
    return _bandwidth(backend.threads)


@functools.cache
def _bandwidth(threads: int) -> float | None:
    """Bytes per second that memory gives to as many threads; None where it cannot be measured."""
    from runtime.backends.cpu.run.bandwidth import read_bandwidth

    try:
        return read_bandwidth(threads)
    except Error:
        return None


_validations: weakref.WeakKeyDictionary[Engine, Validation] = weakref.WeakKeyDictionary()


def _validation(engine: Engine) -> Validation:
    """What VALIDATE found of a model, told when it is closed or the program ends.

    The first use looks at every weight.
    """
    from runtime.backends.reference import ReferenceBackend
    from runtime.validation import Validation

    if engine not in _validations:
        made = _validations[engine] = Validation(ReferenceBackend(engine.files).stored)
        made.tally.sound = not warn_of_nan(engine)
        engine.validated = weakref.finalize(engine, made.tally.report)
    return _validations[engine]


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
