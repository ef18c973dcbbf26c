"""A node run in parts: what the rules of ops/axes.py promise, done with numpy and compared."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from runtime import ops
from runtime.ops import axes
from runtime.ops.kv_formats import KV_FORMATS
from runtime.ops.registry import OPS, Case, Op
from runtime.ops.splits import (
    MIRRORED,
    PARTIAL,
    Split,
    State,
    cut_array,
    join_arrays,
    local_shape,
    split_of,
)
from runtime.ops.tensor import Tensor

DEVICES = 3
Values = list[np.ndarray]


class Unsound(AssertionError):  # noqa: N818  as Unsplittable is
    """Devices that did what the rules allow have something else than parts of the whole."""


class Probe:
    """A case of an op: its node, the numbers of its inputs, and what they give undivided."""

    def __init__(self, op: Op, case: Case, rng: np.random.Generator) -> None:
        self.rng, self.op, leaves = rng, op, []
        self.values: Values = []
        for i, arg in enumerate(case.arguments()):
            value = (arg.make or (lambda r, s: r.standard_normal(s)))(rng, arg.shape)
            self.values.append(np.array(value, float) if value.dtype.kind == "f" else value)
            if arg.leaf in ("state", "slots"):
                leaves.append(ops.state(f"x{i}", arg.shape, arg.dtype, arg.leaf))
            elif arg.leaf == "weight":
                leaves.append(ops.weight(f"x{i}", arg.shape, arg.dtype))
            else:
                leaves.append(ops.step_input(f"x{i}", arg.shape, arg.dtype))
        self.node = op(*leaves, **case.attrs)
        self.after = [value.copy() for value in self.values]
        self.whole = op.reference(*self.after, **case.attrs)

    def check(self, states: Sequence[State]) -> State:
        """What the inputs in these states give; Unsplittable, or Unsound."""
        out = axes.result(self.node, states)
        scattered = [self.scatter(x, s) for x, s in zip(self.values, states, strict=True)]
        parts = []
        for device in range(DEVICES):
            inputs = [each[device] for each in scattered]
            parts.append(self.part(inputs, states, out, device))
            for number in self.op.writes:
                wanted = cut_array(self.after[number], states[number], device)
                _need(inputs[number], wanted, f"{self.node} leaves another state")
            if out is not PARTIAL:
                _need(parts[-1], cut_array(self.whole, out, device), f"{self.node} to {out}")
        owned = self.whole.copy()
        if isinstance(out, Split):
            np.moveaxis(owned, out.axis, 0)[out.masks() == 0] = 0
        _need(join_arrays(parts, out), owned, f"{self.node} to {out}, joined")
        return out

    def scatter(self, x: np.ndarray, state: State) -> Values:
        """What each device has; of a partial tensor summands that nobody can guess."""
        if state is not PARTIAL:
            return [cut_array(x, state, device).copy() for device in range(DEVICES)]
        others = [self.rng.integers(-9, 9, x.shape).astype(x.dtype) for _ in range(DEVICES - 1)]
        return [*others, x - sum(others)]

    def part(self, inputs: Values, states: Sequence[State], out: State, device: int) -> np.ndarray:
        """The result on one device, which is not asked where it has nothing to do."""
        if any(isinstance(s, Split) and s.local(device) == 0 for s in states):
            return np.zeros(
                [int(n) for n in local_shape(self.node.shape, out, device)], self.whole.dtype
            )
        attrs = local_attrs(self.node, states, out, device)
        try:
            return self.op.reference(*inputs, **attrs)
        except (ValueError, IndexError, ZeroDivisionError) as error:
            raise Unsound(f"{self.node}: {error}") from error


def local_attrs(node: Tensor, states: Sequence[State], out: State, device: int) -> dict[str, Any]:
    """The attributes that a node has on one device."""
    attrs = dict(node.attrs)
    if "shape" in attrs:
        attrs["shape"] = local_shape(node.shape, out, device)
    first = states[0]
    if node.op == "slice" and isinstance(first, Split) and first.axis == attrs["axis"] % node.ndim:
        has = first.masks() >> device & 1
        attrs |= {key: int(has[: attrs[key]].sum()) for key in ("start", "stop")}
    return attrs


def _need(got: np.ndarray, wanted: np.ndarray, what: str) -> None:
    if got.shape != wanted.shape:
        raise Unsound(f"{what}: {got.shape} for {wanted.shape}")
    if got.size and np.abs(got - wanted).max() > 1e-12 * max(1.0, np.abs(wanted).max()):
        raise Unsound(f"{what}: other numbers")


def ownerships(n: int) -> list[np.ndarray]:
    """Owners of n places, a handful of kinds: see the names."""
    at, bit = np.arange(n), np.left_shift
    even, third = bit(1, at * DEVICES // n), bit(1, at * 3 // n)
    uneven = np.where(at < max(1, n // 3), 1, 4)  # device 1 has nothing
    blocks = bit(1, at // 2 % 2)
    in_turn = bit(1, at % DEVICES)
    one_of_two = np.where(at % max(1, n // 2) < n // 4, 1, 2)  # two periods
    shared = np.where(at * 2 < n, third | 2, third)
    all_of_one = np.full(n, 2)
    nobodys = np.where(at == n - 1, 0, uneven)
    found = (even, uneven, shared, blocks, in_turn, one_of_two, all_of_one, nobodys)
    return [np.asarray(masks, np.int64) for masks in found]


def pool(x: Tensor, kinds: int) -> list[State]:
    """States that a tensor may be in, with splits of the first so many kinds of ownership."""
    return [
        MIRRORED,
        PARTIAL,
        *(s for a, n in enumerate(x.shape) for s in _splits(a, int(n), kinds)),
    ]


@cache
def _splits(axis: int, n: int, kinds: int) -> tuple[Split, ...]:
    return tuple(dict.fromkeys(split_of(axis, masks) for masks in ownerships(n)[:kinds]))


def resized(case: Case, *shapes: tuple[int, ...], **attrs: Any) -> Case:
    """The case with arguments of these shapes; those that are left out keep theirs."""
    args = list(case.arguments())
    for i, shape in enumerate(shapes):
        args[i] = args[i]._replace(shape=shape)
    return Case(tuple(args), {**case.attrs, **attrs}, case.tolerance)


def _attention(heads: int, kv_heads: int, sinks: bool = False, **attrs: Any) -> Case:
    pages = (6, ops.PAGE, kv_heads, 4)
    first = OPS["attention"].cases[-1 if sinks else 0]
    step = ((2, 3), (3,), (3,), *([(heads,)] if sinks else []))
    case = resized(first, (3, heads, 4), pages, (*pages[:3], 6), *step, **attrs)
    plain = [
        a._replace(dtype=KV_FORMATS["f32"].dtype) if a.leaf == "state" else a for a in case.args
    ]
    return Case(tuple(plain), case.attrs)


def _delta(key_heads: int, ratio: int, order: str) -> Case:
    key, heads = (9, key_heads, 4), key_heads * ratio
    first = OPS["gated_delta"].cases[0]
    values = ((9, heads, 6), (9, heads), (9, heads), (4, heads, 4, 6))
    return resized(first, key, key, *values, order=order)


def _more() -> dict[str, list[Case]]:
    """Shapes in which heads, groups and blocks matter, beside the cases of the ops."""
    first = {name: op.cases[0] for name, op in OPS.items()}
    ratios = [(4, 4), (6, 6), (8, 4), (12, 6), (9, 3), (12, 4), (14, 2), (28, 4), (7, 1)]
    return {
        "attention": [
            *(_attention(*heads) for heads in ratios),
            _attention(8, 4, sinks=True), _attention(6, 2, sinks=True, window=9),
            _attention(12, 4, window=20, softcap=9.0),
        ],
        "gated_delta": [
            _delta(keys, ratio, order)
            for keys, ratio in ((4, 1), (4, 2), (3, 3), (2, 6))
            for order in ("grouped", "tiled")
        ],
        "short_conv": [resized(first["short_conv"], (9, 12), (12, 4), (4, 3, 12))],
        "kv_write": [resized(first["kv_write"], (5, h, 32), (4, ops.PAGE, h, 32)) for h in (1, 6)],
        "matmul": [
            resized(first["matmul"], (4, 12), (12, 12)),
            resized(first["matmul"], (2, 3, 6), (6, 6)),
        ],
        "matmul_id": [resized(OPS["matmul_id"].cases[2], (6, 2, 8), (4, 6, 8))],
        "reshape": [
            resized(first["reshape"], a, shape=b)
            for a, b in (
                ((3, 24), (3, 6, 4)), ((3, 6, 4), (3, 24)), ((3, 6, 4), (18, 4)),
                ((18, 4), (3, 6, 4)), ((3, 12, 4), (3, 4, 3, 4)), ((12, 4), (3, 16)),
                ((3, 1, 12), (3, 12)), ((4, 6), (6, 4)), ((2, 12), (2, 2, 3, 2)),
            )
        ],
        "slice": [
            resized(first["slice"], (3, 12), axis=-1, start=a, stop=b)
            for a, b in ((0, 12), (0, 6), (5, 6), (4, 11))
        ],
        "permute": [resized(first["permute"], (4, 6, 3), axes=(2, 0, 1))],
        "broadcast": [resized(first["broadcast"], (6, 1, 2), shape=(6, 4, 2))],
        "add": [resized(first["add"], (4, 6, 3), (4, 6, 3)), resized(first["add"], (3, 3), (3,))],
        "row_scale": [resized(first["row_scale"], (4, 6, 3), (4, 6, 1))],
        "rms_norm": [resized(first["rms_norm"], (6, 6), (6,))],
        "rope": [resized(first["rope"], (6, 6, 8), (6, 4, 2))],
        "expert_sum": [resized(first["expert_sum"], (6, 6, 6), (6, 6))],
        "take": [resized(first["take"], (6, 8), (6, 3))],
    }  # fmt: skip


MORE = _more()


def cases(name: str) -> list[Case]:
    """All cases of an op that splits are tried on."""
    return [*OPS[name].cases, *MORE.get(name, ())]
