"""Arithmetic on rows of logits, [rows, vocabulary], a few at a time so that they stay in the cache.

Rows are independent and are shared out among threads; no result depends on how many there are.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

FLOOR = 16.0  # tokens of a base less probable than exp(-FLOOR) are left out of a divergence
_VALUES = 1 << 18  # of logits that are worked on at a time


class Scores(NamedTuple):
    """Of each row, float64 [rows]: what a model says of the token that followed.

    nll: minus the natural logarithm of its probability. nll_base: by the base. kld: divergence
    of the row from the base's, in nats. same: whether both think the same token the most probable.
    """

    nll: np.ndarray
    nll_base: np.ndarray
    kld: np.ndarray
    same: np.ndarray


def parts(rows: int, width: int) -> list[slice]:
    """Stretches of rows that fit into a processor's cache."""
    each = max(1, _VALUES // width)
    return [slice(at, at + each) for at in range(0, rows, each)]


def log_sums(logits: np.ndarray) -> np.ndarray:
    """float64 [rows]: the logarithm of the sum of exponentials."""
    top = logits.max(1, keepdims=True)
    return top[:, 0] + np.log(np.exp(logits - top).sum(1).astype(np.float64))


def scores(logits: np.ndarray, wanted: np.ndarray, base: np.ndarray | None = None) -> Scores:
    """Rows of logits against rows of a base's log-probabilities, float32 both.

    wanted: of each row the token that followed. Without a base, against themselves.
    """
    sums, at = log_sums(logits), np.arange(len(wanted))
    nll = sums - logits[at, wanted]
    if base is None:
        return Scores(nll, nll, np.zeros_like(nll), np.ones(len(nll), bool))
    difference = base - logits
    difference += sums[:, None].astype(np.float32)
    difference *= np.exp(base)
    difference *= base > -FLOOR
    return Scores(
        nll,
        -base[at, wanted].astype(np.float64),
        difference.sum(1).astype(np.float64),
        logits.argmax(1) == base.argmax(1),
    )
