"""Unpack steps: from the packed planes of a chunk to unsigned codes and float scales.

Each step gives the blocks of 32 elements of one chunk: eight words of codes (functions, so that
the emitter decides where the unpacking happens), the scales and the minimum of `lanes` rows.
"""

from __future__ import annotations

from typing import Any

from runtime.backends.cpu.tile import unpack_books, unpack_large, unpack_small
from runtime.backends.cpu.tile.codes import Block, Rows
from runtime.backends.cpu.tile.formats import ROWS, Half, format_of

_STEPS = {**unpack_small.STEPS, **unpack_large.STEPS, **unpack_books.STEPS}


def unpack(name: str, rows: Rows, head: list[Any], chunk: Any, number: Any) -> list[Block]:
    """The blocks of chunk `number` at address `chunk`; head: what `header(name, rows)` gave."""
    return _STEPS[name](rows, head, chunk, number)


def header(name: str, rows: Rows) -> list[Any]:
    """Values that all chunks of a block share: its float scales, for blocks of 256."""
    halves = [plane for plane in format_of(name).head if isinstance(plane, Half)]
    return [rows.f16(rows.base, 2 * ROWS * i) for i in range(len(halves))]
