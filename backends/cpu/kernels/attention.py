"""Attention over cache pages with a running softmax (Milakov and Gimelshein 2018; Dao 2022).

Parallel over (tile of tokens of one sequence x KV head x group of query rows), dealt out one by
one so that short and long ones even out. The rows of an item are its tokens times the query heads
of the KV head. They walk the pages together, in blocks of 8 rows that each keep

    m  the largest score so far, l  the sum of 2^(score - m), o  the sum of 2^(score - m) v

in scratch; scores are in units of ln 2. A page is always taken as 32 keys: keys that a row does
not see get the score -inf, so a page without any leaves its state as it was, bit for bit, and a
row's result does not depend on the rows beside it. Heads are walked as long as they are in the
pages (`padded`): behind its own dims q is zero, and what o has there is never stored.
"""

from __future__ import annotations

import math

from llvmlite import ir

from runtime.backends.cpu.abi import ATTENTION_BLOCKS, ATTENTION_ROWS
from runtime.backends.plan.catalogue import constants
from runtime.ops.kv_formats import KV_FORMATS, PAGE, kv_format

from . import emit as e
from . import simd as s
from .attention_block import Block, block_beginning, exp2_negative, row_peaks, tanh
from .attention_passes import output_pass, output_row, row_passes, scores_pass
from .kv_planes import padded, room
from .rotation import rotating
from .rows import helper

_LOG2_E = e.single(1 / math.log(2))
_LOWEST = e.single(-3e38)  # finite, so that -inf less this is -inf and not NaN
_PLACES, _LOW, _HIGH = Block.places, Block.lowest, Block.highest
_SOURCES, _TARGETS = Block.sources, Block.targets
_PEAK, _DECAY, _SUMS, _SCORES, _Q = Block.peak, Block.decay, Block.sums, Block.scores, Block.q
_FAR = 1 << 40  # beyond every place
_ROWS, _GROUP = ATTENTION_ROWS, ATTENTION_ROWS * ATTENTION_BLOCKS


@helper
def block_nbytes(k_dims, v_dims):
    """Bytes of the state of 8 rows: `Block`, q, the sums of v, weights for codes of v."""
    return _Q + (room(k_dims) + 2 * room(v_dims)) * (4 * _ROWS)


@s.operation(s.f32x16, s.f32)
def first_lane(b, value):
    """`value` in lane 0, zero in the others."""
    return b.insert_element(e.floats(0.0), value, ir.Constant(e.i32, 0))


@helper
def group_rows(tiles, n_tiles, n_kv_heads, group, n_threads):
    """Rows that an item takes at most: fewer than a group if threads would have nothing to do."""
    limit, found = _GROUP, False
    while limit > 1 and not found:
        items = 0
        for tile in range(n_tiles):
            rows = s.load_i32(tiles + tile * 16 + 4) * group
            items += (rows + limit - 1) // limit * n_kv_heads
            if items >= n_threads:
                found = True
                break
        if not found:
            limit //= 2
    return limit


@helper
def begin_row(block, r, place, source, target, sink):
    """The state of a row that has seen nothing; `sink` is the address of its extra logit or 0."""
    s.store_i32(block + _PLACES + r * 4, place)
    s.store_i64(block + _SOURCES + r * 8, source)
    s.store_i64(block + _TARGETS + r * 8, target)
    peak, total = s.f32(_LOWEST), s.f32(0)
    if sink != 0:
        peak, total = max(peak, s.load_f32(sink) * s.f32(_LOG2_E)), s.f32(1)
    s.store_f32(block + _PEAK + r * 4, peak)
    s.store(block + _SUMS + r * 64, first_lane(total))


@helper
def cap_scores(block, rows, softcap):
    """score = cap tanh(score / cap), to units of ln 2."""
    inverse, cap = s.splat(s.f32(1) / softcap), s.splat(softcap * s.f32(_LOG2_E))
    for i in range(0, rows * PAGE * 4, 64):
        at = block + _SCORES + i
        s.store(at, tanh(s.load(at) * inverse) * cap)


@helper
def mask_scores(block, rows, base, window):
    """-inf for the keys base.. of a page that a row does not see."""
    hidden = s.splat(s.f32(-math.inf))
    for r in range(rows):
        place = s.load_i32(block + _PLACES + r * 4)
        first = place - window + 1 if window > 0 else 0
        for i in range(0, PAGE, 16):
            at = block + _SCORES + r * (PAGE * 4) + i * 4
            keys = s.lane_numbers() + s.splat_int(base + i)
            seen = (keys >= s.splat_int(first)) & (keys <= s.splat_int(place))
            s.store(at, s.select(seen, s.load(at), hidden))


@helper
def weigh_scores(block, rows):
    """Scores become weights 2^(score - m); m, l and the decay of what was summed before."""
    old = s.load(block + _PEAK)
    new = s.larger(row_peaks(block + _SCORES), old)
    s.store(block + _PEAK, new)
    s.store(block + _DECAY, exp2_negative(old - new))
    for r in range(rows):
        at, sums = block + _SCORES + r * (PAGE * 4), block + _SUMS + r * 64
        peak = s.splat(s.load_f32(block + _PEAK + r * 4))
        low, high = exp2_negative(s.load(at) - peak), exp2_negative(s.load(at + 64) - peak)
        s.store(at, low)
        s.store(at + 64, high)
        decay = s.splat(s.load_f32(block + _DECAY + r * 4))
        s.store(sums, s.fma(s.load(sums), decay, low + high))


@helper
def end_row(block, r, k_room, v_dim):
    """out = o / l. The zero added last makes -0 the same +0 whatever pages were walked."""
    zero = s.splat(s.f32(0))
    inverse = s.splat(s.f32(1) / s.total(s.load(block + _SUMS + r * 64)))
    o, out = block + _Q + k_room * (4 * _ROWS) + r * 64, s.load_i64(block + _TARGETS + r * 8)
    whole = v_dim // 16 * 16
    for i in range(0, whole, 16):
        s.store(out + i * 4, s.load(o + i * 32) * inverse + zero)
    if whole < v_dim:
        s.store_part(out + whole * 4, s.load(o + whole * 32) * inverse + zero, v_dim - whole)


def output_step(v_type):
    """(block, rows, v, ahead, o, v_dims, base, window, in_part): o takes in V of the keys base..

    in_part: whether a row does not see all of them.
    """
    format = kv_format(v_type)
    output = row_passes(output_pass, format)

    @helper
    def together(block, rows, v, ahead, o, v_dims, base, window, in_part):
        n_keys = min(PAGE, s.load_i64(block + _HIGH) - base + 1)
        output(block, rows, v, v_dims, n_keys, o, ahead)

    if format.coding is not None:
        return together
    output_one = output_row(format)

    @helper
    def each_what_it_sees(block, rows, v, ahead, o, v_dims, base, window, in_part):
        if not in_part:
            together(block, rows, v, ahead, o, v_dims, base, window, in_part)
            return
        for r in range(rows):
            place = s.load_i32(block + _PLACES + r * 4)
            first = max(0, place - window + 1 - base) if window > 0 else 0
            last = min(PAGE, place - base + 1)
            if first < last:
                output_one(block, r, v, v_dims, first, last, o)

    return each_what_it_sees


def page_step(k_type, v_type):
    """(block, rows, k, v, ahead.., base, ..): a block of rows takes in one page, the keys base..

    k_ahead and v_ahead: how far behind this page the one to be read next lies.
    """
    scores, output = row_passes(scores_pass, kv_format(k_type)), output_step(v_type)

    @helper
    def step(block, rows, k, v, k_ahead, v_ahead, base, k_dims, v_dims, window, softcap):
        low, high = s.load_i64(block + _LOW), s.load_i64(block + _HIGH)
        if base <= high and (window == 0 or base + PAGE > low - window + 1):
            scores(block, rows, k, k_dims, 0, 0, k_ahead)
            if softcap != s.f32(0):
                cap_scores(block, rows, softcap)
            in_part = base + PAGE - 1 > low or (window > 0 and base < high - window + 1)
            if in_part:
                mask_scores(block, rows, base, window)
            weigh_scores(block, rows)
            o = block + _Q + room(k_dims) * (4 * _ROWS)
            output(block, rows, v, v_ahead, o, v_dims, base, window, in_part)

    return step


def item_beginning(k_type):
    """(.., token, query, start, rows, ..): rows start.. of an item; their span of places.

    token, query: its first token and query head.
    """
    begin_block = block_beginning(kv_format(k_type))

    @helper
    def begin(
        q, q_stride, q_head_stride, out, out_stride, places, sinks, token, query, start, rows,
        group, k_dim, v_dim, factor, blocks, block_bytes,
    ):  # fmt: skip
        low, high = _FAR, 0
        for i in range(rows):
            at, head = token + (start + i) // group, query + (start + i) % group
            place = s.load_i32(places + at * 4)
            low, high = min(low, place), max(high, place)
            source, target = at * q_stride + head * q_head_stride, at * out_stride + head * v_dim
            sink = sinks + head * 4 if sinks != 0 else 0
            block = blocks + i // _ROWS * block_bytes
            begin_row(block, i % _ROWS, place, q + source * 4, out + target * 4, sink)
        for i in range(0, rows, _ROWS):
            block = blocks + i // _ROWS * block_bytes
            begin_block(block, min(_ROWS, rows - i), k_dim, room(k_dim), room(v_dim), factor)
        return low, high

    return begin


@constants(k_type=KV_FORMATS, v_type=KV_FORMATS)
def build_attention(k_type, v_type):
    """softmax(scale q k) v over the pages of each sequence: (tile x KV heads x rows) dealt out."""
    step, begin_item = page_step(k_type, v_type), item_beginning(k_type)
    rotate = rotating(v_type)

    def attention(
        q, q_stride, q_head_stride, k_pages, v_pages, k_page_bytes, v_page_bytes, block_table,
        block_table_stride, tiles, n_tiles, places, out, out_stride, n_heads, n_kv_heads, k_dim,
        v_dim, scale, window, softcap, sinks, rotation, scratch, scratch_bytes, thread, n_threads,
    ):  # fmt: skip
        count, group = s.load_i64(n_tiles), n_heads // n_kv_heads
        limit = group_rows(tiles, count, n_kv_heads, group, n_threads)
        k_dims, v_dims = padded(k_dim), padded(v_dim)
        blocks, block_bytes = scratch + thread * scratch_bytes, block_nbytes(k_dims, v_dims)
        cap, factor, turn = s.float_of(softcap), s.float_of(scale), 0
        if cap == s.f32(0):
            factor = factor * s.f32(_LOG2_E)
        for tile in range(count):
            token = s.load_i32(tiles + tile * 16)
            n_rows = s.load_i32(tiles + tile * 16 + 4) * group
            pages = block_table + s.load_i32(tiles + tile * 16 + 8) * block_table_stride * 4
            for piece in range(n_kv_heads * ((n_rows + limit - 1) // limit)):
                turn += 1
                if (turn - 1) % n_threads != thread:
                    continue
                head, start = piece % n_kv_heads, piece // n_kv_heads * limit
                rows = min(limit, n_rows - start)
                low, high = begin_item(
                    q, q_stride, q_head_stride, out, out_stride, places, sinks, token,
                    head * group, start, rows, group, k_dim, v_dim, factor, blocks, block_bytes,
                )  # fmt: skip
                page = max(0, low - window + 1) // PAGE if window > 0 else 0
                while page * PAGE <= high:
                    here = s.load_i32(pages + page * 4)
                    ahead = 0
                    if page * PAGE + PAGE <= high:
                        ahead = s.load_i32(pages + page * 4 + 4) - here
                    k = k_pages + here * k_page_bytes + head * (k_page_bytes // n_kv_heads)
                    v = v_pages + here * v_page_bytes + head * (v_page_bytes // n_kv_heads)
                    for i in range(0, rows, _ROWS):
                        step(
                            blocks + i // _ROWS * block_bytes, min(_ROWS, rows - i), k, v,
                            ahead * k_page_bytes, ahead * v_page_bytes, page * PAGE, k_dims,
                            v_dims, window, cap,
                        )  # fmt: skip
                        ahead = 0  # one block asks for the next page, for all
                    page += 1
                for i in range(rows):
                    block = blocks + i // _ROWS * block_bytes
                    end_row(block, i % _ROWS, room(k_dims), v_dim)
                    rotate(s.load_i64(block + _TARGETS + i % _ROWS * 8), v_dim, rotation)

    return attention
