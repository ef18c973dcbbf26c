"""Launches of matrix-vector products, and those of one x joined: several weights, gate and up.

A plan's calls are looked through before it is scheduled. Products of one packed x with weights of
one format become one launch; where gate and up feed nothing but SwiGLU, the launch ends with that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Sequence
from dataclasses import replace
from typing import Any

from runtime.backends.cuda.kernels import matvec, matvec_float, matvec_half
from runtime.backends.cuda.kernels.matvec_ends import (
    GATED,
    MOST,
    PACKED,
    RESIDUAL,
    rows_of_block,
    turns_of,
)
from runtime.backends.cuda.kernels.norm_tail import NAMES
from runtime.backends.cuda.layouts import (
    BLOCK,
    FLOATS,
    PIECE,
    UNIT,
    cut,
    float_lanes,
    parts,
)
from runtime.backends.cuda.widths import columns_of
from runtime.backends.plan.kernel import Kernel
from runtime.backends.plan.plan import Buffer, Call, Ref

_NEVER = (1 << 32) - 1  # a block that no launch has
_PLAIN = {"alpha": 1.0, "limit": float("inf"), "plus": 0.0}
_KERNELS = ("matvec", "matvec_float", "matvec_half")
_ALIKE = ("x", "live", "n_columns", "row_pieces", "shift", "stretches", "pairs", "units")


def kernel_of(format: str, columns: int) -> tuple[str, dict[str, Any]]:
    """Name and constants of the kernel for a format and so many columns."""
    if format == "F32":
        return "matvec_float", {"columns": columns_of(columns)}
    if format in FLOATS:
        return "matvec_half", {"format": format, "gated": False}
    return "matvec", {"format": format, "columns": columns_of(columns, format)}


def arguments_of(format: str, rows: int, inner: int, columns: int) -> dict[str, Any]:
    """Of a product of one weight with so many columns; addresses and sums are still to come."""
    common = {
        **{f"{name}{i}": 0 for name in ("w", "b", "out", "n") for i in range(MOST)},
        **{f"first{i}": _NEVER for i in range(1, MOST)},
        "n0": rows, "residual": 0, "residual_stride": 0, "sums": 0, "gate": 0, "turns": 1,
        "n_columns": columns, **_PLAIN, **dict.fromkeys(NAMES, 0),
    }  # fmt: skip
    if format in FLOATS:
        return common | float_arguments(format, inner)
    rest = {"packed": 0, "out_stretches": 0, "out_length": 0}
    return common | row_arguments(format, inner) | rest


def float_arguments(format: str, inner: int) -> dict[str, int]:
    """Of rows of floats, and by how many lanes or, of halves, warps they are shared."""
    shared = float_lanes(inner) if format == "F32" else matvec_half.warps_of(inner)
    return {
        "row_pieces": parts(format, inner)[""] // PIECE, "units": -(-inner // UNIT),
        "shift": shared.bit_length() - 1,
    }  # fmt: skip


def half_rows(shift: int) -> int:
    """Rows of halves that a block of threads takes, or as many of gate and of up."""
    return matvec_half.ROWS * (matvec_half.WARPS >> shift)


def row_arguments(format: str, inner: int) -> dict[str, Any]:
    """Where a packed row's parts are, as kernels take it, and how its sum is cut and shared."""
    found, cuts = parts(format, inner), cut(inner)
    at = {name: found.get(name, 0) // 4 for name in ("high", "scales", "supers")}
    return {
        "row_pieces": found[""] // PIECE, "stretches": cuts.stretches, "pairs": cuts.length // 2,
        "shift": cuts.lanes.bit_length() - 1, **at,
    }  # fmt: skip


def grid_of(kernel: Kernel, arguments: dict[str, Any]) -> tuple[int, int]:
    """Blocks of threads for all weights of a launch, and turns of 8 columns."""
    gated = bool(arguments["gate"])
    if kernel.name == "matvec_half":
        each = half_rows(arguments["shift"])
    else:
        each = rows_of_block(_rows(kernel), 1 << arguments["shift"], gated)
    rows = [arguments[f"n{i}"] for i in range(1 if gated else MOST)]
    if arguments["gate"] & PACKED:
        rows = [BLOCK * cut(rows[0]).places]
    return sum(-(-n // each) for n in rows), -(-arguments["n_columns"] // 8)


def _rows(kernel: Kernel) -> int:
    constants = dict(kernel.constants)
    if kernel.name == "matvec":
        return matvec.rows_of(constants["format"], constants["columns"])
    return matvec_float.rows_of(constants["columns"])


def join(calls: Sequence[Call], kept: Collection[Buffer]) -> list[Call]:
    """The calls with products joined; `kept`: buffers that are read after all of them."""
    return _join_weights(_join_gates(list(calls), kept))


def _join_gates(calls: list[Call], kept: Collection[Buffer]) -> list[Call]:
    readers = Counter(buffer for call in calls for buffer in call.reads)
    makers = {call.writes[0]: call for call in calls if _is_product(call)}
    gone: set[int] = set()
    found = list(calls)
    for at, call in enumerate(calls):
        if call.kernel.name != "swiglu":
            continue
        sides = [call.arguments[name] for name in ("gate", "up")]
        products = [makers.get(side.buffer) for side in sides if isinstance(side, Ref)]
        alone = [s for s in sides if isinstance(s, Ref) and s.offset == 0 and s.buffer not in kept]
        if len(alone) < 2 or None in products or products[0] is products[1]:
            continue
        gate, up = (p for p in products if p is not None)
        alike = _key(gate) == _key(up) and gate.arguments["n0"] == up.arguments["n0"]
        once = all(readers[p.writes[0]] == 1 for p in (gate, up))
        whole = all(
            4 * call.arguments[name] == gate.arguments["n0"]
            for name in ("pieces", "gate_stride", "up_stride")
        )
        if alike and once and whole:
            found[at] = _gated(gate, up, call)
            gone |= {id(gate), id(up)}
    return [call for call in found if id(call) not in gone]


def _gated(gate: Call, up: Call, end: Call) -> Call:
    """One launch of two products and the SwiGLU of both."""
    constants, given = dict(end.kernel.constants), end.arguments
    arguments = {
        **gate.arguments, "w1": up.arguments["w0"], "b1": up.arguments["b0"], "out0": given["out"],
        "n1": gate.arguments["n0"], "gate": GATED,
        "sums": _number(gate, "sums") | _number(up, "sums") << 1,
    }  # fmt: skip
    kernel = gate.kernel
    if kernel.name == "matvec_half":
        kernel = Kernel.of(kernel.name, **dict(kernel.constants) | {"gated": True})
    else:
        arguments["turns"] = turns_of(_rows(kernel), 1 << _number(gate, "shift"))
    if constants["clamp"]:
        arguments |= {"alpha": given["alpha"], "limit": given["limit"], "plus": 1.0}
    if constants["packed"]:
        arguments |= {
            "gate": GATED | PACKED, "out0": 0, "packed": given["out"],
            "out_stretches": given["stretches"], "out_length": given["length"],
        }  # fmt: skip
    reads = dict.fromkeys((*gate.reads, *up.reads))
    return replace(
        end, kernel=kernel, arguments=arguments, reads=tuple(reads),
        grid=grid_of(kernel, arguments),
    )  # fmt: skip


def _join_weights(calls: list[Call]) -> list[Call]:
    found: list[Call] = []
    places: dict[Hashable, int] = {}
    for call in calls:
        plain = _is_product(call) and not call.arguments["gate"]
        if not plain or _number(call, "sums") & RESIDUAL:
            found.append(call)
            continue
        at = places.get(_key(call))
        if at is None or found[at].arguments[f"n{MOST - 1}"]:
            places[_key(call)] = len(found)
            found.append(call)
        else:
            found[at] = _with(found[at], call)
    return found


def _with(first: Call, other: Call) -> Call:
    """The launch of `first` with one more weight."""
    i = next(i for i in range(1, MOST) if not first.arguments[f"n{i}"])
    arguments = first.arguments | {f"{n}{i}": other.arguments[f"{n}0"] for n in ("w", "b", "out")}
    arguments[f"n{i}"], arguments[f"first{i}"] = other.arguments["n0"], first.grid[0]
    arguments["sums"] = _number(first, "sums") | _number(other, "sums") << i
    return replace(
        first, arguments=arguments, grid=grid_of(first.kernel, arguments),
        reads=tuple(dict.fromkeys((*first.reads, *other.reads))),
        writes=(*first.writes, *other.writes),
    )  # fmt: skip


def _number(call: Call, name: str) -> int:
    value = call.arguments[name]
    assert isinstance(value, int), f"{name} is a number"
    return value


def _is_product(call: Call) -> bool:
    memory = [buffer.memory for buffer in call.writes]
    return call.kernel.name in _KERNELS and memory == ["arena"]


def _key(call: Call) -> Hashable:
    """What products of one launch have in common."""
    return call.kernel, *(call.arguments.get(name) for name in _ALIKE)
