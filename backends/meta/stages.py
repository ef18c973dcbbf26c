"""What a device expression comes to: stages of layers, each a flat list of devices.

A group is one device to the group around it, so shares multiply. tensor in tensor and layers in
layers flatten; tensor(layers(a,b),layers(c,d)) is layers(tensor(a,c),tensor(b,d)), with a stage
between any two places where a device of either begins or ends.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import count, pairwise
from math import gcd, lcm

from runtime.backends.meta.expression import Device, Group, Node, Several, times
from runtime.ops.errors import OptionError, shown

MOST_DEVICES = 32


@dataclass(frozen=True)
class Stage:
    """A share of the layers, and the devices that work on them, with their shares of each tensor.

    The shares of all stages add up to 1, and so do those of a stage's devices; none is 0.
    """

    share: Fraction
    devices: tuple[Device, ...]
    shares: tuple[Fraction, ...]

    def __str__(self) -> str:
        if len(self.devices) == 1:
            return str(self.devices[0])
        return f"tensor({','.join(map(times, _whole(self.shares), self.devices))})"


def text(found: Sequence[Stage]) -> str:
    """Stages as an expression, of the same stages."""
    if len(found) == 1:
        return str(found[0])
    return f"layers({','.join(map(times, _whole([s.share for s in found]), found))})"


Counts = Callable[[str], int]  # devices that a machine has, of a kind


def one(kind: str) -> int:
    """Of a machine that is one device, whatever its kind."""
    return 1


def stages(node: Node, counts: Counts = one) -> tuple[Stage, ...]:
    """The stages of a tree; a bare list is split by layer.

    What has no share is left out. A device named more than once in a stage has the sum of its
    shares, but in one group a GPU stands for a virtual device each time; neighbouring stages of
    the same devices are one. Devices without a number are each one of their own. counts: how many
    `numa` and `mpi` stand for.
    OptionError where nothing has a share, or for more than MOST_DEVICES devices.
    """
    tree = _kept(spread(node, counts))
    if tree is None:
        raise OptionError(f"devices={shown(str(node))}: every share is 0, and one must not be")
    devices = list(_devices(tree))
    if len(devices) > MOST_DEVICES:
        raise OptionError(
            f"devices={shown(str(node))}: {len(devices)} devices, and {MOST_DEVICES} is the most"
        )
    numbered = _numbered(devices)
    found: list[Stage] = []
    for share, mix in _mixes(_apart(_replaced(tree, lambda: next(numbered)))):
        if found and dict(zip(found[-1].devices, found[-1].shares, strict=True)) == mix:
            found[-1] = replace(found[-1], share=found[-1].share + share)
        else:
            found.append(Stage(share, tuple(mix), tuple(mix.values())))
    return tuple(found)


def spread(node: Node, counts: Counts = one) -> Node:
    """The tree with the devices that `numa`, `mpi` and `null:N` stand for, each with their share.

    counts: how many `numa` and `mpi` stand for.
    """
    if isinstance(node, Several):
        return Group("", tuple((Fraction(1), device) for device in _each(node, counts)))
    if isinstance(node, Device):
        return node
    members: list[tuple[Fraction, Node]] = []
    for share, member in node.members:
        if isinstance(member, Several):
            members += [(share, device) for device in _each(member, counts)]
        else:
            members.append((share, spread(member, counts)))
    return Group(node.kind, tuple(members))


def _each(node: Several, counts: Counts) -> list[Device]:
    n = counts(node.kind) if node.count is None else node.count
    return [Device(node.kind, i, n) for i in range(n)]


_Mix = dict[Device, Fraction]  # shares of each tensor, in the expression's order


def _mixes(node: Node) -> list[tuple[Fraction, _Mix]]:
    """(share of the layers, shares of their tensors) from the first layer on."""
    if not isinstance(node, Group):
        assert isinstance(node, Device), "others are spread before"
        return [(Fraction(1), {node: Fraction(1)})]
    total = sum(share for share, _ in node.members)
    inner = [(share / total, _mixes(member)) for share, member in node.members]
    if node.kind != "tensor":
        return [(share * part, mix) for share, mixes in inner for part, mix in mixes]
    until = [(share, list(_until(mixes))) for share, mixes in inner]
    ends = sorted({end for _, mixes in until for end, _ in mixes})
    found = []
    for start, end in pairwise([Fraction(0), *ends]):
        mix: _Mix = {}
        for share, mixes in until:
            for device, part in next(m for stop, m in mixes if stop >= end).items():
                mix[device] = mix.get(device, Fraction(0)) + share * part
        found.append((end - start, mix))
    return found


def _until(mixes: Sequence[tuple[Fraction, _Mix]]) -> Iterator[tuple[Fraction, _Mix]]:
    """With the place where each ends, of all layers, in place of its share."""
    end = Fraction(0)
    for share, mix in mixes:
        end += share
        yield end, mix


def _kept(node: Node) -> Node | None:
    """The tree without members that have no share; None where nothing is left."""
    if not isinstance(node, Group):
        return node
    members = [(share, kept) for share, m in node.members if share and (kept := _kept(m))]
    return Group(node.kind, tuple(members)) if members else None


def _devices(node: Node) -> Iterator[Device]:
    if isinstance(node, Group):
        for _, member in node.members:
            yield from _devices(member)
    elif isinstance(node, Device):
        yield node


def _replaced(node: Node, device: Callable[[], Device]) -> Node:
    """The tree with other devices, in their order."""
    if not isinstance(node, Group):
        return device()
    return replace(node, members=tuple((s, _replaced(m, device)) for s, m in node.members))


def _apart(node: Node) -> Node:
    """The tree with a GPU that stands in a group several times as so many virtual devices."""
    if not isinstance(node, Group):
        return node
    seen: Counter[Device] = Counter()
    members: list[tuple[Fraction, Node]] = []
    for share, member in node.members:
        if isinstance(member, Device) and member.kind == "cuda" and member.nbytes is None:
            seen[member] += 1
            members.append((share, replace(member, copy=seen[member] - 1)))
        else:
            members.append((share, _apart(member)))
    return replace(node, members=tuple(members))


def _numbered(devices: Sequence[Device]) -> Iterator[Device]:
    """Where there are several of a kind, those without a number get the lowest free ones."""
    kinds = Counter(device.kind for device in devices)
    unnamed = Counter(device.kind for device in devices if device.number is None)
    taken = {(device.kind, device.number) for device in devices}
    free = {kind: _free(kind, taken) for kind in kinds}
    for device in devices:
        if device.number is not None or kinds[device.kind] == 1 or device.kind == "reference":
            yield device
        else:
            of = unnamed[device.kind] if device.kind == "null" else None
            yield replace(device, number=next(free[device.kind]), of=of)


def _free(kind: str, taken: Container[tuple[str, int | None]]) -> Iterator[int]:
    return (n for n in count() if kind == "null" or (kind, n) not in taken)


def _whole(shares: Sequence[Fraction]) -> list[Fraction]:
    """The same ratios in the smallest whole numbers."""
    factor = lcm(*(share.denominator for share in shares))
    whole = [int(share * factor) for share in shares]
    return [Fraction(n, gcd(*whole)) for n in whole]
