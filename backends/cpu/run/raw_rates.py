"""What a processor's units give alone: loops of one instruction, for figures to stand beside.

Measured in the run whose figures they judge: rates of rented machines change within minutes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from runtime.backends.cpu.compile import objects
from runtime.backends.cpu.compile.isa import isa, selected
from runtime.backends.cpu.run.bandwidth import timed
from runtime.backends.cpu.tile import registers
from runtime.backends.cpu.tile.dots import dot_step
from runtime.backends.cpu.tile.formats import format_of
from runtime.backends.cpu.tile.sums_amx import DOT, W, X
from runtime.backends.cpu.tile.vector import F32, I8, I32, I64, Code, const, vec

_PASSES = 60  # in many of them one thread starts after the other has ended
TURNS = 20_000  # of a loop: a few milliseconds at most
_QUICK = 20  # times as many of instructions that take half a clock, not sixteen
_CHAINS = 12  # of sums that do not wait for each other
_TILE = 16  # rows, and columns, of a matrix register


def raw_rates(isa_name: str, seconds: Callable[[Any], float]) -> dict[str, float]:
    """Multiply-adds per second and thread of each unit of an instruction set, by name.

    seconds(kernel): of one call of a kernel (args, thread, n_threads) on all threads at once.
    """
    rates = {}
    for name, (emit, each) in _units(isa_name).items():
        kernel = objects.function(objects.load_object(objects.compile_ir(emit(isa_name), isa_name)))
        rates[name] = TURNS * _CHAINS * each / seconds(kernel)
    return rates


def unit_rates(threads: int) -> dict[str, float]:
    """Multiply-adds per second of all threads together, by unit; the best of a few passes."""
    place = np.zeros(8, np.int64)

    def best(kernel: Any) -> float:
        return min(timed(kernel, place.ctypes.data, threads) for _ in range(_PASSES))

    return {name: threads * rate for name, rate in raw_rates(selected(), best).items()}


def _units(isa_name: str) -> dict[str, tuple[Callable[[str], str], int]]:
    """By name: the loop's emitter, and the multiply-adds of one of its instructions."""
    lanes = isa(isa_name).lanes
    units: dict[str, tuple[Callable[[str], str], int]] = {}
    if isa_name == "amx":
        for name, instruction, k in (("int8 tiles", "tdpbssd", 64), ("bf16", "tdpbf16ps", 32)):
            units[name] = _tiles_of(instruction), _TILE * _TILE * k
    units["int8 vectors"] = _dots, 4 * lanes * _QUICK
    units["f32"] = _fma, lanes * _QUICK
    return units


def _tiles_of(instruction: str) -> Callable[[str], str]:
    def emit(isa_name: str) -> str:
        code = Code(isa(isa_name))
        registers.configure(code, {(*DOT, *X, *W): (_TILE, 4 * _TILE)})
        ones = code.stack(4 * _TILE * _TILE)
        code.each(0, 4 * _TILE * _TILE, lambda i: code.store(const(1), code.at(ones, i)), 8)
        for tile in (X[0], W[0]):
            registers.load(code, tile, ones, 4 * _TILE)

        def turn(_: Any) -> None:
            for i in range(_CHAINS):
                registers.multiply(code, instruction, DOT[i % len(DOT)], X[0], W[0])

        code.each(0, TURNS, turn)
        registers.release(code)
        return code.finish()

    return emit


def _dots(isa_name: str) -> str:
    """Dot products of bytes with a word in every lane, as tiles of eight bits use them."""
    code = Code(isa(isa_name))
    step = dot_step(code, format_of("Q4_0"))
    bytes_of = vec(I8, 4 * code.lanes)

    def turn(four: Any, sums: list[Any]) -> list[Any]:
        weights = step.weights(code.b.bitcast(four, bytes_of))
        return [step.end(step.add((total, None) if _pairs(step) else total, weights, four, 0))
                for total in sums]  # fmt: skip

    return _loop(code, turn, I32)


def _pairs(step: Any) -> bool:
    """Whether sums of this instruction set are (sum, sum of pairs that waits)."""
    return isinstance(step.begin(None, 0), tuple)


def _fma(isa_name: str) -> str:
    code = Code(isa(isa_name))

    def turn(value: Any, sums: list[Any]) -> list[Any]:
        value = code.b.sitofp(value, vec(F32, code.lanes))
        return [code.fma(value, value, total) for total in sums]

    return _loop(code, turn, F32)


def _loop(code: Code, turn: Callable[[Any, list[Any]], list[Any]], kind: Any) -> str:
    """Turns of sums in registers, which are written, as what nobody needs is not computed."""
    small = code.splat(code.b.trunc(code.b.and_(code.args, const(3)), I32))
    start = [code.fill(kind, i) for i in range(_CHAINS)]
    sums = code.loop(0, TURNS * _QUICK, start, lambda _, sums: turn(small, sums))
    place = code.stack(4 * code.lanes * _CHAINS)
    for i, total in enumerate(sums):
        code.store(total, code.at(place, 4 * code.lanes * i), 4)
    code.store(code.load(place, I64), code.args)
    return code.finish()
