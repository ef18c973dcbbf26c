"""Cache types in a page: where their numbers lie, how 32 dims are stored and read.

A page holds 32 tokens; in it each KV head has one block, the planes of its `KVFormat` one behind
the other. With d the head size rounded up to a multiple of 16, a plane of K is transposed, [d over
its dims][32 tokens], so that attention reads 16 keys at once. A plane of V is [32 tokens][d over
its dims]; but what groups share is as in K, for 16 keys at once.

Of codes four bytes that a product sums lie side by side: of K those of a token, [d / 4 over dims]
[32 tokens][4], of V those of four tokens, [8][d over dims][4 tokens]. Dims that a head does not
have are zeros.

A further type is a row of ops/kv_formats.py; one whose codes have other bits needs `key_words` and
`value_words` to read them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from llvmlite import ir

from runtime.backends.cpu import llvm
from runtime.backends.cpu.tile.lookup import lookup
from runtime.ops.errors import BackendError
from runtime.ops.kv_formats import GROUP, PAGE, KVFormat, Plane, padded_head

from . import emit as e
from . import simd as s
from .emit import number, times
from .kv_dots import joined, native
from .kv_rounding import rounding
from .rows import helper

Value = Any
WORD = 4  # bytes of codes that lie side by side
padded = helper(padded_head)


@helper
def room(dim):
    """Dims that q and o have room for: whole groups."""
    return (dim + 31) // 32 * 32


def _same(b: ir.IRBuilder, value: Value) -> Value:
    return value


# dtype -> 16 lanes of float32 as they are stored, and back
_CONVERT: dict[str, tuple[Callable, Callable]] = {
    "f32": (_same, _same),
    "f16": (
        lambda b, x: e.float_to_half(b, x, s.HALVES),
        lambda b, x: e.half_to_float(b, x, s.HALVES),
    ),
    "bf16": (e.float_to_brain, e.brain_to_float),
}
_ELEMENT = {"f32": e.f32, "f16": e.i16, "bf16": e.i16}
_CODES = ("codes",), ("nibbles",), ("nibbles", "fifth"), ("nibbles", "top")


def check(format: KVFormat) -> None:
    """BackendError for planes that kernels do not read."""
    names = tuple(plane.name for plane in format.codes)
    if names not in _CODES if format.coding else format.codes[0].dtype.name not in _CONVERT:
        raise BackendError(
            f"KV type {format.name!r} keeps its values in planes {', '.join(names)}, which kernels "
            "do not read: add them to backends/cpu/kernels/kv_planes.py"
        )


# ---- places -----------------------------------------------------------------------------


def _start(b: ir.IRBuilder, format: KVFormat, plane: Plane, block: Value, dims: Value) -> Value:
    """Where a plane of a block begins; dims: of the padded head."""
    for before in format.planes[: format.planes.index(plane)]:
        size = PAGE * before.dtype.nbytes
        block = b.add(block, times(b, _width(b, before, dims), size))
    return block


def _width(b: ir.IRBuilder, plane: Plane, dims: Value) -> Value:
    if plane.dims == 1:
        return dims
    groups = b.lshr(b.add(dims, number(GROUP - 1)), number(GROUP.bit_length() - 1))
    return times(b, groups, GROUP // plane.dims)


def step_of_dim(plane: Plane) -> int:
    """Bytes from one dim to the next in planes with tokens inside, dims in whole numbers."""
    return PAGE * plane.dtype.nbytes // plane.dims


def place_of_dim(
    b: ir.IRBuilder, format: KVFormat, plane: Plane, block: Value, dim: Value, dims: Value
) -> Value:
    """What the 32 tokens have from a dim on: in a plane of K, or of what groups of V share."""
    return b.add(_start(b, format, plane, block, dims), times(b, dim, step_of_dim(plane)))


def place_of_token(
    b: ir.IRBuilder, format: KVFormat, block: Value, key: Value, dim: Value, dims: Value
) -> Value:
    """Where values (not codes) of V have a token's from a dim on."""
    plane = format.codes[0]
    at = times(b, b.add(b.mul(key, dims), dim), plane.dtype.nbytes)
    return b.add(_start(b, format, plane, block, dims), at)


def place_of_four(
    b: ir.IRBuilder, format: KVFormat, plane: Plane, block: Value, dim: Value, dims: Value
) -> tuple[Value, Value]:
    """Where codes of V have the first four tokens' from a dim on; bytes to the next four's."""
    at = times(b, dim if plane.dims == 1 else b.udiv(dim, number(plane.dims)), WORD)
    start = b.add(_start(b, format, plane, block, dims), at)
    return start, times(b, _width(b, plane, dims), WORD)


# ---- loads ------------------------------------------------------------------------------


def load16(b: ir.IRBuilder, plane: Plane, address: Value) -> Value:
    """16 floats that lie side by side, as float32."""
    value = e.load(b, address, e.wide(_ELEMENT[plane.dtype.name]), 1)
    return _CONVERT[plane.dtype.name][1](b, value)


def _word(b: ir.IRBuilder, address: Value) -> Value:
    return e.load(b, address, e.wide(e.i32), 4)


def _moved(b: ir.IRBuilder, value: Value, up: int) -> Value:
    """Bits moved up, or down where that is negative."""
    if up == 0:
        return value
    return b.shl(value, e.ints(up)) if up > 0 else b.lshr(value, e.ints(-up))


def _bits(b: ir.IRBuilder, value: Value, plane: Plane, turn: int) -> Value:
    """The bits of a plane's codes that stand `turn`-th in its bytes, where they are in a code."""
    mask = ((1 << plane.bits) - 1 << plane.low) * 0x01010101
    return b.and_(_moved(b, value, plane.low - plane.bits * turn), e.ints(mask))


def key_words(
    b: ir.IRBuilder, format: KVFormat, places: list[Value], is_whole: Value
) -> Iterator[Value]:
    """The codes of 16 keys for a group: the w-th has in each lane four bytes, dims 4 w to 4 w + 3.

    places: where each plane of the codes has the group, for the first of the keys. Where a group
    has half the dims only, by `is_whole`, the words behind them are any. Of a book codes are its
    entries, 128 higher.
    """
    loaded: dict[tuple[int, int], Value] = {}
    further = b.select(is_whole, number(GROUP // 2 * PAGE), number(0))
    for w in range(GROUP // WORD):
        value = None
        for i, plane in enumerate(format.codes):
            turns = 8 // plane.bits
            inner = GROUP // 4 // turns // plane.outer  # words of one turn
            outer, rest = divmod(w, inner * turns)
            turn, at = divmod(rest, inner)
            at += outer * inner
            if (i, at) not in loaded:
                place = places[i]
                if plane.bits == 8 and w >= 4:  # nothing behind half a group is read
                    place = e.offset(b, b.add(place, further), (at - 4) * PAGE * WORD)
                else:
                    place = e.offset(b, place, at * PAGE * WORD)
                loaded[i, at] = _word(b, place)
            bits = loaded[i, at] if turns == 1 else _bits(b, loaded[i, at], plane, turn)
            value = bits if value is None else b.or_(value, bits)
        yield _entries(b, format, value)


def _entries(b: ir.IRBuilder, format: KVFormat, value: Value) -> Value:
    """The entries of the type's book for four indices a lane, 128 higher."""
    coding = format.coding
    if coding is None or not coding.book:
        return value
    code, table = native(b), [entry + 128 for entry in coding.book]
    n = 64 // (e.LANES // code.lanes)
    whole = b.bitcast(value, llvm.vec(e.i8, 64))
    parts = [
        lookup(code, llvm.shuffle(b, whole, whole, range(i, i + n)), table) for i in range(0, 64, n)
    ]
    return b.bitcast(joined(b, parts), value.type)


def value_words(
    b: ir.IRBuilder, format: KVFormat, places: list[tuple[Value, Value]], half: int,
    is_whole: Value,
) -> Iterator[Value]:  # fmt: skip
    """The codes of 16 dims of V, half of a group: the w-th has in each lane tokens 4 w to 4 w + 3.

    places: of each plane of the codes, as `place_of_four` gives them. Where a group has half the
    dims only, by `is_whole`, its second half is any. Of a book codes are its entries, 128 higher.
    """
    further = b.select(is_whole, number(WORD * e.LANES * half), number(0))
    for w in range(PAGE // WORD):
        value = None
        for plane, (first, step) in zip(format.codes, places, strict=True):
            at = b.add(first, times(b, step, w)) if w else first
            if plane.bits == 8:
                part = _word(b, b.add(at, further))
            elif plane.bits == 4:
                part = _bits(b, _word(b, at), plane, half)
            else:
                part = _spread(b, plane, at, half)
            value = part if value is None else b.or_(value, part)
        yield _entries(b, format, value)


def _spread(b: ir.IRBuilder, plane: Plane, place: Value, half: int) -> Value:
    """A plane's bits of 16 dims, which are in four words, at their place in a code."""
    turns = 8 // plane.bits
    at = e.offset(b, place, 16 * half if plane.outer == 2 else 0)
    words = e.lanes_of(b, e.load(b, at, llvm.vec(e.i32, 4), 4), [0, 1, 2, 3] * 4)
    first = 0 if plane.outer == 2 else 4 * half
    shifts = [plane.bits * ((first + i // 4) % turns) for i in range(e.LANES)]
    moved = b.lshr(words, ir.Constant(e.wide(e.i32), shifts))
    one = ((1 << plane.bits) - 1) * 0x01010101
    return b.shl(b.and_(moved, e.ints(one)), e.ints(plane.low))


# ---- stores -----------------------------------------------------------------------------


def store_group(format: KVFormat, which: str) -> Any:
    """(low, high, block, place, dim, dims): dims dim.. of a token, 32 or the last 16, rounded.

    low, high: their values, float32; block: of the KV head in its page; place: the token's there.
    """
    check(format)
    is_k = which == "k"

    def address(b, plane, block, place, dim, dims):
        if is_k or (format.coding and not plane.bits):
            at = place_of_dim(b, format, plane, block, dim, dims)
            return b.add(at, times(b, place, plane.dtype.nbytes * (plane.together if is_k else 1)))
        if not plane.bits:
            return place_of_token(b, format, block, place, dim, dims)
        at, step = place_of_four(b, format, plane, block, dim, dims)
        return b.add(at, b.add(b.mul(b.lshr(place, number(2)), step), b.and_(place, number(3))))

    def pieces(b, value, at, size, step):
        """The parts of `size` bytes of a vector, `step` bytes apart."""
        for lane in range(value.type.count):
            one = b.extract_element(value, ir.Constant(e.i32, lane))
            e.store(b, one, e.offset(b, at, lane * step), size)

    def store_floats(b, plane, value, at):
        value = _CONVERT[plane.dtype.name][0](b, value)
        if is_k:
            pieces(b, value, at, plane.dtype.nbytes, step_of_dim(plane))
        else:
            e.store(b, value, at, 1)

    def store_codes(b, words, at):
        """Bytes of codes, four to a lane of an int32 vector."""
        if is_k:
            pieces(b, words, at, WORD, PAGE * WORD)
        else:
            pieces(b, b.bitcast(words, llvm.vec(e.i8, 4 * words.type.count)), at, 1, WORD)

    def if_whole(b, dim, dims):
        return b.if_then(b.icmp_signed("<", b.add(dim, number(GROUP // 2)), dims))

    @s.operation(s.void, s.f32x16, s.f32x16, s.i64, s.i64, s.i64, s.i64)
    def put(b, low, high, block, place, dim, dims):
        if format.coding is None:
            plane = format.codes[0]
            at = address(b, plane, block, place, dim, dims)
            store_floats(b, plane, low, at)
            with if_whole(b, dim, dims):
                step = step_of_dim(plane) if is_k else plane.dtype.nbytes
                store_floats(b, plane, high, e.offset(b, at, GROUP // 2 * step))
            return
        codes, shared = rounding(b, format.coding, low, high)
        for plane in format.codes:
            at = address(b, plane, block, place, dim, dims)
            words = packed(b, plane, codes)
            if plane.dims > 1:
                store_codes(b, words, at)
                continue
            first, second = (llvm.shuffle(b, words, words, range(i, i + 4)) for i in (0, 4))
            store_codes(b, first, at)
            with if_whole(b, dim, dims):
                store_codes(b, second, e.offset(b, at, GROUP // 2 * (PAGE if is_k else WORD)))
        for plane, value in zip(format.shared, shared, strict=True):
            lanes = _CONVERT[plane.dtype.name][0](b, e.splat(b, value))
            one = b.extract_element(lanes, ir.Constant(e.i32, 0))
            at = address(b, plane, block, place, dim, dims)
            e.store(b, one, at, plane.dtype.nbytes)

    return put


def packed(b: ir.IRBuilder, plane: Plane, codes: list[Value]) -> Value:
    """A plane's bytes of a group as int32 words; codes: of its dims, two vectors of int32."""
    narrow = [b.trunc(half, e.wide(e.i8)) for half in codes]
    whole = llvm.shuffle(b, narrow[0], narrow[1], range(GROUP))
    turns = 8 // plane.bits
    inner = GROUP // turns // plane.outer
    mask = llvm.fill(e.i8, (1 << plane.bits) - 1, inner * plane.outer)
    found: Any = None
    for turn in range(turns):
        dims = [
            (outer * turns + turn) * inner + i for outer in range(plane.outer) for i in range(inner)
        ]
        part = llvm.shuffle(b, whole, whole, dims)
        if plane.low:
            part = b.lshr(part, llvm.fill(e.i8, plane.low, part.type.count))
        if plane.bits < 8:
            part = b.and_(part, mask)
            if turn:
                shift = llvm.fill(e.i8, plane.bits * turn, part.type.count)
                part = b.shl(part, shift)
        found = part if found is None else b.or_(found, part)
    return b.bitcast(found, llvm.vec(e.i32, found.type.count // 4))
