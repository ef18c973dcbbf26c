"""Norms that the launch which makes their row does at its end; see kernels/norm_tail.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from runtime.backends.cuda.kernels.norm_tail import FLOATS, NAMES, PACKED
from runtime.backends.cuda.layouts import column_nbytes, cut
from runtime.backends.plan.lowering import Lowering
from runtime.backends.plan.plan import Call, Ref
from runtime.ops.tensor import Tensor

NONE: dict[str, Any] = dict.fromkeys(NAMES, 0)  # arguments of a launch without a norm


def norm_behind(lowering: Lowering, node: Tensor) -> bool:
    """Whether the norm of one row, for products, was given to the launch that makes the row.

    One launch can make both codings of a norm.
    """
    x, w = node.inputs
    n, coding = int(x.shape[-1]), FLOATS if node.attrs["coding"] == "f32" else PACKED
    call = _maker(lowering, x)
    if call is None or n % 8:
        return False
    same: dict[str, Any] = {
        "norm_x": Ref(lowering.result(x.layout.base)), "norm_w": lowering.weight(w, "vector"),
        "norm_n": n, "norm_eps": node.attrs["eps"],
    }  # fmt: skip
    done: Any = call.arguments["norm_to"]
    if done & coding or (done and any(call.arguments[k] != value for k, value in same.items())):
        return False
    tickets = call.arguments["tickets"] if done else lowering.tickets(node).ref
    made: dict[str, Any] = same | {"tickets": tickets, "norm_to": done | coding}
    if coding == FLOATS:
        made["normed"] = lowering.write(node, column_nbytes(n, "f32")).ref
    else:
        found = cut(n)
        made["norm_packed"] = lowering.write(node, column_nbytes(n)).ref
        made |= {"norm_stretches": found.stretches, "norm_length": found.length}
    _grow(lowering, call, made)
    return True


def _maker(lowering: Lowering, x: Tensor) -> Call | None:
    """The one call that makes x, a row that is all of a result, if it can end with a norm."""
    base = x.layout.base
    if base.size != int(x.shape[-1]) or not x.layout.is_contiguous(x.shape):
        return None
    buffer = lowering.results.get(base)
    calls = [call for call in lowering.calls if buffer in call.writes]
    able = len(calls) == 1 and "norm_to" in calls[0].arguments
    if not able:
        return None
    out = calls[0].arguments.get("out") or calls[0].arguments.get("out0")
    return calls[0] if out == Ref(calls[0].writes[0]) else None


def _grow(lowering: Lowering, call: Call, made: dict[str, Any]) -> None:
    """The call with other arguments, in its place."""
    written = [made[name].buffer for name in ("normed", "norm_packed", "tickets") if name in made]
    read = [made[name].buffer for name in ("norm_x", "norm_w", "tickets")]
    grown = replace(
        call, arguments=call.arguments | made, reads=tuple(dict.fromkeys((*call.reads, *read))),
        writes=tuple(dict.fromkeys((*call.writes, *written))),
    )  # fmt: skip
    lowering.calls[lowering.calls.index(call)] = grown
