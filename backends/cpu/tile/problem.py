"""The arguments of a matmul kernel as LLVM values, with what follows from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from runtime.backends.cpu.tile.formats import ROWS, Format, format_of
from runtime.backends.cpu.tile.spec import PIECES, Q_BYTES, SIDE_BYTES, TILE_ALIGN, TileSpec
from runtime.backends.cpu.tile.vector import I32, I64, Code, const

Span = tuple[Any, Any]  # [first, end), int64 values

_WIDE = 8  # columns of tiles for prompts
_LARGE_OUTPUT = 1 << 20  # bytes


@dataclass(frozen=True)
class Part:
    """`lanes` rows of a row group that are computed together."""

    group: Any  # number of the group
    base: Any  # address of the packed group
    first: Any  # the first of the rows in the group: a Python int, or an int64 value


# Groups whose sums advance together, by columns: enough independent sums to hide the latency of
# a float addition, and few enough to stay in registers.
_GROUPS_FLOAT = {1: 4, 4: 4, 8: 2}
# With one column the groups are streams of memory: eight are read a third faster than one
# (measured). Narrow registers leave no room for so many.
_LARGEST = 128  # elements of a chunk whose code, for several groups, stays in its cache
_GROUPS_SPLIT = {1: 1, 4: 4, 8: 4, 16: 4}  # four registers hold sums
_GROUPS_INT8 = {1: 8, 4: 2, 8: 2, 16: 1}
_GROUPS_CODES = {1: 4, 4: 2, 8: 1}


@dataclass(frozen=True)
class Problem:
    """One kernel: its specification, its arguments (int64 values) and sizes derived from them."""

    code: Code
    spec: TileSpec
    layout: Format
    values: dict[str, Any]
    live: Any  # tokens of this step (direct), None for experts
    n_tiles: Any  # tiles of this step (experts), None for direct
    n_groups: Any
    group_bytes: Any
    tile_bytes: Any
    past_caches: Any = None  # whether the output goes to memory at once; None where it never does

    def __getattr__(self, name: str) -> Any:
        try:
            return self.values[name]
        except KeyError:
            raise AttributeError(name) from None

    @property
    def groups_at_once(self) -> int:
        """Row groups that one pass over K computes together."""
        if self.spec.coding == "split":
            return _GROUPS_SPLIT[self.spec.columns]
        if self.spec.coding == "int8":
            if self.spec.columns == 1 and (self.code.lanes < ROWS or self.layout.chunk > _LARGEST):
                return 1
            if (
                self.spec.columns == _WIDE
                and self.code.isa.has_sdot
                and not self.code.isa.has_smmla
            ):
                return 1  # 16 dots of 4 rows leave 32 registers no room: a third more instructions
            return _GROUPS_INT8[self.spec.columns]
        return (_GROUPS_FLOAT if self.layout.is_float else _GROUPS_CODES)[self.spec.columns]

    @property
    def any_byte(self) -> bool:
        """Whether the dot product takes codes of any unsigned byte without saturating."""
        return self.spec.coding == "int8" and self.code.isa.has_vnni

    @property
    def ahead(self) -> int:
        """Bytes between what is multiplied and what is asked from memory, in each stream."""
        if self.groups_at_once < 4:
            return 4096
        return 2048 if self.groups_at_once == 8 else 1024

    def record(self, tile: Any, entry: Any) -> Any:
        """Entry 0 (expert) or 1 + column (output row) of a tile's record, as int64."""
        place = self.code.times(tile, 1 + self.spec.columns)
        address = self.code.at(self.tiles, self.code.times(self.code.at(place, entry), 4))
        return self.code.b.sext(self.code.load(address, I32), I64)

    def expert(self, tile: Any) -> Any:
        """The expert of a tile, as int64."""
        return self.record(tile, 0)

    def tile_address(self, tile: Any) -> Any:
        """Where the packed activations of a tile lie.

        Tiles with an expert have activations of their own; those of one column find them by their
        output row, so that the experts of a token can read the same.
        """
        if self.spec.indirect and self.spec.columns == 1:
            tile = self.code.b.udiv(self.record(tile, const(1)), self.every)
        return self.code.at(self.x, self.code.times(tile, self.tile_bytes))


def load_problem(code: Code, spec: TileSpec) -> Problem:
    """Read the argument table and the live counts."""
    values = code.arguments(spec.arguments)
    layout = format_of(spec.format)
    live = None if spec.indirect else code.load(values["live"], I64)
    count = values.pop("n_tiles", None)
    n_tiles = code.load(count, I64) if spec.indirect else None
    n_groups = code.ceil_div(values["n_rows"], ROWS)
    group_bytes = _group_bytes(code, layout, values["n_inner"])
    tile_bytes = _tile_bytes(code, spec, values["n_inner"])
    past_caches = None
    if code.isa.has_vnni and spec.columns >= _WIDE and not spec.indirect:
        past_caches = _goes_past_caches(code, values, live)
    return Problem(
        code, spec, layout, values, live, n_tiles, n_groups, group_bytes, tile_bytes, past_caches
    )


def _goes_past_caches(code: Code, values: dict[str, Any], live: Any) -> Any:
    """A large output of whole, aligned lines: no cache would hold it until it is read.

    Reading every line before it is written costs AMX tiles a fifth of their speed (measured).
    """
    size = code.times(code.times(live, values["n_rows"]), 4)
    rest = code.b.or_(values["out"], code.times(values["out_stride"], 4))
    aligned = code.b.icmp_signed("==", code.b.and_(rest, const(TILE_ALIGN - 1)), const(0))
    return code.b.and_(code.b.icmp_signed(">=", size, const(_LARGE_OUTPUT)), aligned)


def _group_bytes(code: Code, layout: Format, n_inner: Any) -> Any:
    if layout.name == "BF16":
        return code.times(code.ceil_div(n_inner, 2), 2 * layout.packed_bytes)
    blocks = code.ceil_div(n_inner, layout.block)
    return code.times(blocks, layout.packed_bytes)


def _tile_bytes(code: Code, spec: TileSpec, n_inner: Any) -> Any:
    """As `activation_tile_nbytes`."""
    if spec.coding == "int8":
        each = code.times(code.ceil_div(n_inner, 32), Q_BYTES + SIDE_BYTES)
    else:
        each = code.times(n_inner, 2 * PIECES if spec.coding == "split" else 4)
    return code.times(code.ceil_div(code.times(each, spec.columns), TILE_ALIGN), TILE_ALIGN)
