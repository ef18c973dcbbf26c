"""Walks: over row groups, a few at a time, and over the blocks of K of one pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from runtime.backends.cpu.tile.codes import Block, Rows, Word
from runtime.backends.cpu.tile.formats import LINE
from runtime.backends.cpu.tile.problem import Part, Problem, Span
from runtime.backends.cpu.tile.unpack import header, unpack
from runtime.backends.cpu.tile.vector import F32, const

# body(the block of 32 of each part, its number in K, sums) -> sums
Body = Callable[[list[Block], Any, list[Any]], list[Any]]
Sums = list[list[Any]]  # [part][column], each a vector of rows


def by_groups(p: Problem, groups: Span, body: Callable[[list[Any]], None]) -> None:
    """body(numbers of some groups): several at a time as far as they go, then singly.

    The several lie a stretch apart and each walks through its own stretch, so that what is
    fetched ahead of one is what it reads next.
    """
    code, (first, end) = p.code, groups
    stretch = code.b.sdiv(code.b.sub(end, first), const(p.groups_at_once))

    def some(g: Any, apart: Any, n: int) -> list[Any]:
        body([code.at(g, code.times(apart, i)) for i in range(n)])
        return []

    after = code.at(first, stretch)
    code.loop(first, after, [], lambda g, _: some(g, stretch, p.groups_at_once))
    if p.groups_at_once > 1:
        rest = code.at(first, code.times(stretch, p.groups_at_once))
        code.loop(rest, end, [], lambda g, _: some(g, const(0), 1))


def over_blocks(p: Problem, parts: list[Part], body: Body, start: list[Any]) -> list[Any]:
    """Run `body` over all blocks of 32 in order; sums start as `start`, the last are given."""
    code, layout = p.code, p.layout

    def block(i: Any, sums: list[Any]) -> list[Any]:
        offset = code.times(i, layout.packed_bytes)
        rows = [Rows(code, code.at(m.base, offset), m.first, p.any_byte) for m in parts]
        return _chunks(p, rows, code.times(i, layout.block // 32), body, sums)

    n_blocks = code.b.udiv(p.n_inner, const(layout.block))
    return code.loop(0, n_blocks, start, block)


def zeros(p: Problem, parts: list[Part]) -> list[Any]:
    """The first sums, flat: part by part, columns inside."""
    return [p.code.fill(F32, 0.0) for _ in range(len(parts) * p.spec.columns)]


def by_part(p: Problem, flat: list[Any]) -> Sums:
    """Flat sums as [part][column]."""
    columns = p.spec.columns
    return [flat[i : i + columns] for i in range(0, len(flat), columns)]


def prefetch(p: Problem, base: Any, n_bytes: int, first: Any = 0) -> None:
    """Ask for what follows `n_bytes` at `base` by the prefetch distance, for all rows at once."""
    if isinstance(first, int) and first:
        return
    for line in range(0, n_bytes, LINE):
        p.code.prefetch(p.code.at(base, p.ahead + line))


def _asking(p: Problem, rows: Rows, j: Any, blocks: list[Block]) -> list[Block]:
    """The blocks of chunk j, whose words ask for memory ahead of them as they are unpacked.

    Evenly: asked for at once, a chunk's lines would fill the processor's list of open requests and
    then leave it empty (a tenth slower, measured).
    """
    if isinstance(rows.first, int) and rows.first:
        return blocks
    code, size = p.code, p.layout.packed_bytes // p.layout.chunks
    start = code.at(rows.base, code.times(j, size), p.ahead)
    lines, each = range(0, size, LINE), len(blocks[0].words)

    def asking(word: Word, number: int) -> Word:
        first, end = (n * len(lines) // (each * len(blocks)) for n in (number, number + 1))

        def emit() -> Any:
            for line in lines[first:end]:
                code.prefetch(code.at(start, line))
            return word()

        return emit

    return [
        replace(b, words=[asking(word, each * k + w) for w, word in enumerate(b.words)])
        for k, b in enumerate(blocks)
    ]


def _chunks(p: Problem, rows: list[Rows], before: Any, body: Body, sums: list[Any]) -> list[Any]:
    """All chunks of one block, in a loop of its own when there are several."""
    code, layout = p.code, p.layout
    heads = [header(layout.name, r) for r in rows]
    per_chunk = layout.chunk // 32

    def chunk(j: Any, sums: list[Any]) -> list[Any]:
        offset = code.at(code.times(j, layout.chunk_bytes), layout.header)
        places = [code.at(r.base, offset) for r in rows]
        parts = zip(rows, heads, places, strict=True)
        blocks = [_asking(p, r, j, unpack(layout.name, r, head, at, j)) for r, head, at in parts]
        for k in range(per_chunk):
            number = code.at(before, code.times(j, per_chunk), k)
            sums = body([b[k] for b in blocks], number, sums)
        return sums

    if layout.chunks == 1:
        return chunk(const(0), sums)
    return code.loop(0, layout.chunks, sums, chunk)
