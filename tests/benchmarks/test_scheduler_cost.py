"""What a step of 16 answers costs the scheduler itself: beside the engine and the samplers.

`pytest tests/benchmarks --benchmark-only` shows the figures; 150 µs is what it may be on a quiet
core. The test fails far above that only, as machines of tests are shared.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import numpy as np

import runtime
from runtime.engine.task import Task

REQUESTS, STEPS = 16, 300
MOST = 1e-3  # seconds


class Endless(Task):
    """A token more in each step, always the same."""

    def start(self, engine: Any) -> None:
        self.sequence = engine.sequence(engine.empty(), "")

    def take(self, found: np.ndarray | int) -> None:
        self.pending = [7]
        self.over = self.length > STEPS


def own_cost() -> float:
    """Seconds of a step, the median."""
    seconds: list[float] = []
    with runtime.load(devices="null", context=STEPS + 40, sequences=REQUESTS) as model:
        scheduler, engine = model._scheduler, model._engine
        ran, serve = engine.ran, scheduler._serve
        inside = [0.0]

        @contextmanager
        def timed(pieces: Any) -> Iterator[Any]:
            began = time.perf_counter()
            with ran(pieces) as found:
                inside[0] += time.perf_counter() - began
                yield found

        def served() -> bool:
            inside[0], began = 0.0, time.perf_counter()
            more, all_of_them = serve(), len(scheduler._running) == REQUESTS
            if all_of_them:
                seconds.append(time.perf_counter() - began - inside[0])
            return more

        engine.ran, scheduler._serve = timed, served  # type: ignore[method-assign]
        tasks = [Endless(None, [5, 6]) for _ in range(REQUESTS)]
        for task in tasks:
            scheduler.submit(task)
        for task in tasks:
            assert task.wait(lambda task=task: task.over, 60, end=True) and task.error is None
    return median(seconds[5:])


def test_a_step_of_sixteen(benchmark: Any):
    costs: list[float] = []
    benchmark.pedantic(lambda: costs.append(own_cost()), rounds=1, iterations=1)
    benchmark.extra_info["microseconds"] = round(1e6 * min(costs))
    print(f"{1e6 * min(costs):.0f} µs a step")
    assert min(costs) < MOST
