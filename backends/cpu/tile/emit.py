"""The matmul emitter: out[t][r] = sum over k of w[r][k] * x[t][k], plus bias[r], plus add[t][r].

Parallel over groups of 16 weight rows: every thread takes a contiguous range of them, in pairs
(SHARE_UNIT), so that what packs or sums its results can divide them alike. With experts a thread
takes those rows of every tile where tiles have one column, else a range of all tiles' groups.
Inside its range a thread keeps a block of activation tiles that fits its second-level cache and
goes over its weights once for that block, so with few tokens weights stream from memory exactly
once. The innermost body computes `lanes` rows of a few groups by C columns and runs over the whole
of K: no sum is ever cut, so the order of additions for an output depends on the format alone, not
on threads, columns or batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from runtime.backends.cpu.abi import SHARE_UNIT
from runtime.backends.cpu.compile.isa import isa
from runtime.backends.cpu.tile import amx, registers, split, staged
from runtime.backends.cpu.tile.blocks import by_groups
from runtime.backends.cpu.tile.formats import ROWS
from runtime.backends.cpu.tile.problem import Part, Problem, Span, load_problem
from runtime.backends.cpu.tile.spec import TileSpec
from runtime.backends.cpu.tile.store import store_tile
from runtime.backends.cpu.tile.sums_amx import MAX_TILES
from runtime.backends.cpu.tile.sums_f32 import sums_f32
from runtime.backends.cpu.tile.sums_int8 import sums_int8
from runtime.backends.cpu.tile.vector import Code, const
from runtime.ops.errors import OpError

_CACHED_BYTES = 512 * 1024  # of activations that stay in a second-level cache
_CACHED_BYTES_AMX = 1024 * 1024  # processors with AMX have caches of 2 MiB

Segment = Callable[[Problem, Any, Span, Span], None]  # (problem, weights, tiles, groups)

_SUMS = {"int8": sums_int8, "f32": sums_f32}


def emit_matmul(spec: TileSpec, isa_name: str) -> str:
    """LLVM IR text of a module whose function `entry` is the matmul kernel `spec`.

    Arguments of the kernel: `spec.arguments`. Raises BackendError for an unknown `isa_name`,
    OpError for a kernel that needs AMX and another instruction set.
    """
    code = Code(isa(isa_name))
    if spec.needs_amx and isa_name != "amx":
        raise OpError(f"{spec} needs the instruction set amx, not {isa_name}")
    problem = load_problem(code, spec)
    over = (
        (_over_choices if spec.columns == 1 else _over_records) if spec.indirect else _over_tokens
    )
    if spec.needs_amx:
        tiles = split if spec.coding == "split" else amx
        registers.configure(code, tiles.shapes(problem))
        over(problem, tiles.segment_of(problem))
        registers.release(code)
    elif spec.coding == "int8" and spec.columns == staged.COLUMNS:
        over(problem, staged.segment_of(problem, _segment))
    else:
        over(problem, _segment)
    if problem.past_caches is not None:
        code.end_stores_past_caches()
    return code.finish()


def _over_tokens(p: Problem, segment: Segment) -> None:
    """Blocks of token tiles, and for each the groups of this thread."""
    code, groups = p.code, _my_groups(p)
    tiles = code.ceil_div(p.live, p.spec.columns)
    per_block = _tiles_per_block(p)

    def block(i: Any) -> None:
        start = code.times(i, per_block)
        stop = code.smaller(code.at(start, per_block), tiles)
        segment(p, p.w, (start, stop), groups)

    n_blocks = code.b.udiv(code.at(tiles, per_block, -1), per_block)
    code.each(0, n_blocks, block)


def _my_groups(p: Problem) -> Span:
    """The row groups of this thread."""
    return p.code.my_share(p.n_groups, SHARE_UNIT // ROWS)


def _over_choices(p: Problem, segment: Segment) -> None:
    """Tiles of one (token, rank): of all of them the groups of this thread.

    Tiles of one expert that follow each other share one pass over its weights.
    """
    code, groups = p.code, _my_groups(p)
    per_block = _tiles_per_block(p)
    at = code.variable(const(0))

    def piece() -> None:
        tile = at.get()
        expert = p.expert(tile)
        limit = code.smaller(code.b.sub(p.n_tiles, tile), per_block)
        stop = _end_of_run(p, tile, limit, expert)
        segment(p, code.at(p.w, code.times(expert, p.expert_stride)), (tile, stop), groups)
        at.set(stop)

    code.repeat(lambda: code.b.icmp_signed("<", at.get(), p.n_tiles), piece)


def _over_records(p: Problem, segment: Segment) -> None:
    """Tiles with an expert each. Position tile * groups + group; a thread has a range of them.

    Whole tiles of one expert that follow each other share one pass over its weights.
    """
    code, b = p.code, p.code.b
    first, end = code.my_share(code.times(p.n_tiles, p.n_groups))
    per_block = _tiles_per_block(p)
    at = code.variable(first)

    def more() -> Any:
        return b.icmp_signed("<", at.get(), end)

    def piece() -> None:
        position = at.get()
        tile = b.udiv(position, p.n_groups)
        group = b.urem(position, p.n_groups)
        left = b.sub(end, position)
        stop_group = code.smaller(p.n_groups, code.at(group, left))
        whole = b.icmp_signed("==", b.sub(stop_group, group), p.n_groups)
        limit = b.select(whole, b.udiv(left, p.n_groups), const(1))
        expert = p.expert(tile)
        stop = _end_of_run(p, tile, code.smaller(limit, per_block), expert)
        w = code.at(p.w, code.times(expert, p.expert_stride))
        segment(p, w, (tile, stop), (group, stop_group))
        done = b.mul(b.sub(stop, tile), b.sub(stop_group, group))
        at.set(code.at(position, done))

    code.repeat(more, piece)


def _end_of_run(p: Problem, tile: Any, limit: Any, expert: Any) -> Any:
    """The first tile after `tile` that has another expert, at most tile + limit."""
    code, b = p.code, p.code.b
    end = code.at(tile, limit)
    stop = code.variable(code.at(tile, 1))

    def same() -> Any:
        inside = b.icmp_signed("<", stop.get(), end)
        # The record is read only when it exists: the last one stands in otherwise.
        seen = p.expert(b.select(inside, stop.get(), tile))
        return b.and_(inside, b.icmp_signed("==", seen, expert))

    code.repeat(same, lambda: stop.set(code.at(stop.get(), 1)))
    return stop.get()


def _tiles_per_block(p: Problem) -> Any:
    cached = _CACHED_BYTES_AMX if p.spec.needs_amx else _CACHED_BYTES
    fitting = p.code.larger(p.code.b.udiv(const(cached), p.tile_bytes), const(1))
    most = split.MAX_TILES if p.spec.coding == "split" else MAX_TILES
    return p.code.smaller(fitting, const(most))


def _segment(p: Problem, w: Any, tiles: Span, groups: Span) -> None:
    """All of `groups` by all of `tiles`: groups outside."""
    by_groups(p, groups, lambda some: _some_groups(p, w, tiles, some))


def _some_groups(p: Problem, w: Any, tiles: Span, groups: list[Any]) -> None:
    """These groups by all of `tiles`, in parts of as many rows as a register holds."""
    code = p.code
    bases = [code.at(w, code.times(g, p.group_bytes)) for g in groups]

    def parts_from(first: Any) -> list[Part]:
        return [Part(g, base, first) for g, base in zip(groups, bases, strict=True)]

    def one_tile(t: Any) -> None:
        x = p.tile_address(t)

        def compute(parts: list[Part]) -> None:
            store_tile(p, _SUMS[p.spec.coding](p, parts, x), parts, t)

        n_parts = ROWS // code.lanes
        if n_parts == 1 or p.spec.columns == 1:
            # With one column weights come from memory: all rows of a line together.
            compute([m for i in range(n_parts) for m in parts_from(i * code.lanes)])
        else:
            code.each(0, n_parts, lambda i: compute(parts_from(code.times(i, code.lanes))))

    code.each(*tiles, one_tile)
