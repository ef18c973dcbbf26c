"""What a split of one operand of a node asks of the others: from a pattern beside each shape rule.

A pattern names the axes of the inputs and of the result: "* k, n k -> * n" for a product with a
weight. Axes of one name are split alike or not at all. A name that the result lacks is summed
over: split there, the result is PARTIAL. A name with a capital stays whole. `(g r)` is one axis of
g times r: of the operand that has g alone every device has what its share of `(g r)` needs, so a
KV head may be on several devices. `*` is as many axes as there are. Elementwise ops, ops on rows,
copies and views need no pattern: theirs follows from the kind.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial, wraps
from typing import Any, NamedTuple, TypeVar

import numpy as np

from runtime.ops.errors import OpError
from runtime.ops.moe import expert_sum
from runtime.ops.registry import Kind, find
from runtime.ops.splits import MIRRORED, PARTIAL, Routed, Split, State, Unsplittable, split_of
from runtime.ops.tensor import LEAVES, Shape, Tensor
from runtime.ops.views import broadcast, permute, reshape, slice_

T = TypeVar("T")
_MOST_KNOWN = 20_000
_KNOWN: dict[tuple[Any, ...], Any] = {}  # what rules said of such nodes
OUT = -1  # the result, where inputs have their numbers
Names = tuple[str, ...]  # of the factors of one axis; none: it stays whole
Pattern = tuple[tuple[Names, ...], ...]  # of each input, and of the result last


class Link(NamedTuple):
    """How an axis of one operand goes with an axis of another.

    places: int64 [length of the target's, m], for each index of the target those of the source
    (-1: none). shared: the target's serves all of them; else they must be of the same owners.
    same: each index goes with its own.
    """

    places: np.ndarray
    shared: bool = False
    same: bool = False


def _remembered(function: Callable[..., T]) -> Callable[..., T]:
    """Ask once of nodes that are alike in op, shapes and attributes: layers repeat."""

    @wraps(function)
    def asked(node: Tensor, *more: Any) -> T:
        shapes = node.shape, *(x.shape for x in node.inputs)
        key = function.__name__, node.op, *shapes, *node.attrs.items(), *more
        if key not in _KNOWN:
            if len(_KNOWN) >= _MOST_KNOWN:
                _KNOWN.clear()
            _KNOWN[key] = function(node, *more)
        return _KNOWN[key]

    return asked


@_remembered
def links(node: Tensor, source: int, axis: int, target: int) -> tuple[tuple[int, Link], ...]:
    """Axes of `target` that go with one of `source` (inputs by number, OUT), outermost first."""
    if node.op in LEAVES:
        return ()
    if find(node.op).kind is Kind.VIEW:
        way = partial(_through_view, node, source == OUT, axis)
    else:
        way = partial(_by_pattern, node, source, axis, target)
    found = ((number, way(number)) for number in range(_operand(node, target).ndim))
    length = int(_operand(node, source).shape[axis])
    return tuple((number, _told(link, length)) for number, link in found if link is not None)


def _told(link: Link, length: int) -> Link:
    """A link from an axis of that length that says whether it changes anything."""
    places = link.places[:, 0]
    same = link.places.shape[1] == 1 and np.array_equal(places, np.arange(length))
    return link._replace(same=same and not link.shared)


@_remembered
def is_summed(node: Tensor, number: int, axis: int) -> bool:
    """Whether the node sums over this axis of an input."""
    if node.op in LEAVES or find(node.op).kind is Kind.VIEW:
        return False
    *inputs, result = pattern(node)
    names = inputs[number][axis]
    return bool(names) and not {*names} & {n for axis in result for n in axis}


@_remembered
def needs(node: Tensor, split: Split) -> list[State]:
    """States of the inputs from which every device computes its part of the result.

    Unsplittable: nobody can compute a part of it.
    """
    found = [_asked(node, OUT, split, number) for number in range(len(node.inputs))]
    if all(state is MIRRORED for state in found):
        raise Unsplittable(f"{node.op} keeps axis {split.axis} of its result whole")
    return found


@_remembered
def summands(node: Tensor, number: int, split: Split) -> list[State]:
    """States of all inputs where one is split along an axis that is summed over."""
    if not is_summed(node, number, split.axis):
        raise Unsplittable(f"{node.op} does not sum over axis {split.axis} of input {number}")
    if not _of_one_each(split):
        raise Unsplittable("summands of several owners would count several times")
    found = [_asked(node, number, split, other) for other in range(len(node.inputs))]
    found[number] = split
    return found


def result(node: Tensor, states: Sequence[State]) -> State:
    """The state of what devices compute from inputs of these states; Unsplittable: nothing."""
    given = list(states)
    if any(isinstance(state, Routed) for state in given):
        return routed(node, given)
    sums = tuple(i for i, state in enumerate(given) if state is PARTIAL)
    splits = {i: state for i, state in enumerate(given) if isinstance(state, Split)}
    if sums:
        if not splits and _is_linear(node, sums):
            return PARTIAL
        raise Unsplittable(f"{node.op} of partial sums is no partial sum")
    for number, split in splits.items():
        for axis, link in links(node, number, split.axis, OUT):
            candidate = carried(split, axis, link)
            if candidate is None:
                continue
            if slice_.made(node) or needs(node, candidate) == given:  # more than a slice is no harm
                return candidate
        if is_summed(node, number, split.axis) and summands(node, number, split) == given:
            return PARTIAL
    if splits:
        raise Unsplittable(f"{node.op} of inputs that are {', '.join(map(str, given))}")
    return MIRRORED


def routed(node: Tensor, states: Sequence[State]) -> State:
    """As `result`, where rows lie by expert: of inputs, or picked from weights split by expert.

    What works row by row keeps them so; a sum over choices leaves out those of other devices.
    """
    op, given = find(node.op), [*states]
    for number, by in op.picks.items():
        if isinstance(split := given[number], Split) and split.axis == 0:
            given[number] = Routed(node.inputs[by], split)
    way, *more = {*given} - {MIRRORED} or {MIRRORED}
    if not more and isinstance(way, Routed) and all(given[n] == way for n in op.picks):
        if expert_sum.made(node) and given[1:] == [MIRRORED] and _of_one_each(way.experts):
            return PARTIAL
        if op.kind in _BY_ROW and node.ndim > 2:
            return way
    raise Unsplittable(f"{op.name} of inputs that are {', '.join(map(str, states))}")


_BY_ROW = (Kind.ELEMENTWISE, Kind.ROWWISE, Kind.CONTRACTION)


def _of_one_each(split: Split) -> bool:
    return all(len(owners) == 1 for owners, _ in split.runs)


def _is_linear(node: Tensor, partial: tuple[int, ...]) -> bool:
    op = find(node.op)
    return partial in (((0,),) if op.kind in _LINEAR else op.linear)


_LINEAR = (Kind.VIEW, Kind.COPY, Kind.CONTRACTION)


def carried(split: Split, axis: int, link: Link) -> Split | None:
    """The same owners along an axis that goes with it; None where they would have to be mixed."""
    if link.same:
        return split._replace(axis=axis)
    masks = np.append(split.masks(), 0)[link.places]  # nobody at -1
    if link.shared:
        return split_of(axis, np.bitwise_or.reduce(masks, 1))
    return split_of(axis, masks[:, 0]) if (masks == masks[:, :1]).all() else None


def _asked(node: Tensor, source: int, split: Split, target: int) -> State:
    reason = ""
    for axis, link in links(node, source, split.axis, target):
        found = carried(split, axis, link)
        if found is None:
            reason = f"{node.op} would move elements of {split} between devices"
        elif link.shared and not _even(node, source, split, target, found):
            reason = f"{node.op}: {split} is not the same part of every group"
        else:
            return found
    if reason:
        raise Unsplittable(reason)
    return MIRRORED


def _even(node: Tensor, source: int, split: Split, target: int, found: Split) -> bool:
    """Whether each device's part pairs up as the op pairs whole axes, by place."""
    operands = pattern(node)
    names, wanted = operands[source][split.axis], operands[target][found.axis]
    pairs = next(link for axis, link in links(node, target, found.axis, source)).places[:, 0]
    masks, others = split.masks(), found.masks()
    for device in range(int(masks.max()).bit_length()):
        here, there = (np.flatnonzero(m >> device & 1) for m in (masks, others))
        if len(there) and len(here) % len(there):
            return False
        sizes = [len(there) if n in wanted else len(here) // max(1, len(there)) for n in names]
        local = np.indices(sizes)[names.index(wanted[0])].reshape(-1)
        if not np.array_equal(there[local], pairs[here]):
            return False
    return True


def pattern(node: Tensor) -> Pattern:
    """The names of the axes of a node's inputs and of its result; of an op that is no view."""
    op = find(node.op)
    shapes = [x.shape for x in node.inputs] + [node.shape]
    if op.axes:
        text = op.axes if isinstance(op.axes, str) else op.axes(node)
        return _expanded(text, tuple(map(len, shapes)))
    if op.kind in (Kind.ELEMENTWISE, Kind.COPY):
        return tuple(_aligned(shape, node.shape) for shape in shapes)
    if op.kind is Kind.ROWWISE:  # inputs with fewer axes are shared by all rows
        return tuple(
            (*_aligned(s, node.shape)[:-1], ()) if len(s) == node.ndim else ((),) * len(s)
            for s in shapes
        )
    return tuple(((),) * len(shape) for shape in shapes)


def _aligned(shape: Shape, whole: Shape) -> tuple[Names, ...]:
    """Axes by their places from the last; what is repeated has no name."""
    behind = enumerate(whole[len(whole) - len(shape) :], len(whole) - len(shape))
    return tuple((f"a{i}",) if n == m else () for (i, m), n in zip(behind, shape, strict=True))


@cache
def _expanded(text: str, ndims: tuple[int, ...]) -> Pattern:
    for choice in text.split("|"):
        left, _, right = choice.partition("->")
        given = [_tokens(part) for part in left.split(",")][: len(ndims) - 1]  # optional ones last
        operands = [*given, _tokens(right)]
        if all("*" in of or len(of) == n for of, n in zip(operands, ndims, strict=True)):
            return _named(operands, ndims)
    raise OpError(f"pattern {text!r} does not fit operands of {ndims} axes")


def _named(operands: Sequence[Sequence[str]], ndims: tuple[int, ...]) -> Pattern:
    return tuple(
        tuple(
            tuple(name for name in names if not name[0].isupper())
            for token in tokens
            for names in _axes_of(token, ndim - len(tokens) + 1)
        )
        for tokens, ndim in zip(operands, ndims, strict=True)
    )


def _tokens(text: str) -> list[str]:
    return [token.strip("()") for token in re.findall(r"\([^)]*\)|\S+", text)]


def _axes_of(token: str, stars: int) -> list[Names]:
    return [(f"*{i}",) for i in range(stars)] if token == "*" else [tuple(token.split())]


def _operand(node: Tensor, number: int) -> Tensor:
    return node if number == OUT else node.inputs[number]


def _by_pattern(node: Tensor, source: int, axis: int, target: int, number: int) -> Link | None:
    operands = pattern(node)
    names, wanted = operands[source][axis], operands[target][number]
    common = [name for name in wanted if name in names]
    if not common:
        return None
    sizes = _sizes(node, operands)
    rest = [name for name in names if name not in common]
    index = np.arange(math.prod(sizes[n] for n in names)).reshape([sizes[n] for n in names])
    index = index.transpose([names.index(n) for n in (*common, *rest)])
    index = index.reshape(*(sizes[n] if n in common else 1 for n in wanted), -1)
    index = np.broadcast_to(index, (*(sizes[n] for n in wanted), index.shape[-1]))
    return Link(index.reshape(-1, index.shape[-1]), bool(rest))


def _sizes(node: Tensor, operands: Pattern) -> dict[str, int]:
    """The length of each name; of a factor what the others leave."""
    lengths = [n for x in (*node.inputs, node) for n in x.shape]
    axes = list(zip([names for operand in operands for names in operand], lengths, strict=True))
    sizes = {names[0]: int(n) for names, n in axes if len(names) == 1}
    for names, n in axes:
        free = [name for name in names if name not in sizes]
        if len(names) > 1 and free:
            known = math.prod(sizes[name] for name in names if name in sizes)
            sizes[free[0]] = int(n) // known
    return sizes


def _through_view(node: Tensor, backward: bool, axis: int, number: int) -> Link | None:
    """From an axis of the one input of a view to one of its result, or `backward`."""
    (x,) = node.inputs
    old, new = (axis, number)[:: -1 if backward else 1]
    source, target = (node.shape, x.shape) if backward else (x.shape, node.shape)
    if reshape.made(node):
        return _through_reshape(source, target, axis, number)
    if permute.made(node):
        return _identity(target[number]) if node.attrs["axes"][new] == old else None
    if old != new:
        return None
    if slice_.made(node) and old == node.attrs["axis"] % x.ndim:
        start = -node.attrs["start"] if backward else node.attrs["start"]
        places = np.arange(int(target[number])) + start
        outside = (places < 0) | (places >= int(source[axis]))
        return Link(np.where(outside, -1, places)[:, None])
    repeated = broadcast.made(node) and int(x.shape[old]) != int(node.shape[new])
    return None if repeated else _identity(target[number])


def _identity(n: int) -> Link:
    return Link(np.arange(int(n))[:, None])


def _through_reshape(source: Shape, target: Shape, axis: int, number: int) -> Link | None:
    """Axes go together in the smallest groups with as many elements on both sides."""
    for group, other in _groups(source, target):
        if axis in group and number in other:
            sizes, wanted = ([int(s[i]) for i in g] for s, g in ((source, group), (target, other)))
            index = np.indices(sizes)[group.index(axis)].reshape(wanted)
            index = np.moveaxis(index, other.index(number), 0)
            return Link(index.reshape(wanted[other.index(number)], -1))
    return None


def _groups(source: Shape, target: Shape) -> Iterator[tuple[list[int], list[int]]]:
    a, b, group, other, left, right = 0, 0, list[int](), list[int](), 1, 1
    while a < len(source) or b < len(target):
        from_source = not group or (bool(other) and left < right)
        if (from_source and a < len(source)) or b == len(target):
            group.append(a)
            left, a = left * int(source[a]), a + 1
        else:
            other.append(b)
            right, b = right * int(target[b]), b + 1
        if left == right and group and other:
            yield group, other
            group, other, left, right = [], [], 1, 1
