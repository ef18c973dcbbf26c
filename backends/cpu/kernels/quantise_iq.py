"""Rows of float32 to the IQ types. Parallel over groups of 16 blocks (see quantise_scales.py)."""

from __future__ import annotations

from typing import Any

from runtime.ops.blocks import BLOCK_FORMATS

from . import emit as e
from . import lanes as l
from . import simd as s
from .quantise_books import book_quantiser
from .quantise_scales import ERROR, SCALE, Search, group, groups_of, scale_quantiser
from .rows import helper


def _level_quantiser(name: str, search: Search) -> Any:
    """The kernel of a type with a level for each code."""
    row = BLOCK_FORMATS[name]
    levels = row.levels
    groups = groups_of(row)
    each = row.block // groups

    def nearest(b, y, values):
        found = values[0]
        for low, high, value in zip(levels, levels[1:], values[1:], strict=False):
            more = b.fcmp_ordered(">", y, e.floats((low + high) / 2))
            found = b.select(more, value, found)
        return found

    level = s.operation(s.f32x16, s.f32x16)(lambda b, y: nearest(b, y, [*map(e.floats, levels)]))
    code = s.operation(s.i32x16, s.f32x16)(lambda b, y: nearest(b, y, [*map(e.ints, range(16))]))

    @helper
    def prepare(values, weights, scratch):
        pass

    @helper
    def evaluate(values, weights, scratch, state, codes, extra, keep):
        for g in range(groups):
            t = s.load(group(state, g) + SCALE)
            inverse, error = l.inverse(t), s.splat(s.f32(0))
            for i in range(each * g, each * g + each):
                x = s.load(values + 64 * i)
                left = x - t * level(x * inverse)
                error = s.fma(s.load(weights + 64 * i) * left, left, error)
                if keep:
                    l.store_ints(codes + 64 * i, code(x * inverse))
            s.store(group(state, g) + ERROR, error)

    return scale_quantiser(row, search, max(levels), 64, prepare, evaluate)


_SIGNED = Search(1.5, 0.9, 14, 0.95, 0.04, 12, 0.02, 3)
_SHIFTED = Search(0.95, 0.9, 14, 0.95, 0.06, 12, 0.02, 3)


def build_quantise_iq4_nl():
    """Blocks of 32 with 16 levels and a scale."""
    return _level_quantiser("iq4_nl", Search(1.3, 0.96, 18, 1.0, 0.0, 1, 0.02, 4))


def build_quantise_iq4_xs():
    """The same levels, 8 scales of 6 bits in a block of 256."""
    return _level_quantiser("iq4_xs", Search(1.3, 0.96, 18, 0.95, 0.03, 12, 0.01, 3))


def build_quantise_iq3_xxs():
    """256 entries of 4, seven signs of eight, a scale of 4 bits for 32."""
    return book_quantiser("iq3_xxs", Search(1.5, 0.87, 10, 0.95, 0.06, 8, 0.02, 3))


def build_quantise_iq3_s():
    """512 entries of 4, all signs, a scale of 4 bits for 32."""
    return book_quantiser("iq3_s", _SIGNED)


def build_quantise_iq2_xxs():
    """256 entries of 8, seven signs of eight, a scale of 4 bits for 32."""
    return book_quantiser("iq2_xxs", _SIGNED)


def build_quantise_iq2_xs():
    """512 entries of 8, seven signs of eight, a scale of 4 bits for 16."""
    return book_quantiser("iq2_xs", _SIGNED)


def build_quantise_iq2_s():
    """1024 entries of 8, all signs, a scale of 4 bits for 16."""
    return book_quantiser("iq2_s", _SIGNED)


def build_quantise_iq1_s():
    """2048 entries of 8, levels of 32 shifted up or down, a scale of 3 bits for 32."""
    return book_quantiser("iq1_s", _SHIFTED)


def build_quantise_iq1_m():
    """2048 entries of 8, levels of 8 shifted up or down, a scale of 3 bits for 16."""
    return book_quantiser("iq1_m", _SHIFTED)
