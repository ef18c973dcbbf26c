"""How far a model's predictions are from those of a base, in the figures of llama-perplexity."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from runtime.quality.rows import Scores

PERCENTILES = (99.9, 99, 95, 90, 75, 50, 25, 10, 5, 1, 0.1)


class Estimate(NamedTuple):
    """A value and its standard error."""

    value: float
    error: float

    def scaled(self, factor: float) -> Estimate:
        """Both times a factor."""
        return Estimate(self.value * factor, self.error * factor)

    def shown(self, digits: int) -> str:
        """Both, with as many digits after the point."""
        return f"{self.value:.{digits}f} ± {self.error:.{digits}f}"


class Spread(NamedTuple):
    """Of one number per token: its mean, its extremes, and by percent what is not exceeded."""

    mean: Estimate
    maximum: float
    percentiles: dict[float, float]
    minimum: float


class Divergence(NamedTuple):
    """Of all scored tokens.

    kld: Kullback-Leibler divergence of the base's probabilities from the model's, in nats.
    change: of the probability of the token that follows, and `rms` the root of its mean square.
    same_top: share of tokens where both think the same the most probable. base: its perplexity as
    its file gives it; ratio, difference: of the perplexities, the model's over and minus the
    base's; log_ratio, correlation: of their logarithms.
    """

    kld: Spread
    change: Spread
    rms: Estimate
    same_top: Estimate
    base: Estimate
    ratio: Estimate
    difference: Estimate
    log_ratio: Estimate
    correlation: float

    def __str__(self) -> str:
        same = self.same_top.scaled(100).shown(2)
        return f"KL divergence {self.kld.mean.shown(6)}, same top {same} %"


def mean(values: np.ndarray) -> Estimate:
    """Mean and its standard error of float64 [tokens]; of a single one the error is unknown, 0."""
    variance = max(0.0, float((values * values).mean() - values.mean() ** 2))
    return Estimate(float(values.mean()), (variance / max(1, len(values) - 1)) ** 0.5)


def perplexity(nll: np.ndarray) -> Estimate:
    """exp of the mean of float64 [tokens]."""
    found = mean(nll)
    value = float(np.exp(found.value))
    return Estimate(value, value * found.error)


def divergence(scores: Scores) -> Divergence:
    """The figures of all tokens."""
    nll, base = mean(scores.nll), mean(scores.nll_base)
    model, other = perplexity(scores.nll), perplexity(scores.nll_base)
    together = _covariance(scores.nll, scores.nll_base)
    log_ratio = mean(scores.nll - scores.nll_base)
    ratio = float(np.exp(log_ratio.value))
    spread = model.error**2 + other.error**2 - 2 * model.value * other.value * together
    change = np.exp(-scores.nll) - np.exp(-scores.nll_base)
    square = mean(change**2)
    rms = square.value**0.5
    return Divergence(
        kld=_spread(scores.kld),
        change=_spread(change),
        rms=Estimate(rms, square.error / (2 * rms) if rms else 0.0),
        same_top=mean(scores.same.astype(np.float64)),
        base=other,
        ratio=Estimate(ratio, ratio * log_ratio.error),
        difference=Estimate(model.value - other.value, max(0.0, spread) ** 0.5),
        log_ratio=log_ratio,
        correlation=together / (nll.error * base.error) if nll.error * base.error else 1.0,
    )


def _covariance(a: np.ndarray, b: np.ndarray) -> float:
    """Of the means of two numbers per token."""
    return float((a * b).mean() - a.mean() * b.mean()) / max(1, len(a) - 1)


def _spread(values: np.ndarray) -> Spread:
    found = np.percentile(values, PERCENTILES).tolist()
    each = dict(zip(PERCENTILES, found, strict=True))
    return Spread(mean(values), float(values.max()), each, float(values.min()))


def as_data(found: Any) -> Any:
    """Records and their fields as JSON knows them."""
    if isinstance(found, dict):
        return {f"{key:g}" if isinstance(key, float | int) else key: as_data(value)
                for key, value in found.items()}  # fmt: skip
    return as_data(found._asdict()) if hasattr(found, "_asdict") else found
