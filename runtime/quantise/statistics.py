"""Statistics of an importance matrix, those that llama-imatrix stores beside each weight's sums.

Of the columns of all matrices that saw rows, by the mean m of the inputs and the mean of their
squares (where a file has no sums of inputs, squares stand for m):

sum_sq: sum of the mean squares. mean, std_deviation, skewness, kurtosis (excess): of m; elements:
how many. h_norm: entropy of the shares that columns have of sum_sq, in percent of the largest
possible. Against the same weight in the nearest layer before: gain, ratio of the root mean squares;
l2_dist, cossim, pearson, covariance: of the two m.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import numpy as np

from runtime.quantise.imatrix_file import Entry

SCHEMA = (
    "sum_sq", "mean", "elements", "std_deviation", "skewness", "kurtosis", "gain", "h_norm",
    "l2_dist", "cossim", "pearson", "covariance",
)  # fmt: skip
_BLOCK = re.compile(r"(?<=blk\.)\d+(?=\.)")
_TINY = 1e-10


def statistics(entries: Mapping[str, Entry]) -> dict[str, np.ndarray]:
    """Of each entry float32 [12], in the order of SCHEMA; NaN for what it does not have."""
    return {name: _of(entry, _before(name, entries)) for name, entry in entries.items()}


def layer(name: str) -> int | None:
    """The number of the layer that a weight is of."""
    found = _BLOCK.search(name)
    return int(found[0]) if found else None


def _before(name: str, entries: Mapping[str, Entry]) -> Entry | None:
    """The entry of the same weight in the nearest layer before."""
    earlier = (_BLOCK.sub(str(n), name) for n in reversed(range(layer(name) or 0)))
    return next((entries[other] for other in earlier if other in entries), None)


def _means(entry: Entry, use_sums: bool) -> np.ndarray:
    """Flat; NaN in matrices that saw no rows."""
    values = entry.sums if use_sums and entry.sums is not None else entry.squares
    counts = np.where(entry.counts > 0, entry.counts, np.nan).astype(np.float64)
    return (values / counts[:, None]).reshape(-1)


def _of(entry: Entry, before: Entry | None) -> np.ndarray:
    m, energy = (_seen(_means(entry, use)) for use in (True, False))
    found = dict.fromkeys(SCHEMA, math.nan)
    if m.size:
        total, d = energy.sum(), m - m.mean()
        variance = (d**2).mean()
        spread = variance**0.5 > _TINY
        found |= {
            "sum_sq": total, "mean": m.mean(), "elements": m.size, "std_deviation": variance**0.5,
            "skewness": (d**3).mean() / variance**1.5 if spread else 0,
            "kurtosis": (d**4).mean() / variance**2 - 3 if spread else 0,
        }  # fmt: skip
        if m.size > 1:
            shares = energy[energy > _TINY * total] / total if total > 0 else np.ones(1)
            found["h_norm"] = -100 * (shares * np.log2(shares)).sum() / math.log2(m.size)
        if before is not None:
            found |= _against(entry, before)
    return np.array([found[name] for name in SCHEMA], np.float32)


def _against(entry: Entry, before: Entry) -> dict[str, float]:
    use_sums = entry.sums is not None and before.sums is not None
    c, p = (_means(e, use_sums) for e in (entry, before))
    if c.size != p.size or not (both := np.isfinite(c) & np.isfinite(p)).any():
        return {}
    c, p = c[both], p[both]
    dc, dp = c - c.mean(), p - p.mean()
    now, then = (_seen(_means(e, False)) for e in (entry, before))
    if then.sum() > _TINY:
        gain = float(np.sqrt(now.mean() / then.mean()))
    else:
        gain = 1.0 if now.sum() <= _TINY else math.nan
    return {
        "gain": gain, "l2_dist": float(np.linalg.norm(c - p)), "cossim": _cosine(c, p),
        "pearson": _cosine(dc, dp),
        "covariance": float((dc * dp).mean()) if c.size > 1 else math.nan,
    }  # fmt: skip


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    """NaN of two zero vectors, 0 where one of them is zero."""
    norms = float(np.linalg.norm(a)), float(np.linalg.norm(b))
    if not all(norms):
        return 0.0 if any(norms) else math.nan
    return float(np.clip(a @ b / (norms[0] * norms[1]), -1, 1))


def _seen(values: np.ndarray) -> np.ndarray:
    return values[np.isfinite(values)]
