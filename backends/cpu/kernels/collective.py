"""What the threads of several teams do together: parallel over units of 16 floats.

Sums are added in the order of the parts, whoever adds them. A small one every team makes for
itself, which takes one meeting. Of a large one each thread of all teams makes a part, once, where
all teams read it: that is less to move, and takes a second meeting.
"""

from __future__ import annotations

from . import simd as s
from .elementwise import get, put
from .executor import meet_all
from .rows import helper, piece, share


@helper
def add_up(parts, n_parts, more, out, first, end, n):
    """out = part 0 + part 1 + .. + more of n floats, in units first..end-1; more: 0 for none."""
    i, stop = first * 16, min(end * 16, n)
    while i + 64 <= stop:
        at = s.load_i64(parts) + i * 4
        a, b, c, d = s.load(at), s.load(at + 64), s.load(at + 128), s.load(at + 192)
        for k in range(1, n_parts):
            at = s.load_i64(parts + k * 8) + i * 4
            a, b = a + s.load(at), b + s.load(at + 64)
            c, d = c + s.load(at + 128), d + s.load(at + 192)
        if more != 0:
            at = more + i * 4
            a, b = a + s.load(at), b + s.load(at + 64)
            c, d = c + s.load(at + 128), d + s.load(at + 192)
        at = out + i * 4
        s.store(at, a)
        s.store(at + 64, b)
        s.store(at + 128, c)
        s.store(at + 192, d)
        i += 64
    while i < stop:
        total = get(s.load_i64(parts), i, stop, 0)
        for k in range(1, n_parts):
            total = total + get(s.load_i64(parts + k * 8), i, stop, 0)
        if more != 0:
            total = total + get(more, i, stop, 0)
        put(out, i, stop, total)
        i += 16


def build_all_sum():
    """Meet, then add up what all teams have; each into memory of its own."""

    def all_sum(x, parts, n_parts, more, out, live, n, meeting, thread, n_threads):
        """x: this team's part; parts: addresses of all; rows of n without gaps."""
        meet_all(meeting)
        size = s.load_i64(live) * n
        first, end = share((size + 15) // 16, thread, n_threads)
        add_up(parts, n_parts, more, out, first, end, size)

    return all_sum


def build_all_sum_once():
    """The same into one memory that all teams read: each of all threads adds up a part of it."""

    def all_sum_once(x, parts, n_parts, more, out, live, n, meeting, member, thread, n_threads):
        """member: address of the number of this team's first thread, and of that of all."""
        meet_all(meeting)
        size = s.load_i64(live) * n
        at, members = s.load_i64(member) + thread, s.load_i64(member + 8)
        first, end = share((size + 15) // 16, at, members)
        add_up(parts, n_parts, more, out, first, end, size)
        meet_all(meeting)

    return all_sum_once


def build_put_stretch():
    """Stretches of n floats of every row into longer rows: parallel over their units."""

    def put_stretch(
        x, out, live, each, repeat, n, x_row, x_step, out_row, out_step, thread, n_threads
    ):
        """`repeat` stretches a row, a step apart; all in floats. A row is of `each` that live."""
        units = (n + 15) // 16
        rows = (s.load_i64(live) + each - 1) // each
        at, last = share(rows * repeat * units, thread, n_threads)
        while at < last:
            stretch, first, stop = piece(at, last, units)
            row = stretch // repeat
            turn = stretch - row * repeat
            source = x + (row * x_row + turn * x_step) * 4
            target = out + (row * out_row + turn * out_step) * 4
            for unit in range(first, stop):
                put(target, unit * 16, n, get(source, unit * 16, n, 0))
            at += stop - first

    return put_stretch
