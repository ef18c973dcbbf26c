"""Sums over K of one tile with float32 activations: acc = fma(weight, x, acc), k by k.

Quantised weights are dequantised on the way: fma(code, scale, minimum - offset * scale), which
rounds once at most, as the offset is a power of two.
"""

from __future__ import annotations

from typing import Any

from runtime.backends.cpu.tile.problem import Problem


def sums_f32(p: Problem, bases: list[Any], x: Any, first: Any) -> list[list[Any]]:
    raise NotImplementedError
