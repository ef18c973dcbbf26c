"""Rows that quantisers are measured on, and how: `python tests/quantise_cases.py` prints ours.

`data/quantise_errors.json` has what the quantisers of llama.cpp b11434 leave of the same rows.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from runtime.ops.dtypes import DTYPES
from runtime.ops.quants import dequantize

PEER = Path(__file__).parent / "data" / "quantise_errors.json"


def measured_rows() -> tuple[np.ndarray, np.ndarray]:
    """Rows as of a model, the half of them with longer tails; an uneven importance."""
    rng = np.random.default_rng(7)
    x = rng.standard_normal((64, 512)) * 0.05
    x[32:] = rng.standard_t(5, (32, 512)) * 0.02
    return x.astype(np.float32), np.exp(rng.standard_normal(512)).astype(np.float32)


def errors(x: np.ndarray, raw: np.ndarray, kind: str, importance: np.ndarray) -> list[float]:
    """Root mean square of what is left, and that weighted by importance."""
    off = (dequantize(raw, DTYPES[kind], x.shape).astype(np.float64) - x) ** 2
    return [float(np.sqrt((off * w).mean())) for w in (1, importance.astype(np.float64))]


def peer_errors() -> dict[str, dict[str, list[float]]]:
    """kind -> "plain" or "importance" -> `errors`."""
    return json.loads(PEER.read_text("utf-8"))


if __name__ == "__main__":
    from runtime.backends.cpu.quantising import Quantiser

    x, importance = measured_rows()
    with Quantiser() as quantiser:
        for kind, peer in peer_errors().items():
            for name, weights in (("plain", None), ("importance", importance)):
                found = errors(x, quantiser(x, kind, weights), kind, importance)
                ratios = [a / b for a, b in zip(found, peer[name], strict=True)]
                print(f"{kind:6} {name:10} {ratios[0]:.4f} {ratios[1]:.4f}")
