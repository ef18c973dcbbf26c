"""Causal short convolution with its rolling inputs; SiLU and the L2 norm of heads behind it.

A warp per (block of up to 128 channels, row), 4 channels a lane; a block is a head where heads are
normed, so their sum stays in the warp. An OWNER is the warp of a sequence: it has the sequence's
first taps - 1 tokens, which need the inputs kept in a slot, and leaves the new ones; so the slot
that is read may be the one that is written. All other tokens find what they need in x.
"""

from __future__ import annotations

from collections.abc import Callable

from runtime.backends.cuda.intrinsic import Declared
from runtime.backends.cuda.intrinsics import (
    block_x,
    block_y,
    constant,
    constant4,
    entry,
    f32,
    fma,
    i32,
    launch_next,
    launch_wait,
    load,
    load2,
    registers,
    rsqrt,
    store,
    thread_x,
    u32,
    warp_sum_i32,
)  # fmt: skip
from runtime.backends.plan.catalogue import constants

from .elementwise import silu
from .sums import warp_sum

BLOCK = 128  # channels of a warp
WARPS = 4  # of a block, each with another row
_LANE = BLOCK // 32


def input_at(x, state, row, token, past, channel, x_stride, channels, taps):
    """Input of a channel at `token` of a sequence that begins in row `row`.

    Those before token 0 are in the slot that begins at `past`; below 0: zeros.
    """
    value = f32(0)
    if token >= 0:
        value = load(x, u32(u32(u32(row + token) * x_stride) + channel))
    elif past >= 0:
        kept = u32(u32(token + taps) - 1)
        value = load(state, u32(u32(u32(u32(past) * u32(taps - 1) + kept) * channels) + channel))
    return value


def token_of(spans, row, sequences, lane):
    """1 + the place of a row of the step in its sequence; 0 for a row of none."""
    found, first = u32(0), u32(0)
    while first < sequences:
        at = u32(first + lane)
        begin, count = load2(spans, min(at, u32(sequences - 1)))
        inside = at < sequences and u32(row - begin) < u32(count)
        found = u32(found + u32(warp_sum_i32(i32(row - begin + 1) if inside else i32(0))))
        first = u32(first + 32)
    return found


def _four_taps() -> tuple[Callable, Callable]:
    """Filters and inputs in registers, all asked for before the first is used."""
    room, window = registers("f32", 4 * _LANE), registers("f32", 4 * _LANE)

    def load_filters(w, start, width, lane, taps):
        filters = room()
        for c in range(_LANE):
            by = constant4(w, u32(start + min(u32(lane + 32 * c), u32(width - 1))))
            filters[4 * c], filters[4 * c + 1], filters[4 * c + 2], filters[4 * c + 3] = by
        return filters

    def convolve(x, state, w, filters, row, t, past, start, width, lane, x_stride, channels, taps):
        inputs = window()
        for j in range(4):
            for c in range(_LANE):
                channel = u32(start + min(u32(lane + 32 * c), u32(width - 1)))
                inputs[4 * c + j] = input_at(
                    x, state, row, i32(t - 3 + j), past, channel, x_stride, channels, 4
                )
        for c in range(_LANE):
            total = f32(0)
            for j in range(4):
                total = fma(filters[4 * c + j], inputs[4 * c + j], total)
            inputs[c] = total
        return inputs

    return load_filters, convolve


def _any_taps() -> tuple[Callable, Callable]:
    """Any number of taps, one after the other."""
    window = registers("f32", _LANE)

    def load_filters(w, start, width, lane, taps):
        return w

    def convolve(x, state, w, filters, row, t, past, start, width, lane, x_stride, channels, taps):
        sums = window()
        for c in range(_LANE):
            channel = u32(start + min(u32(lane + 32 * c), u32(width - 1)))
            total, j = f32(0), u32(0)
            while j < taps:
                token = i32(i32(t) - i32(taps) + i32(j) + 1)
                value = input_at(x, state, row, token, past, channel, x_stride, channels, taps)
                total = fma(constant(w, u32(u32(channel * taps) + j)), value, total)
                j = u32(j + 1)
            sums[c] = total
        return sums

    return load_filters, convolve


def finish(values, out, row, start, width, lane, channels, active, normed, eps):
    """Activation and norm of a row of a block, and where it goes."""
    square = f32(0)
    for c in range(_LANE):
        if active:
            values[c] = silu(values[c])
        if u32(lane + 32 * c) < width:
            square = fma(values[c], values[c], square)
    factor = f32(1)
    if normed:
        factor = rsqrt(warp_sum(square) + eps)
    for c in range(_LANE):
        at = u32(lane + 32 * c)
        if at < width:
            store(out, u32(u32(row * channels) + u32(start + at)), values[c] * factor)


def roll(x, state, row, count, past, slot, start, width, lane, x_stride, channels, taps):
    """The last taps - 1 inputs to a slot, oldest first; it may be the one they come from."""
    j = u32(0)
    while u32(j + 1) < taps:
        token = i32(i32(count) - i32(taps) + i32(j) + 1)
        for c in range(_LANE):
            at = u32(lane + 32 * c)
            if at < width:
                channel = u32(start + at)
                value = input_at(x, state, row, token, past, channel, x_stride, channels, taps)
                to = u32(u32(slot * u32(taps - 1)) + j)
                store(state, u32(u32(to * channels) + channel), value)
        j = u32(j + 1)


@constants(four=(False, True))
def build_short_conv(four: bool) -> Declared:
    """out[t, c] = sum over j of w[c, j] x[t - taps + 1 + j, c]; with `active` SiLU of it.

    x f32 [tokens, channels] x_stride apart, w [channels, taps] (`four`: taps is 4), state
    [slots, taps - 1, channels]; spans, slots: see ops/delta.py. Blocks of `block` channels from
    norm_first to norm_end are L2-normed. `owners`: room for sequences. Grid (channels / block,
    rows / 4), rows being the owners, then the tokens if there may be more than taps - 1.
    """
    load_filters, convolve = _four_taps() if four else _any_taps()

    @entry(
        "x:f32* w:f32* state:f32* spans:i32* slot_in:i32* slot_out:i32* live:u32* out:f32* "
        "channels:u32 taps:u32 block:u32 x_stride:u32 norm_first:u32 norm_end:u32 eps:f32 "
        "active:u32 owners:u32",
        threads=32 * WARPS,
    )
    def short_conv(
        x, w, state, spans, slot_in, slot_out, live, out, channels, taps, block, x_stride,
        norm_first, norm_end, eps, active, owners,
    ):  # fmt: skip
        launch_next()
        lane, item = u32(thread_x() & 31), u32(block_y() * WARPS + (thread_x() >> 5))
        start = u32(block_x() * block)
        width = min(block, u32(channels - start))
        normed = norm_first <= start and start < norm_end
        filters = load_filters(w, start, width, lane, taps)
        launch_wait()
        sequences = load(live, u32(0))
        if item < owners:
            if item < sequences:
                begin, count = load2(spans, item)
                row, past, t = u32(begin), load(slot_in, item), u32(0)
                while t < min(u32(count), u32(taps - 1)):
                    values = convolve(
                        x, state, w, filters, row, t, past, start, width, lane, x_stride, channels,
                        taps,
                    )  # fmt: skip
                    at = u32(row + t)
                    finish(values, out, at, start, width, lane, channels, active, normed, eps)
                    t = u32(t + 1)
                slot = u32(load(slot_out, item))
                roll(
                    x, state, row, u32(count), past, slot, start, width, lane, x_stride, channels,
                    taps,
                )  # fmt: skip
        else:
            row = u32(item - owners)
            t = token_of(spans, row, sequences, lane)
            if t >= taps:
                t = u32(t - 1)
                values = convolve(
                    x, state, w, filters, u32(row - t), t, i32(-1), start, width, lane, x_stride,
                    channels, taps,
                )  # fmt: skip
                finish(values, out, row, start, width, lane, channels, active, normed, eps)

    return short_conv
