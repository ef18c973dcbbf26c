"""What `runtime bench` has measured of one test."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from statistics import fmean, stdev
from typing import Any

from runtime.cli.bench_plan import Setting, Test


@dataclass
class Result:
    """Seconds of every repetition, and what the model had to do for one token.

    bandwidth: bytes per second that the memory gives in which the model lies. operations: of the
    GPU's tensor cores per second, None where it runs on no one GPU. gap: seconds from one launch
    of a decode step to the next; idle: those from one decode step to the next; None as well.
    """

    test: Test
    setting: Setting
    model: Any
    bandwidth: float | None
    operations: float | None = None
    gap: float | None = None
    idle: float | None = None
    seconds: list[float] = field(default_factory=list)
    started: str = field(default_factory=lambda: datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"))

    @property
    def speeds(self) -> list[float]:
        """Tokens per second of every repetition."""
        return [self.test.tokens / s for s in self.seconds]

    @property
    def bandwidth_share(self) -> float | None:
        """Of a decode: bytes that its tokens had to read per second, over what memory gives."""
        if not self.test.n_gen or self.test.n_prompt or not self.bandwidth:
            return None
        return self._traffic().nbytes * fmean(self.speeds) / self.bandwidth

    @property
    def gmac_per_s(self) -> float | None:
        """Of a prompt: 1e9 multiplications of weights per second."""
        if not self.test.n_prompt or self.test.n_gen:
            return None
        return self._traffic().macs * fmean(self.speeds) / 1e9

    @property
    def tensor_share(self) -> float | None:
        """Of a prompt on a GPU: operations per second, over what its tensor cores give."""
        if self.gmac_per_s is None or not self.operations:
            return None
        return 2e9 * self.gmac_per_s / self.operations

    @property
    def gap_us(self) -> float | None:
        """Of tokens one by one on a GPU: between the launches of a step, on average."""
        return _us(self.gap) if self.test.n_gen else None

    @property
    def idle_us(self) -> float | None:
        """Of tokens one by one: how long the GPU waits for the next step, the median."""
        return _us(self.idle)

    def _traffic(self) -> Any:
        """What a token moves in the middle of the test."""
        from runtime import traffic

        context = self.test.n_depth + self.test.n_gen // 2
        return traffic.of_file(self.model.file, self.model.kv_types, context)


def _us(seconds: float | None) -> float | None:
    known = seconds is not None and math.isfinite(seconds)
    return round(1e6 * seconds, 3) if known else None  # type: ignore[operator]


def deviation(values: Sequence[float]) -> float:
    """Standard deviation of a sample (divided by n - 1); 0 for one value."""
    return stdev(values) if len(values) > 1 else 0.0
