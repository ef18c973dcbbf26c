"""Sums over K of one tile with float32 activations: acc = fma(weight, x, acc), k by k.

Quantised weights are dequantised on the way: fma(code, scale, minimum - offset * scale), which
rounds once at most, as the offset is a power of two. Float weights are widened, which is exact.
"""

from __future__ import annotations

from typing import Any

from runtime.backends.cpu.tile.blocks import Sums, by_part, over_blocks, prefetch, zeros
from runtime.backends.cpu.tile.codes import Block, offset_of
from runtime.backends.cpu.tile.problem import Part, Problem
from runtime.backends.cpu.tile.vector import F32, I16, I32, Code, const, vec

_UNROLL = 4  # elements of a row per turn of the loop over float weights; even, for pairs of bf16
_HIGH_HALF = 0xFFFF0000


def sums_f32(p: Problem, parts: list[Part], x: Any) -> Sums:
    """Float sums [part][column] of the packed activation tile at `x`."""
    if p.layout.is_float:
        return _over_values(p, parts, x)

    def body(blocks: list[Block], number: Any, sums: list[Any]) -> list[Any]:
        start = p.code.at(x, p.code.times(number, 32 * 4 * p.spec.columns))
        for w in range(8):
            words = [_dequantised(p, b, w) for b in blocks]
            for k in range(4):
                sums = _one_element(p, [word[k] for word in words], start, 4 * w + k, sums)
        return sums

    return by_part(p, over_blocks(p, parts, body, zeros(p, parts)))


def _one_element(p: Problem, weights: list[Any], x: Any, k: int, sums: list[Any]) -> list[Any]:
    """Add element k from `x` on of all columns to the flat sums."""
    p.code.keep_order()
    columns = p.spec.columns
    result = list(sums)
    for c in range(columns):
        value = p.code.load_splat(p.code.at(x, 4 * (k * columns + c)), F32)
        for g, weight in enumerate(weights):
            result[g * columns + c] = p.code.fma(weight, value, result[g * columns + c])
    return result


def _dequantised(p: Problem, block: Block, w: int) -> list[Any]:
    """The four weights per row of word w, as float vectors."""
    code, n = p.code, p.code.lanes
    scale = block.scales[w * len(block.scales) // 8]
    shift = block.minimum
    if block.halves:
        shift = code.b.fmul(shift, code.b.sitofp(block.halves[w // 4], scale.type))
    elif shift is None:
        shift = code.b.fmul(scale, code.fill(F32, -float(p.layout.offset)))
    lanes = code.b.bitcast(block.words[w](), vec(I32, n))
    result = []
    for k in range(4):
        byte = code.b.and_(code.b.lshr(lanes, code.fill(I32, 8 * k)), code.fill(I32, 255))
        result.append(code.fma(code.b.sitofp(byte, vec(F32, n)), scale, shift))
    return result


def _over_values(p: Problem, parts: list[Part], x: Any) -> Sums:
    """Float formats: any K, a few elements at a time and the rest one by one."""
    code = p.code
    whole = code.b.and_(p.n_inner, const(-_UNROLL))

    def several(k: Any, sums: list[Any]) -> list[Any]:
        starts = [code.at(m.base, _value_offset(p, k)) for m in parts]
        for m, start in zip(parts, starts, strict=True):
            prefetch(p, start, _UNROLL * p.layout.packed_bytes, m.first)
        place = code.at(x, code.times(k, 4 * p.spec.columns))
        for i in range(_UNROLL):
            weights = [_value(p, s, i, m.first) for m, s in zip(parts, starts, strict=True)]
            sums = _one_element(p, weights, place, i, sums)
        return sums

    def single(k: Any, sums: list[Any]) -> list[Any]:
        starts = [code.at(m.base, _value_offset(p, k)) for m in parts]
        weights = [_last_value(p, s, k, m.first) for m, s in zip(parts, starts, strict=True)]
        return _one_element(p, weights, code.at(x, code.times(k, 4 * p.spec.columns)), 0, sums)

    sums = code.loop(0, whole, zeros(p, parts), several, step=_UNROLL)
    return by_part(p, code.loop(whole, p.n_inner, sums, single))


def _value_offset(p: Problem, k: Any) -> Any:
    """Byte offset of element k of 16 rows; for BF16 of the pair it is in."""
    if p.layout.name == "BF16":
        return p.code.times(p.code.b.lshr(k, const(1)), 2 * p.layout.packed_bytes)
    return p.code.times(k, p.layout.packed_bytes)


def _value(p: Problem, start: Any, i: int, first: Any) -> Any:
    """Element i after `start` of `lanes` rows."""
    code, name, step = p.code, p.layout.name, p.layout.packed_bytes
    if name == "F32":
        return code.load(code.at(start, i * step, offset_of(code, first, 4)), vec(F32, code.lanes))
    if name == "F16":
        place = code.at(start, i * step, offset_of(code, first, 2))
        return code.half_to_float(code.load(place, vec(I16, code.lanes)))
    return _half_of_pair(code, code.at(start, i // 2 * 2 * step), i % 2, first)


def _last_value(p: Problem, start: Any, k: Any, first: Any) -> Any:
    """As `_value`, where the element's place in its pair is known at run time only."""
    if p.layout.name != "BF16":
        return _value(p, start, 0, first)
    code = p.code
    odd = code.b.icmp_signed("==", code.b.and_(k, const(1)), const(1))
    low, high = (_half_of_pair(code, start, i, first) for i in (0, 1))
    return code.b.select(odd, high, low)


def _half_of_pair(code: Code, place: Any, which: int, first: Any) -> Any:
    """A bfloat16 is the high half of a float32; neighbours share a 32-bit lane."""
    pair = code.load(code.at(place, offset_of(code, first, 4)), vec(I32, code.lanes))
    mask = code.fill(I32, _HIGH_HALF)
    bits = code.b.and_(pair, mask) if which else code.b.shl(pair, code.fill(I32, 16))
    return code.b.bitcast(bits, vec(F32, code.lanes))
