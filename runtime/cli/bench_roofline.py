"""What bounds each phase of a model on this machine: `runtime bench --roofline FILE`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from runtime.cli.output import note
from runtime.cli.parsing import Refused

DEPTH, PROMPT, SEQUENCES = 2048, 512, 16
_AFTER, _REPEATS = 8, 6  # tokens before a step without depth; steps of which the best counts


def sizes(context: int, depth: int) -> dict[str, int]:
    """Arguments of `runtime.load`: room for what is measured here too."""
    return {"context": max(context, (depth or DEPTH) + 16, PROMPT + 16), "sequences": SEQUENCES}


def check(model: Any) -> None:
    """Refused: not one device of the CPU."""
    from runtime.backends.cpu import CpuBackend

    if not isinstance(model.backend, CpuBackend):
        raise Refused(
            "--roofline is of a model on one CPU device, --devices cpu, and this one runs on "
            f"{model.backend.name}"
        )


def draw(model: Any, path: str, depth: int | None, prompt: int) -> None:
    """Measure, and write the picture. depth: of the second decode. prompt: tokens of one step."""
    from runtime.outputs import write_text
    from runtime.report.roofline_svg import picture

    write_text(path, picture(roofline(model, depth, prompt)))
    note(f"what bounds each phase: {path}")


def roofline(model: Any, depth: int | None = None, prompt: int = PROMPT) -> Any:
    """The `Roofline` of a model on one CPU device."""
    from runtime.backends.cpu.run.cores import cpu_name
    from runtime.backends.cpu.run.raw_rates import unit_rates
    from runtime.cli.bandwidth import measured
    from runtime.report.roofline import Roofline

    threads, backend = model.threads, model.backend
    points = [point for phase in _phases(model, depth, prompt) for point in phase]
    note("raw rates of memory and units ...")
    counts = sorted({1, *(n for n in (2 << i for i in range(10)) if n < threads), threads})
    k, v = model.kv_types
    return Roofline(
        f"{model.file.path.name} on {cpu_name()}",
        f"{backend.library.target}, threads: {threads}, KV cache: {k if k == v else f'{k}, {v}'}",
        {n: measured(n) for n in counts}, unit_rates(threads), points,
    )  # fmt: skip


def _phases(model: Any, depth: int | None, prompt: int) -> Iterator[Any]:
    """The points of each phase."""
    random, most = np.random.default_rng(1), model.context - _REPEATS - 1
    prompt, deep = min(prompt, most), min(depth or DEPTH, most)

    def ids(n: int) -> list[int]:
        return [int(i) for i in random.integers(0, model.vocab_size, n)]

    def prompts() -> None:
        with model.session() as session:
            session.eval(ids(prompt), logits="last")

    note(f"steps of {prompt} tokens ...")
    yield _best(model, f"prompt of {prompt}", prompts, 3)
    for before in (_AFTER, deep):
        note(f"single tokens after {before} ...")
        with model.session() as session:
            session.eval(ids(before), logits="last")
            name = "decode" if before == _AFTER else f"decode after {before:,}"
            yield _best(model, name, partial(session.eval, ids(1), logits="last"))
    note(f"tokens of {SEQUENCES} sequences ...")
    sessions = [model.session() for _ in range(SEQUENCES)]
    try:
        model.step([(s, ids(_AFTER)) for s in sessions], logits="none")
        every = [(s, ids(1)) for s in sessions]
        yield _best(model, f"{SEQUENCES} sequences", lambda: model.step(every, logits="last"))
    finally:
        for session in sessions:
            session.close()


def _best(model: Any, phase: str, step: Callable[[], Any], repeats: int = _REPEATS) -> Any:
    """The points of the fastest of a few times that something is done in one step."""
    from runtime.report.roofline import points_of
    from runtime.traffic import seen_by

    engine, times = model._engine, []
    page_nbytes = model.backend.page_nbytes

    def execute(program: Any, inputs: Any, live: Any) -> Any:
        results, nanoseconds = program.profile(inputs, live)
        seen = seen_by(inputs, dict(live), page_nbytes)
        times.append((int(nanoseconds.sum()), program.plan, nanoseconds, seen))
        return results

    step()  # kernels and memory are there afterwards
    engine._execute = execute
    try:
        for _ in range(repeats - 1):
            step()
    finally:
        del engine._execute
    return points_of(phase, *min(times, key=lambda found: found[0])[1:])
