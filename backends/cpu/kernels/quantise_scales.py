"""Scales of blocks found by trial: of a block a float16, of each of its groups a step of it.

Sixteen blocks are worked on side by side (lane = block). A trial proposes scales for all groups,
has the best codes of all elements found for them, and what lowered the error is kept:

1. each group by itself, scales falling from that of its largest value;
2. scales of the block around the least that reaches all of these, each group at the step nearest
   to its own;
3. steps one up or down, and the block's scale a little up or down, by less and less.

Values are divided by the largest of their block, so tiny and huge ones are searched alike.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from runtime.ops.blocks import BlockFormat, Join, count_of

from . import lanes as l
from . import simd as s
from .packing import packer
from .rows import helper, share
from .tables import constant

_FAR = 3e38
_SMALLEST = 1e-20  # a block of smaller values is zeros: no float16 is as small

# What is known of a block, 16 lanes each: its scale, that of the trial, the one that reaches all
# groups; factors from scales to float16 and back.
_BEST, _TRIED, _REACH, _TO_HALF, _FROM_HALF = range(0, 5 * 64, 64)
_GROUPS = 5 * 64
# And of each group: the scale for its largest value, its own best one, its step and that of the
# trial, the least error; the scale of the trial and the error there.
_TOP, _FREE, _STEP, _TRIED_STEP, _LEAST, SCALE, ERROR = range(0, 7 * 64, 64)
_SIZE = 7 * 64
# Kinds of trials: of groups alone; of the block, with the steps nearest to the scales of groups, or
# with the steps found before; of steps.
GROUPS, ANEW, CHANGE, STEPS = range(4)


class Search(NamedTuple):
    """How scales are tried."""

    highest: float  # the first scale of a group, as a part of that for its largest value
    fall: float  # each further one as a part of the one before
    groups: int  # how many; twice as many where they may be negative
    start: float  # the first scale of a block, as a part of the least that reaches all groups
    rise: float  # by how much more of it each further one is larger
    blocks: int  # how many
    change: float  # by which part the block's scale is changed in the end, then by half of it, ..
    rounds: int  # how often
    first: tuple[float, ...] = ()  # scales of a group that are tried before, parts as above

    def trials(self, both_signs: bool) -> tuple[list[int], list[float]]:
        """Of every trial its kind, and what it multiplies scales with or adds to steps."""
        alone = [*self.first, *(self.highest * self.fall**i for i in range(self.groups))]
        if both_signs:
            alone = [sign * scale for scale in alone for sign in (1, -1)]
        found = [(GROUPS, scale) for scale in alone]
        found += [(ANEW, self.start + self.rise * i) for i in range(self.blocks)]
        for i in range(self.rounds):
            part = self.change / 2**i
            found += [(STEPS, 1.0), (STEPS, -1.0), (CHANGE, 1 + part), (CHANGE, 1 - part)]
        kinds, factors = zip(*found, (CHANGE, 1.0), strict=True)
        return list(kinds), list(factors)


class Steps(NamedTuple):
    """The scale of a group is the block's * unit * (times * step + plus), steps 0..most."""

    most: float
    times: float
    plus: float
    unit: float

    @staticmethod
    def of(row: BlockFormat) -> Steps:
        """Those of a format; without any there is one group with the block's scale."""
        scale, numbers = row.scale, row.scale.steps
        if not numbers:
            return Steps(0.0, 1.0, 1.0, 1.0)
        parts: Any = numbers.parts if isinstance(numbers, Join) else (numbers,)
        most = (1 << sum(bits.width for bits in parts)) - 1
        return Steps(*map(float, (most, scale.times, scale.plus, scale.unit)))

    @property
    def widest(self) -> float:
        """What multiplies the block's scale in the largest scale of a group."""
        return self.plus if self.plus < 0 else self.times * self.most + self.plus


def groups_of(row: BlockFormat) -> int:
    """How many scales a block has."""
    return count_of(row.scale.steps, row) if row.scale.steps else 1


@helper
def group(state, g):
    """Where what is known of a group begins."""
    return state + _GROUPS + _SIZE * g


@helper
def _keep(better, target, source):
    """16 floats from `source` in the lanes that are better."""
    s.store(target, s.select(better, s.load(source), s.load(target)))


@helper
def _largest(values, n):
    """The largest magnitude of n rows."""
    peak = s.splat(s.f32(0))
    for i in range(n):
        peak = s.larger(l.absolute(s.load(values + 64 * i)), peak)
    return peak


@helper
def _start(values, state, size, groups, top, unit):
    """Values as parts of the largest, and a state without any scale."""
    zero, one = s.splat(s.f32(0)), s.splat(s.f32(1))
    peak, each = _largest(values, size), size // groups
    back = s.select(peak > s.splat(s.f32(_SMALLEST)), one / peak, zero)
    for i in range(size):
        s.store(values + 64 * i, s.load(values + 64 * i) * back)
    s.store(state + _TO_HALF, peak * s.splat(s.f32(1 / unit)))
    s.store(state + _FROM_HALF, back * s.splat(s.f32(unit)))
    s.store(state + _BEST, zero)
    for g in range(groups):
        at = group(state, g)
        s.store(at + _TOP, _largest(values + 64 * each * g, each) * s.splat(s.f32(1 / top)))
        s.store(at + _FREE, zero)
        s.store(at + _STEP, zero)
        s.store(at + _LEAST, s.splat(s.f32(_FAR)))


@helper
def _reach(state, groups, widest):
    """The scale of the block with which its widest is the largest scale of a group."""
    largest = s.splat(s.f32(0))
    for g in range(groups):
        at = group(state, g)
        t = s.load(at + _FREE)
        largest = s.select(l.absolute(t) > l.absolute(largest), t, largest)
        s.store(at + _LEAST, s.splat(s.f32(_FAR)))
    s.store(state + _REACH, largest * s.splat(s.f32(1 / widest)))


@helper
def _try_groups(state, groups, ratio):
    """Scales of groups as parts of those for their largest values."""
    for g in range(groups):
        at = group(state, g)
        s.store(at + SCALE, s.load(at + _TOP) * s.splat(ratio))


@helper
def _try_block(state, groups, kind, factor, most, times, plus):
    """A scale of the block, and of groups the nearest steps, or those `factor` further."""
    d = s.load(state + _BEST)
    if kind == ANEW:
        d = s.load(state + _REACH)
    if kind != STEPS:
        d = d * s.splat(factor)
    d = l.as_half(d * s.load(state + _TO_HALF)) * s.load(state + _FROM_HALF)
    s.store(state + _TRIED, d)
    for g in range(groups):
        at = group(state, g)
        step = s.load(at + _STEP)
        if kind == STEPS:
            step = step + s.splat(factor)
        if kind == ANEW:
            step = (s.load(at + _FREE) / d - s.splat(s.f32(plus))) * s.splat(s.f32(1 / times))
        step = l.code(step, s.f32(0), s.f32(most))
        s.store(at + _TRIED_STEP, step)
        s.store(at + SCALE, d * (step * s.splat(s.f32(times)) + s.splat(s.f32(plus))))


@helper
def _keep_groups(state, groups, target, source):
    """What lowered the error of a group."""
    for g in range(groups):
        at = group(state, g)
        better = s.load(at + ERROR) < s.load(at + _LEAST)
        _keep(better, at + target, at + source)
        _keep(better, at + _LEAST, at + ERROR)


@helper
def _keep_block(state, groups):
    """Scale and steps that lowered the error of all groups together."""
    error = before = s.splat(s.f32(0))
    for g in range(groups):
        error = error + s.load(group(state, g) + ERROR)
        before = before + s.load(group(state, g) + _LEAST)
    better = error < before
    _keep(better, state + _BEST, state + _TRIED)
    for g in range(groups):
        at = group(state, g)
        _keep(better, at + _STEP, at + _TRIED_STEP)
        _keep(better, at + _LEAST, at + ERROR)


def scale_quantiser(
    row: BlockFormat, search: Search, top: float, scratch: int, prepare: Any, evaluate: Any
) -> Any:
    """The kernel of a format. top: the largest level; scratch: bytes for the two functions.

    prepare (values, weights, scratch): makes what evaluate needs.
    evaluate (values, weights, scratch, state, codes, extra, keep): reads the SCALE of each `group`
    and stores the ERROR of the best codes, but for what is the same at all scales. keep: these go
    to `codes`, and signs or directions to `extra` (see packing).
    """
    size, nbytes, groups = row.block, row.nbytes, groups_of(row)
    most, times, plus, unit = steps = Steps.of(row)
    widest = steps.widest
    schedule = search.trials(plus < 0 or not row.scale.steps)
    kinds, factors, last = constant(schedule[0]), constant(schedule[1]), len(schedule[0]) - 1
    read, read_weights, pack = l.loader(size), l.loader(size, periodic=True), packer(row.name)
    values_room, weights_room, codes_room = (l.room(64 * size) for _ in range(3))
    scratch_room, state_room = l.room(scratch), l.room(_GROUPS + _SIZE * groups)
    steps_room, extra_room, base_room = (l.room(64 * n) for n in (groups, size // 8, 1))

    def quantise(x, importance, out, n_rows, n_columns, thread, n_threads):
        values, weights, room, state = values_room(), weights_room(), scratch_room(), state_room()
        codes, steps, extra, base = codes_room(), steps_room(), extra_room(), base_room()
        blocks = n_rows * (n_columns // size)
        begin, end = share((blocks + 15) // 16, thread, n_threads)
        for i in range(size):
            s.store(weights + 64 * i, s.splat(s.f32(1)))
        for block in range(begin * 16, min(end * 16, blocks), 16):
            read(x, block, blocks, values, n_columns)
            if importance != 0:
                read_weights(importance, block, blocks, weights, n_columns)
            _start(values, state, size, groups, top, unit)
            prepare(values, weights, room)
            for trial in range(last + 1):
                kind, factor = s.load_i32(kinds() + 4 * trial), s.load_f32(factors() + 4 * trial)
                if kind == GROUPS:
                    _try_groups(state, groups, factor)
                else:
                    _try_block(state, groups, kind, factor, most, times, plus)
                evaluate(values, weights, room, state, codes, extra, trial == last)
                if kind == GROUPS:
                    _keep_groups(state, groups, _FREE, SCALE)
                elif kind == STEPS:
                    _keep_groups(state, groups, _STEP, _TRIED_STEP)
                elif trial < last:
                    _keep_block(state, groups)
                if kind == GROUPS and s.load_i32(kinds() + 4 * trial + 4) == ANEW:
                    _reach(state, groups, widest)
            for g in range(groups):
                step = s.load(group(state, g) + _STEP) + s.splat(s.f32(plus))
                l.store_ints(steps + 64 * g, l.truncated(step))
            l.store_ints(base, l.half_bits(s.load(state + _BEST) * s.load(state + _TO_HALF)))
            pack(codes, steps, extra, base, out + nbytes * block, min(16, blocks - block))

    return quantise
