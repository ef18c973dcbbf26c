"""Lowering of ops/collective.py: parts are computed where all devices read them, never moved."""

from __future__ import annotations

import math
from typing import Any

from runtime.backends.cpu.rules.registry import lowers
from runtime.backends.cpu.rules.rows import copy
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
        more=more, out=_whole(lowering, node) if once else lowering.write(node),
        live=lowering.live(node), n=node.size // int(node.shape[0] if node.ndim else 1),
        **arguments,
    )  # fmt: skip


@lowers("all_gather")
def all_gather(lowering: Lowering, node: Tensor) -> None:
    """Each device puts its stretches where all read them; then they meet."""
    axis, repeat, device = (node.attrs[name] for name in ("axis", "repeat", "device"))
    out = _whole(lowering, node)
    if axis == 0 and isinstance(node.shape[0], Dim):
        raise Declined(f"rows of {node!r} lie on several devices")
    inner = math.prod(map(int, node.shape[axis + 1 :]))
    rows = math.prod(map(int, node.shape[1:axis]))
    live = lowering.live(node, rows) if axis else lowering.count("=1")
    at, own = 0, 0  # of a stretch in the whole's period, and in this device's
    period = sum(n for _, n in node.attrs["runs"])
    held = sum(n for owners, n in node.attrs["runs"] if device in owners)
    for owners, n in node.attrs["runs"]:
        if owners[0] == device:
            x, whole = lowering.read(_contiguous(lowering, node.inputs[0])), out.ref
            lowering.emit(
                "put_stretch", node, x=Ref(x.buffer, x.offset + 4 * own * inner),
                out=Out(Ref(whole.buffer, whole.offset + 4 * at * inner)), live=live,
                repeat=repeat, n=n * inner, x_row=repeat * held * inner, x_step=held * inner,
                out_row=repeat * period * inner, out_step=period * inner,
            )  # fmt: skip
        at, own = at + n, own + (n if device in owners else 0)
    lowering.emit("meet", node, x=Out(out.ref, also_read=True), meeting=_meeting(lowering))


def _meeting(lowering: Lowering) -> Out:
    return Out(lowering.joint("meeting", "meeting"), also_read=True)


def _whole(lowering: Lowering, node: Tensor) -> Out:
    """A result that all devices have in common."""
    buffer = Buffer("whole", f"whole {node.attrs['number']}", node.nbytes, tensor=node)
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
