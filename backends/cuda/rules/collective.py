"""Lowering of ops/collective.py: every device reads what the others give, where they computed it.

What a device gives (`Plan.parts`) stays until the last launch of its own that belongs to the
collective; the launches of all devices that do are run behind those that compute the parts.
"""

from __future__ import annotations

import math
from typing import Any

from runtime.backends.cuda.kernels.collective import PARTS, THREADS
from runtime.backends.cuda.rules.registry import lowers
from runtime.backends.plan.lowering import Declined, Lowering, Out
from runtime.backends.plan.plan import Ref
from runtime.ops import collective  # noqa: F401  declares the ops
from runtime.ops.tensor import Dim, Tensor


@lowers("all_sum")
def all_sum(lowering: Lowering, node: Tensor) -> None:
    """The parts of all holders in their order, and a residual on top, on every device alike."""
    if node.size % 4:
        raise Declined(f"{node.size} elements are no multiple of 4")
    inputs = list(node.inputs)
    more = lowering.read(inputs.pop()) if node.attrs.get("residual") else None
    _give(lowering, node, inputs)
    if node.attrs.get("library"):
        _sum_by_nccl(lowering, node, more)
        return
    parts = [_part(lowering, node, holder) for holder in node.attrs["holders"]]
    out = lowering.write(node)
    first, rest = parts[:PARTS], parts[PARTS:]
    while True:
        last = not rest
        names: dict[str, Any] = dict.fromkeys("abcd", 0) | dict(zip("abcd", first, strict=False))
        _meet(
            lowering, node, "sum_parts", **names, out=out, pieces=node.size // 4, count=len(first),
            more=more if last and more else 0, has_more=int(bool(last and more)),
            grid=(-(-node.size // 4 // THREADS),),
        )  # fmt: skip
        if last:
            return
        out = Out(out.ref, also_read=True)
        first, rest = [out.ref, *rest[: PARTS - 1]], rest[PARTS - 1 :]


def _sum_by_nccl(lowering: Lowering, node: Tensor, more: Ref | None) -> None:
    """A call of the library between launches, and a launch for the residual."""
    out = lowering.write(node)
    _meet(lowering, node, "nccl_sum", x=lowering.parts[node.attrs["number"]], out=out)
    lowering.calls[-1].library = "NCCL"
    if more is not None:
        out = Out(out.ref, also_read=True)
        lowering.emit(
            "sum_parts", node, a=out.ref, b=0, c=0, d=0, more=more, out=out,
            pieces=node.size // 4, count=1, has_more=1, grid=(-(-node.size // 4 // THREADS),),
        )  # fmt: skip


@lowers("all_gather")
def all_gather(lowering: Lowering, node: Tensor) -> None:
    """The stretches of all devices, each in its place on every device."""
    axis, runs, repeat = (node.attrs[k] for k in ("axis", "runs", "repeat"))
    if axis == 0 and isinstance(node.shape[0], Dim):
        raise Declined(f"rows of {node!r} lie on several devices")
    if node.dtype.nbytes != 4 or node.dtype.block != 1:
        raise Declined(f"elements of {node!r} are {node.dtype.name}")
    _give(lowering, node, list(node.inputs))
    inner = math.prod(map(int, node.shape[axis + 1 :]))
    rows = math.prod(map(int, node.shape[:axis]))
    held = [sum(n for owners, n in runs if d in owners) for d in range(node.attrs["devices"])]
    period = sum(n for _, n in runs)
    out, starts = lowering.write(node), [0] * len(held)
    at = 0  # in the whole's period; `starts`: in that of each device
    for owners, n in runs:
        owner = owners[0]
        x = _part(lowering, node, owner)
        _meet(
            lowering, node, "put_stretch", x=Ref(x.buffer, x.offset + 4 * starts[owner] * inner),
            out=Out(Ref(out.ref.buffer, 4 * at * inner)), n=n * inner,
            x_row=repeat * held[owner] * inner, x_step=held[owner] * inner,
            out_row=repeat * period * inner, out_step=period * inner,
            grid=(-(-n * inner // THREADS), rows, repeat),
        )  # fmt: skip
        at += n
        for each in owners:
            starts[each] += n


def _give(lowering: Lowering, node: Tensor, inputs: list[Tensor]) -> None:
    """This device's part, if it has one, as something computed whose elements follow each other."""
    for x in inputs:
        made = lowering.results.get(x.base)
        if made is not None and made.memory == "arena" and x.layout.is_contiguous(x.shape):
            own = lowering.read(x)
        else:
            source, n, _, stride = lowering.rows(x)
            out = lowering.room(node, "part", x.nbytes)
            lowering.emit(
                "copy_rows", node, x=source, out=out, n=n, stride=stride, width=n,
                grid=(-(-n // 256), x.size // n),
            )  # fmt: skip
            own = out.ref
        lowering.parts[node.attrs["number"]] = own


def _part(lowering: Lowering, node: Tensor, device: int) -> Ref:
    """What a device gives; see `peer_key`."""
    number = node.attrs["number"]
    if device == node.attrs["device"]:
        return lowering.parts[number]
    return lowering.joint("peer", peer_key(number, device))


def peer_key(number: int, device: int) -> str:
    """The key of the buffer that stands for what another device gives to a collective."""
    return f"part {number} of {device}"


def _meet(lowering: Lowering, node: Tensor, kernel: str, **arguments: Any) -> None:
    """A launch of a collective: `Call.meets`, and what this device gives is there until then."""
    lowering.emit(kernel, node, **arguments)
    call = lowering.calls[-1]
    own = lowering.parts.get(node.attrs["number"])
    meeting = lowering.joint("meeting", "meeting").buffer
    given = () if own is None else (own.buffer,)
    call.reads = tuple(dict.fromkeys((*call.reads, *given, meeting)))
    call.writes = (*call.writes, meeting)
