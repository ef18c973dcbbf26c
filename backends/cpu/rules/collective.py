"""Lowering of ops/collective.py: parts are computed where all devices read them, never moved."""

from __future__ import annotations

import math
from typing import Any

from runtime.backends.cpu.rules.registry import lowers
from runtime.backends.cpu.rules.rows import copy
from runtime.backends.cpu.tile.spec import PIECES, Q_BYTES, SIDE_BYTES, activation_tile_nbytes
from runtime.backends.plan.lowering import Declined, Lowering, Out
from runtime.backends.plan.plan import Buffer, Ref
from runtime.ops import collective, views  # noqa: F401  declares the ops
from runtime.ops.tensor import Dim, Tensor

ONCE_NBYTES = 1 << 19  # sums of which a device would read more of others are added up once


@lowers("all_sum")
def all_sum(lowering: Lowering, node: Tensor) -> None:
    """The parts, and what every device adds to them, in one call."""
    inputs, number = list(node.inputs), node.attrs["number"]
    more = lowering.read(inputs.pop()) if node.attrs.get("residual") else 0
    part = _part(lowering, inputs[0], number) if inputs else 0
    once = node.nbytes * (node.attrs["devices"] - 1) > ONCE_NBYTES
    member = {"member": lowering.joint("member", "member")} if once else {}
    arguments: dict[str, Any] = {"meeting": _meeting(lowering), **member}
    lowering.emit(
        "all_sum_once" if once else "all_sum", node, x=part,
        parts=lowering.joint("parts", f"parts {number}"), n_parts=len(node.attrs["holders"]),
        more=more, out=_whole(lowering, node, node.nbytes) if once else lowering.write(node),
        live=lowering.live(node), n=node.size // int(node.shape[0] if node.ndim else 1),
        **arguments,
    )  # fmt: skip


@lowers("all_gather")
def all_gather(lowering: Lowering, node: Tensor) -> None:
    """Each device puts its stretches where all read them; then they meet."""
    if node.attrs["axis"] == 0 and isinstance(node.shape[0], Dim):
        raise Declined(f"rows of {node!r} lie on several devices")
    out = _written(lowering, node) if "start" in node.attrs else _put(lowering, node)
    lowering.emit("meet", node, x=Out(out.ref, also_read=True), meeting=_meeting(lowering))


def _written(lowering: Lowering, node: Tensor) -> Out:
    """The product before it writes its rows where all read them."""
    buffer = lowering.result(node.inputs[0])
    call = next(call for call in reversed(lowering.calls) if buffer in call.writes)
    buffer.memory, buffer.key = "whole", f"whole {node.attrs['number']}"
    buffer.nbytes, buffer.tensor = node.nbytes, node
    call.arguments |= {"out": Ref(buffer, 4 * node.attrs["start"]), "out_stride": node.shape[-1]}
    call.own -= {buffer}
    lowering.alias(node, buffer)
    return Out(Ref(buffer))


def _put(lowering: Lowering, node: Tensor) -> Out:
    """This device's stretches copied; of packed rows each plane of a tile."""
    axis, runs, repeat, device = (node.attrs[k] for k in ("axis", "runs", "repeat", "device"))
    period, held = (
        sum(n for owners, n in runs if own is None or own in owners) for own in (None, device)
    )
    tile, unit = node.attrs.get("C", 1), 1 if node.attrs.get("coding", "f32") == "f32" else 32
    planes, out_row = _planes(node, repeat * period)
    own_planes, x_row = _planes(node, repeat * held)
    rows = math.prod(map(int, node.shape[1:axis]))
    whole = _whole(lowering, node, 4 * out_row * -(-rows * int(node.shape[0]) // tile))
    live = lowering.live(node, rows) if axis else lowering.count("=1")
    at, own = 0, 0  # of a stretch in the whole's period, and in this device's
    for owners, n in runs:
        for (to, each), (start, _) in zip(planes, own_planes, strict=True):
            if owners[0] != device:
                continue
            x = _packed_or_read(lowering, node)
            lowering.emit(
                "put_stretch", node, x=Ref(x.buffer, x.offset + 4 * (start + own // unit * each)),
                out=Out(Ref(whole.ref.buffer, 4 * (to + at // unit * each))), live=live, each=tile,
                repeat=repeat, n=n // unit * each, x_row=x_row, x_step=held // unit * each,
                out_row=out_row, out_step=period // unit * each,
            )  # fmt: skip
        at, own = at + n, own + (n if device in owners else 0)
    return whole


def _planes(node: Tensor, n: int) -> tuple[list[tuple[int, int]], int]:
    """Of n indices of a row, or tile: (where it begins, of each unit) of each plane; all floats."""
    coding, tile = node.attrs.get("coding"), node.attrs.get("C", 1)
    if coding is None:
        inner = math.prod(map(int, node.shape[node.attrs["axis"] + 1 :]))
        return [(0, inner)], n * inner
    row = activation_tile_nbytes(tile, coding, n) // 4
    if coding != "int8":
        return [(0, (16 * PIECES if coding == "split" else 1) * tile)], row
    q, side = Q_BYTES // 4 * tile, SIDE_BYTES // 4 * tile
    return [(0, q), (n // 32 * q, side)], row


def _packed_or_read(lowering: Lowering, node: Tensor) -> Ref:
    (x,) = node.inputs
    if "coding" in node.attrs:
        return Ref(lowering.result(x))
    return lowering.read(_contiguous(lowering, x))


def _meeting(lowering: Lowering) -> Out:
    return Out(lowering.joint("meeting", "meeting"), also_read=True)


def _whole(lowering: Lowering, node: Tensor, nbytes: int) -> Out:
    """A result that all devices have in common."""
    buffer = Buffer("whole", f"whole {node.attrs['number']}", nbytes, tensor=node)
    lowering.alias(node, buffer)
    return Out(Ref(buffer))


def _part(lowering: Lowering, x: Tensor, number: int) -> Ref:
    """Where x lies, which from now on is memory that all devices read; of a leaf, a copy's."""
    made = lowering.results.get(x.base)
    if made is None or made.memory != "arena" or not x.layout.is_contiguous(x.shape):
        x = _copied(lowering, x)
    buffer = lowering.result(x.base)
    buffer.memory, buffer.key = "part", f"part {number}"
    return lowering.read(x)


def _contiguous(lowering: Lowering, x: Tensor) -> Tensor:
    return x if x.layout.is_contiguous(x.shape) else _copied(lowering, x)


def _copied(lowering: Lowering, x: Tensor) -> Tensor:
    node = views.copy(x)
    copy(lowering, node)
    return node
