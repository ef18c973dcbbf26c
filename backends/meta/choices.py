"""Devices as llama.cpp's users choose them: a list, a split mode, shares and a main device."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

from runtime.backends.meta.expression import Device, Group, Node, Several, parse, share, times
from runtime.backends.meta.stages import Counts, Stage, one, spread, stages
from runtime.ops.errors import OptionError, shown

SPLIT_MODES = {"none": "", "layer": "layers", "tensor": "tensor"}

Shares = str | Sequence[float]

_ONE = "nothing to split over one device; name several, such as devices='cpu:0,cpu:1'"
_MOST_SHARE = 10**18


def chosen(
    devices: str, split_mode: str | None = None, tensor_split: Shares | None = None,
    main_device: int | None = None, counts: Counts = one,
) -> tuple[Stage, ...]:  # fmt: skip
    """The stages that these options ask for.

    devices: an expression. split_mode: of a bare list of devices, "layer" (the default) or
    "tensor", or "none": `main_device` of the list alone, by default its first. tensor_split: a
    share for each device, or member of the outermost group, as "3,1" or numbers. counts: see
    `stages`. OptionError, naming the option, for what does not go together.
    """
    named = parse(devices)
    _check_lone(devices, named)
    tree = spread(named, counts)
    mode = None if split_mode is None else _mode(split_mode)
    if mode is not None and isinstance(tree, Group) and tree.kind:
        raise OptionError(
            f"split_mode={split_mode!r} is for a list of devices, and devices={shown(devices)} is "
            f"split by {tree.kind}(...) already: leave one of them out"
        )
    _check_twice(devices, tree, mode)
    if mode == "tensor" and isinstance(tree, Device):
        raise OptionError(f"split_mode='tensor': {_ONE}")
    if tensor_split is not None:
        if mode == "":
            raise OptionError("tensor_split: with split_mode='none' one device has everything")
        tree = _shared(tree, tensor_split)
    if main_device is not None or mode == "":
        tree = _main(tree, mode, main_device or 0)
    elif mode is not None and isinstance(tree, Group):
        tree = replace(tree, kind=mode)
    return stages(tree)


def _check_lone(devices: str, node: Node) -> None:
    """OptionError for a share of the work where one device has all of it: a count is meant."""
    if not isinstance(node, Group):
        return
    for own, member in node.members:
        _check_lone(devices, member)
        if len(node.members) > 1 or own in (0, 1) or isinstance(member, Group):
            continue
        if isinstance(member, Several):
            instead = f"{member.kind}:N is N devices"
        else:
            plain = _unnumbered(member)
            several = f"tensor({plain},{plain}{',...' * (own != 2)})"
            instead = f"write {plain} {times(own, '')[:-1]} times, as {several}"
            instead = instead if own.denominator == 1 else "leave it out"
        raise OptionError(
            f"devices={shown(devices)}: {times(own, '')} is a share of the work, and there is one "
            f"device: {instead}"
        )


def _check_twice(devices: str, node: Node, mode: str | None = None) -> None:
    """OptionError for a device twice among those of a tensor group, or next to itself in layers."""
    if not isinstance(node, Group):
        return
    before: list[tuple[str, int | None, int | None]] = []
    for _, member in node.members:
        _check_twice(devices, member)
        if not isinstance(member, Device) or (member.number is None and member.kind != "reference"):
            before.append(("", None, None))
            continue
        this = member.kind, member.number, member.of
        if member.kind == "cuda" and member.nbytes is None:
            before.append(this)  # of one GPU there may be several virtual devices
        elif this in (before if "tensor" in (node.kind, mode) else before[-1:]):
            plain = _unnumbered(member)
            hint = f"for two devices write {plain},{plain}"
            raise OptionError(
                f"devices={shown(devices)}: {member} stands twice in one group: "
                + (hint if member.kind in ("cpu", "cuda") else "leave one out")
            )
        else:
            before.append(this)


def _unnumbered(device: Device) -> Device:
    return replace(device, number=None, of=None)


def _mode(split_mode: str) -> str:
    if split_mode == "row":
        raise OptionError(
            "split_mode='row' is part of 'tensor' here, which splits each matrix by rows or by "
            "columns, whichever moves less between the devices: give 'tensor'"
        )
    if split_mode not in SPLIT_MODES:
        raise OptionError(f"split_mode={split_mode!r} must be one of {', '.join(SPLIT_MODES)}")
    return SPLIT_MODES[split_mode]


def _shared(tree: Node, tensor_split: Shares) -> Group:
    """The outermost group with these shares."""
    shares = _shares(tensor_split)
    if not isinstance(tree, Group) or len(tree.members) == 1:
        raise OptionError(f"tensor_split={shown(tensor_split)}: {_ONE}")
    nodes = [node for _, node in tree.members]
    if len(shares) != len(nodes):
        raise OptionError(
            f"tensor_split={shown(tensor_split)} has {len(shares)} shares for {len(nodes)} "
            f"devices: give one for each of {shown(','.join(map(str, nodes)))}"
        )
    if any(own != 1 for own, _ in tree.members):
        raise OptionError(
            f"tensor_split={shown(tensor_split)}: devices={shown(str(tree))} has shares of its "
            "own; give them in one place"
        )
    if not any(shares):
        raise OptionError(
            f"tensor_split={shown(tensor_split)}: every share is 0, and one must not be"
        )
    return replace(tree, members=tuple(zip(shares, nodes, strict=True)))


def _shares(tensor_split: Shares) -> list[Fraction]:
    parts: Sequence[object] = tensor_split
    if isinstance(tensor_split, str):
        parts = [part.strip() for part in re.split("[,/:;]", tensor_split)]
    try:
        found = [share(part) for part in parts]
    except ValueError as error:
        raise OptionError(f"tensor_split={shown(tensor_split)}: {error}") from None
    if max(found, default=0) > _MOST_SHARE:
        raise OptionError(f"tensor_split={shown(tensor_split)}: a share is at most 10**18")
    return found


def _main(tree: Node, mode: str | None, number: int) -> Node:
    """The one device of a list that is to run alone."""
    nodes = [node for _, node in tree.members] if isinstance(tree, Group) else [tree]
    if mode != "" and len(nodes) > 1:
        raise OptionError(
            f"main_device={number} is for split_mode='none', where one device has everything: "
            "leave it out, or give that mode"
        )
    if number >= len(nodes):
        raise OptionError(
            f"main_device={number}: the list has {len(nodes)} device{'s' * (len(nodes) != 1)}, "
            "the first of which is 0"
        )
    return nodes[number]
