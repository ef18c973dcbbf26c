"""Samplers without a memory: each takes candidates and gives the ones it leaves, at least one."""

from __future__ import annotations

import math

import numpy as np

from runtime.text.samplers.candidates import Candidates, best, ordered, softmax

_COLDEST = 1e-30  # as good as 0; logits divided by it are still finite


def top_k(c: Candidates, k: int) -> Candidates:
    """The k most probable (Fan et al. 2018, arXiv:1805.04833)."""
    return best(c, k)


def top_p(c: Candidates, p: float) -> Candidates:
    """The most probable that together reach p (Holtzman et al. 2019, arXiv:1904.09751)."""
    c = ordered(c)
    return c.take(slice(_reaching(softmax(c.values), p)))


def min_p(c: Candidates, p: float) -> Candidates:
    """Those at least p times as probable as the best (Nguyen et al. 2024, arXiv:2407.01082)."""
    if not c.best_first:
        return c.take(np.flatnonzero(c.values >= np.float64(c.values.max()) + math.log(p)))
    return c.take(slice(max(1, np.count_nonzero(c.values >= c.values[0] + math.log(p)))))


def typical(c: Candidates, p: float) -> Candidates:
    """Those whose information is nearest to what is expected, until they reach p
    (Meister et al. 2022, arXiv:2202.00666)."""
    c = ordered(c)
    chances = softmax(c.values)
    logs = _logs(chances)
    entropy = -float(np.sum(chances * logs))
    distance = np.where(chances > 0, np.abs(logs + entropy), np.inf)
    order = np.argsort(distance, kind="stable")
    keep = order[: _reaching(chances[order], p)]
    return c.take(np.sort(keep))


def top_n_sigma(c: Candidates, n: float) -> Candidates:
    """Those within n standard deviations of the best logit (Tang et al. 2024, arXiv:2411.07641)."""
    finite = c.values if c.values.min() > -np.inf else c.values[c.values > -np.inf]
    if not finite.size:
        return c
    lowest = np.float64(finite.max()) - n * finite.std(dtype=np.float64)
    return c.take(np.flatnonzero(c.values >= lowest))


def exclude_top(c: Candidates, threshold: float) -> Candidates:
    """XTC: of those at least `threshold` probable only the least one
    (p-e-w 2024, text-generation-webui pull request 6335)."""
    c = ordered(c)
    likely = int(np.count_nonzero(softmax(c.values) >= threshold))
    return c.take(slice(max(0, likely - 1), None))


def temperature(c: Candidates, t: float) -> Candidates:
    """Logits divided by t; at 0 the best alone."""
    if t == 0:
        return best(c, 1)
    return Candidates(c.values / np.float64(max(t, _COLDEST)), c.ids, c.best_first)


def dynamic_temperature(c: Candidates, t: float, spread: float, exponent: float) -> Candidates:
    """A temperature between t - spread and t + spread, the higher the more even the chances:
    by the power `exponent` of their entropy's share of the largest (--dynatemp-range)."""
    if c.values.size < 2:
        return c
    chances = softmax(c.values)
    entropy = -float(np.sum(chances * _logs(chances)))
    lowest = max(0.0, t - spread)
    share = min(1.0, max(0.0, entropy / math.log(c.values.size)))
    return temperature(c, lowest + (t + spread - lowest) * share**exponent)


def _logs(chances: np.ndarray) -> np.ndarray:
    """Natural logarithms; 0 for a chance of 0, which adds nothing to an entropy."""
    return np.log(chances, where=chances > 0, out=np.zeros_like(chances))


def _reaching(chances: np.ndarray, p: float) -> int:
    """How many of `chances` have to be added up to reach `p`; at least one."""
    return int(chances.cumsum().searchsorted(p)) + 1
