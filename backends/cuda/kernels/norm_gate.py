"""What stands between heads and the product behind them: a norm of each head and a gate, then int8.

A warp per (head, token), 4 neighbouring values a lane. Heads are multiples of 16 values, of 32
where the result is packed.
"""

from __future__ import annotations

from collections.abc import Callable

from runtime.backends.cuda.intrinsic import Declared
from runtime.backends.cuda.intrinsics import (
    block_x,
    block_y,
    constant4,
    divide,
    entry,
    f32,
    launch_next,
    launch_wait,
    load4,
    rsqrt,
    store,
    store4,
    thread_x,
    u32,
)  # fmt: skip
from runtime.backends.plan.catalogue import constants

from .elementwise import gated, sigmoid
from .norm import scaled, squares
from .pack import pack_values, place_of
from .sums import warp_sum

WARPS = 4


def silu_times(g, v):
    """silu(g) * v of four values."""
    return gated(g[0], v[0]), gated(g[1], v[1]), gated(g[2], v[2]), gated(g[3], v[3])


def sigmoid_times(g, v):
    """sigmoid(g) * v of four values."""
    return sigmoid(g[0]) * v[0], sigmoid(g[1]) * v[1], sigmoid(g[2]) * v[2], sigmoid(g[3]) * v[3]


def head_factor(square, dim, eps):
    """1 / sqrt(mean of squares + eps) of a head of `dim`, from the squares that lanes added."""
    return rsqrt(divide(warp_sum(square), f32(dim)) + eps)


def pack_rest(out, column, blocks, stretches, length, lane):
    """Zeros in the places of a packed column behind its blocks, by one warp."""
    places = u32(stretches * length)
    base, i = u32(10 * u32(column * places)), u32(u32(4 * blocks) + lane)
    while i < u32(4 * places):
        place = place_of(u32(i >> 2), stretches, length)
        at = u32(base + u32(u32(4 * place) + (i & 3)))
        store(out, at, u32(0))
        store(out, u32(at + u32(4 * places)), u32(0))
        if i & 3 < 2:
            store(out, u32(u32(base + u32(8 * places)) + u32(u32(2 * place) + (i & 3))), u32(0))
        i = u32(i + 32)


def _writers(packed: bool) -> tuple[Callable, Callable]:
    def write_packed(v, out, token, i, pieces, stretches, length, live):
        """Values 4 i to 4 i + 3 of a token's heads; all lanes come, `live` ones store."""
        pack_values(v, out, token, i, stretches, length, live)

    def write_plain(v, out, token, i, pieces, stretches, length, live):
        if live:
            store4(out, u32(u32(token * pieces) + i), v[0], v[1], v[2], v[3])

    def nothing(out, column, blocks, stretches, length, lane):
        """A row of floats has no rest."""

    return (write_packed, pack_rest) if packed else (write_plain, nothing)


def _no_factor(y, first, pieces, lane, eps):
    """Of heads that are gated alone."""
    return f32(1)


def _head_factor(y, first, pieces, lane, eps):
    """The norm's factor of a head whose fours begin at `first`."""
    square, i = f32(0), lane
    while i < pieces:
        square = squares(load4(y, u32(first + i)), square)
        i = u32(i + 32)
    return head_factor(square, u32(4 * pieces), eps)


def _of_head(normed: bool) -> Callable:
    def gated_norm(v, w, i, g, r):
        """Values 4 i to 4 i + 3 of a head, gated by g."""
        return silu_times(g, scaled(v, constant4(w, i), r))

    def gated_alone(v, w, i, g, r):
        return sigmoid_times(g, v)

    return gated_norm if normed else gated_alone


def _heads_loop(normed: bool, packed: bool) -> Callable:
    (write, write_rest), of_head = _writers(packed), _of_head(normed)
    factor = _head_factor if normed else _no_factor

    def loop(
        y, w, gate, out, heads, dim, gate_stride, gate_head_stride, eps, stretches, length
    ):  # fmt: skip
        """One head of one token, of warp (block x, warp) and block y."""
        lane, token = u32(thread_x() & 31), block_y()
        head = u32(WARPS * block_x() + (thread_x() >> 5))
        there, head = head < heads, min(head, u32(heads - 1))
        pieces = u32(dim >> 2)
        first = u32(u32(u32(token * heads) + head) * pieces)
        opening = u32(u32(u32(token * gate_stride) + u32(head * gate_head_stride)) >> 2)
        r = factor(y, first, pieces, lane, eps)
        begin = u32(0)
        while begin < pieces:
            i = u32(begin + lane)
            at = min(i, u32(pieces - 1))
            v = of_head(load4(y, u32(first + at)), w, at, load4(gate, u32(opening + at)), r)
            live, place = there and i < pieces, u32(u32(head * pieces) + i)
            write(v, out, token, place, u32(heads * pieces), stretches, length, live)
            begin = u32(begin + 32)
        if there and head == u32(heads - 1):
            write_rest(out, token, u32(heads * dim >> 5), stretches, length, lane)

    return loop


_SIZES = "heads:u32 dim:u32 gate_stride:u32 gate_head_stride:u32"
_CUT = "stretches:u32 length:u32"


@constants(packed=(False, True))
def build_norm_gate(packed: bool) -> Declared:
    """out [tokens, heads dim] = silu(gate) * rms_norm(y, w), y f32 [tokens, heads, dim].

    Heads of gate lie gate_stride (of tokens) and gate_head_stride apart, multiples of 4. `packed`:
    int8, cut in stretches, else f32. Grid (heads / 4 rounded up, tokens).
    """
    loop = _heads_loop(True, packed)

    @entry(f"y:f32* w:f32* gate:f32* out:f32* {_SIZES} eps:f32", threads=32 * WARPS)
    def norm_gate(y, w, gate, out, heads, dim, gate_stride, gate_head_stride, eps):
        launch_next()
        launch_wait()
        zero = u32(0)
        loop(y, w, gate, out, heads, dim, gate_stride, gate_head_stride, eps, zero, zero)

    @entry(f"y:f32* w:f32* gate:f32* out:u32* {_SIZES} eps:f32 {_CUT}", threads=32 * WARPS)
    def norm_gate_packed(
        y, w, gate, out, heads, dim, gate_stride, gate_head_stride, eps, stretches, length
    ):  # fmt: skip
        launch_next()
        launch_wait()
        loop(y, w, gate, out, heads, dim, gate_stride, gate_head_stride, eps, stretches, length)

    return norm_gate_packed if packed else norm_gate


@constants(packed=(False, True))
def build_sigmoid_gate(packed: bool) -> Declared:
    """out = sigmoid(gate) * y; all else as `norm_gate`."""
    loop = _heads_loop(False, packed)

    @entry(f"y:f32* gate:f32* out:f32* {_SIZES}", threads=32 * WARPS)
    def sigmoid_gate(y, gate, out, heads, dim, gate_stride, gate_head_stride):
        launch_next()
        launch_wait()
        zero, eps = u32(0), f32(0)
        loop(y, y, gate, out, heads, dim, gate_stride, gate_head_stride, eps, zero, zero)

    @entry(f"y:f32* gate:f32* out:u32* {_SIZES} {_CUT}", threads=32 * WARPS)
    def sigmoid_gate_packed(
        y, gate, out, heads, dim, gate_stride, gate_head_stride, stretches, length
    ):  # fmt: skip
        launch_next()
        launch_wait()
        eps = f32(0)
        loop(y, y, gate, out, heads, dim, gate_stride, gate_head_stride, eps, stretches, length)

    return sigmoid_gate_packed if packed else sigmoid_gate
