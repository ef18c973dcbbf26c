"""VALIDATE: every call of a plan against what its op means, from the device's own inputs.

What a call has read (results before it, step inputs, weights, pages and slots as they were) goes
through the numpy meaning of its op in float64; what it has left in memory must be that, but for
the op's own rounding: results, packed activations, ids and tiles exactly, cache and state, of
which nothing else may have changed. A result must also still be what it was whenever it is read.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.backends.meta.layers import LayersProgram
from runtime.backends.passes.fuse_attention import attention_pack
from runtime.backends.passes.fuse_delta import delta_step
from runtime.backends.passes.packing import pack, pack_rows
from runtime.backends.plan.plan import Buffer, Call, Plan
from runtime.backends.reference import compute
from runtime.errors import BackendError
from runtime.ops.attention import attention
from runtime.ops.delta import gated_delta
from runtime.ops.kv_formats import in_groups, kv_format
from runtime.ops.registry import OPS, Kind, kind_of
from runtime.ops.tensor import Tensor

if TYPE_CHECKING:
    from runtime.backends.plan.contents import Contents

# Largest normalised squared error of a row. float32 leaves 1e-14 of a few roundings, which the
# first limit is wide of. A product adds up n numbers one by one: 2e-15 n, 3e-11 of the longest
# rows there are. Attention's weights are exponentials, which turn the absolute error of a score,
# 1e-7 of a score of 50, into a relative one; a recurrence multiplies its errors token by token:
# 1e-11 was seen of both. What codes of K and V are multiplied with has 15 bits: 2e-9 on normal
# values, 2e-6 seen.
_LIMIT, _OF_LONG_SUMS, _OF_CODES = 1e-11, 1e-10, 3e-5
_LONG_SUMS = (gated_delta, delta_step)
_SHORT = 16  # numbers of a row that may nearly cancel all at once
_SLACK = 2e-6  # of values that are computed before they are rounded to codes
_AS_GOOD = 3.0  # squared error of a group against that of another way; 1.8 was seen of those


@dataclass
class Tally:
    """What was compared so far."""

    steps: int = 0
    results: int = 0
    worst: float = 0.0
    name: str = ""
    sound: bool = True

    def add(self, name: str, error: float) -> None:
        """One result more, with its error."""
        self.results += 1
        if error >= self.worst:
            self.worst, self.name = error, name

    def report(self) -> None:
        """One line when all is well; what is wrong has been said where it was found."""
        if self.sound and self.results:
            plural = "s" * (self.steps != 1)
            print(
                f"VALIDATE: {self.results} results of {self.steps} step{plural} agree with the "
                f"reference (largest NMSE {self.worst:.1e}, {self.name})",
                file=sys.stderr,
            )


class _State:
    """A state leaf around one instruction of the plan: as it was, and as it should be."""

    def __init__(self, contents: Contents, leaf: Tensor) -> None:
        self._contents, self._leaf = contents, leaf
        self.rows = np.flatnonzero(contents.totals(leaf))  # those that hold anything
        self.before = contents.state(leaf, self.rows)
        self.wanted = np.zeros([int(n) for n in leaf.shape])  # untouched rows take no memory
        self.wanted[self.rows] = self.before

    def check(self, slack: float) -> tuple[float, str]:
        """The error of what was written, and where something is not what it should be."""
        rows = np.union1d(self.rows, np.flatnonzero(self._contents.totals(self._leaf)))
        got = self._contents.state(self._leaf, rows).astype(np.float64)
        want, before = self.wanted[rows], np.zeros_like(got)
        before[np.isin(rows, self.rows)] = self.before
        written = (want != before).any(-1)
        if (stray := (got != before).any(-1) & ~written).any():
            return math.inf, f"at {_place(stray, rows)}, which nothing was to write"
        if self._leaf.attrs["storage"] == "slots":
            error, where = _floats(got[written], want[written], _LIMIT)
            return error, where and f"in the written slots {where}"
        wrong = _beyond(got, want, self._leaf.dtype.name, slack).any(-1) & written
        return 0.0, f"at {_place(wrong, rows)}" if wrong.any() else ""


class Validation:
    """Steps of one model."""

    def __init__(self, stored: Callable[[Tensor], np.ndarray]) -> None:
        """stored: a weight of the file in float32, read without the device's help."""
        self._stored, self.tally = stored, Tally()

    def run(
        self, program: Any, inputs: Mapping[str, np.ndarray], live: Mapping[str, int]
    ) -> Sequence[np.ndarray]:
        """One step; its results. BackendError at the first difference."""

        def checked(program: Any, inputs: Mapping[str, np.ndarray]) -> Sequence[np.ndarray]:
            _Step(self, program, inputs, live).run()
            return program.results(live)

        self.tally.steps += 1
        try:
            if isinstance(program, LayersProgram):
                return program.run_by(checked, inputs)
            return checked(program, inputs)
        except BackendError:
            self.tally.sound = False
            raise

    def weight(self, leaf: Tensor) -> np.ndarray:
        """float32, in its shape."""
        return leaf.attrs["value"] if leaf.op == "constant" else self._stored(leaf)


class _Step:
    def __init__(
        self, of: Validation, program: Any, inputs: Mapping[str, np.ndarray],
        live: Mapping[str, int],
    ) -> None:  # fmt: skip
        self._of, self._program, self._inputs, self._live = of, program, inputs, live
        self._contents: Contents = program.contents(live)
        self._plan: Plan = program.plan
        self._digests: dict[Buffer, int] = {}
        self._n = 0  # of the instruction under way
        self._values: dict[Tensor, np.ndarray] = {}
        self._states: dict[Tensor, _State] = {}
        self._lent = {x for call in self._plan.calls() for x in self._unread(call)}
        self._kept: dict[Tensor, np.ndarray] = {}

    def _unread(self, call: Call) -> Iterator[Tensor]:
        """What the ops of a call need and it does not read: an earlier call did that part."""
        results, nodes = self._plan.results, [call.node]
        nodes += [x for x, buffer in results.items() if buffer in call.writes]
        for x in (x for node in nodes for x in node.inputs if x.base in results):
            buffer = results[x.base]
            if self._contents.holds(x.base) and buffer not in (*call.reads, *call.writes):
                yield x

    def run(self) -> None:
        instructions = zip(
            self._plan.instructions, self._program.run_each(self._inputs, self._live), strict=True
        )
        for self._n, (instruction, run) in enumerate(instructions):
            read = [b for b in instruction.reads if b in self._digests]
            leaves = [
                b.tensor
                for b in (*instruction.reads, *instruction.writes)
                if b.memory == "state" and b.tensor
            ]
            self._states = {leaf: _State(self._contents, leaf) for leaf in leaves}
            self._values = {}
            self._intact(read)
            run()
            self._intact(read)
            for call in instruction.calls:
                self._call(call)
            for b in instruction.writes:
                if b.memory == "arena":
                    self._digests[b] = self._contents.digest(b)
            for x in self._lent:
                if self._plan.results[x.base] in instruction.writes:
                    self._kept[x] = self._contents.array(x).copy()
        self._intact([ref.buffer for ref in self._plan.outputs])

    def _intact(self, buffers: list[Buffer]) -> None:
        """Whether results are still what they were when they were written."""
        for b in buffers:
            if self._contents.digest(b) != self._digests[b]:
                raise BackendError(
                    f"VALIDATE: {b.key} was overwritten by or before instruction {self._n} while "
                    "it was still needed: its memory was given away too early"
                )

    def _call(self, call: Call) -> None:
        node = _without_rounding(call.node)
        values = [self._value(x) for x in node.inputs]
        want = compute(node, *values)
        for tensor, buffer in self._plan.results.items():
            if buffer not in call.writes:
                continue
            if tensor is not call.node:  # a further result of the call
                want_of = compute(tensor, *(self._value(x) for x in tensor.inputs))
            else:
                want_of = want
            self._result(call, tensor, want_of, values)
        slack = 0.0 if node.op in OPS else _SLACK
        for buffer in call.writes:
            if buffer.memory == "state" and buffer.tensor:
                self._judge(call, buffer.key, *self._states[buffer.tensor].check(slack))

    def _result(
        self, call: Call, tensor: Tensor, want: np.ndarray, values: list[np.ndarray]
    ) -> None:
        name = tensor.name or tensor.op
        if tensor.dtype.is_blocked:
            self._judge(call, name, *self._packed(tensor, want))
            return
        got = self._contents.array(tensor)
        if got.dtype.kind == "i":
            self._judge(call, name, *_integers(got, want))
            return
        size = _natural_size(call, want, values)
        self._judge(
            call, name, *_floats(got.astype(np.float64), want, _limit(tensor, self._contents), size)
        )

    def _packed(self, tensor: Tensor, want: np.ndarray) -> tuple[float, str]:
        packed = self._contents.packed(tensor)
        rows = np.zeros_like(packed.values)
        rows[: want.size // rows.shape[1]] = want.reshape(-1, rows.shape[1])
        limit = _limit(tensor, self._contents)
        if packed.codes is None:
            return _floats(packed.values, rows, limit)
        exact = pack.made(tensor) or pack_rows.made(tensor)
        slack = math.sqrt(limit) if _attends(tensor) else _SLACK
        wrong = packed.wrong(rows, 0.0 if exact else slack)
        return 0.0, f"in block {_place(wrong)}" if wrong.any() else ""

    def _value(self, x: Tensor) -> np.ndarray:
        """What a call has read: an array of x's live shape; of states, one to be changed."""
        base = x.base
        if base.op == "state":
            return self._states[base].wanted
        if x not in self._values:
            self._values[x] = self._read(x, base)
        return self._values[x]

    def _read(self, x: Tensor, base: Tensor) -> np.ndarray:
        if base.op in ("weight", "constant"):
            stored = self._of.weight(base)
            return stored if x is base else self._contents.part(x, stored.reshape(-1))
        if x in self._kept:
            return self._kept[x]
        if base.op == "input":
            given = self._inputs[base.name]
        elif self._contents.holds(base):
            return self._contents.array(x)
        else:  # a kernel does several ops in one and keeps what the last of them gives
            given = compute(base, *(self._value(y) for y in base.inputs))
        room = np.zeros([int(n) for n in base.shape], given.dtype)
        room[tuple(slice(n) for n in given.shape)] = given
        return self._contents.part(x, room.reshape(-1))

    def _judge(self, call: Call, name: str, error: float, where: str) -> None:
        if where:
            raise BackendError(
                f"VALIDATE: {name} (instruction {self._n}, {call.kernel}) differs from the "
                f"reference {where}"
            )
        self._of.tally.add(name, error)


def _limit(x: Tensor, contents: Contents) -> float:
    if _attends(x):
        coded = any(kv_format(pages.dtype.name).coding for pages in x.inputs[1:3])
        return _OF_CODES if coded else contents.of_attention
    long = kind_of(x) is Kind.CONTRACTION or any(op.made(x) for op in _LONG_SUMS)
    return _OF_LONG_SUMS if long else _LIMIT


def _attends(x: Tensor) -> bool:
    return attention.made(x) or attention_pack.made(x)


def _without_rounding(node: Tensor) -> Tensor:
    """A node that stores values as they are: what rounding may make of them is judged after."""
    kinds = {name: "f32" for name in ("kv", "k_type", "v_type") if name in node.attrs}
    return replace(node, attrs=MappingProxyType({**node.attrs, **kinds})) if kinds else node


def _integers(got: np.ndarray, want: np.ndarray) -> tuple[float, str]:
    if got.shape != want.shape:
        return math.inf, f"in shape: {list(got.shape)} for {list(want.shape)}"
    wrong = got != want
    if not wrong.any():
        return 0.0, ""
    at = tuple(np.argwhere(wrong)[0])
    return math.inf, f"at {_place(wrong)}: {got[at]} for {want[at]}"


def _floats(
    got: np.ndarray, want: np.ndarray, limit: float, size: np.ndarray | float = 0.0
) -> tuple[float, str]:
    """The largest normalised squared error of a row, and where it is beyond the limit.

    size: what the squares of a row would add up to if nothing cancelled.
    """
    if not want.size:
        return 0.0, ""
    bad = ~np.isfinite(got) & np.isfinite(want)
    if bad.any():
        return math.inf, f"at {_place(bad)}: it is not finite"
    with np.errstate(invalid="ignore"):
        errors = np.nan_to_num((got - want) ** 2).sum(-1)
        sizes = np.maximum(np.nan_to_num(want**2).sum(-1), size)
    shares = errors / np.maximum(1e-30, sizes)
    worst = float(shares.max())
    if worst <= limit:
        return worst, ""
    first = _place(shares > limit)
    return worst, f"in row {first}: NMSE {worst:.1e} > {limit:.0e}"


def _natural_size(call: Call, want: np.ndarray, values: list[np.ndarray]) -> np.ndarray | float:
    """What the squares of a row add up to where its sums do not happen to cancel.

    Of a product with few rows of weights the squares of all terms; of a recurrence, which begins
    with queries times keys, what other heads of the token have. Of others rows are long enough.
    """
    slots = any(b.tensor and b.tensor.attrs.get("storage") == "slots" for b in call.writes)
    if slots and want.ndim == 3:
        return (want**2).sum(-1).mean(-1, keepdims=True)
    if kind_of(call.node) is not Kind.CONTRACTION or want.shape[-1] >= _SHORT:
        return 0.0
    squares = [v if v.dtype.kind == "i" else v.astype(np.float64) ** 2 for v in values]
    return compute(call.node, *squares).sum(-1)


def _beyond(got: np.ndarray, want: np.ndarray, kind: str, slack: float) -> np.ndarray:
    """Which values are not what rounding to a cache type makes of `want`, or of one that near.

    slack: how near, in shares of the largest of a row. Of two ways to round a group of codes that
    are nearly as good another may be taken, so of a group that is not much further off than
    rounding makes it no value is wrong but one that is much further off than any other.
    """
    s = slack * np.abs(want).max(-1, keepdims=True)
    near = [
        kv_format(kind).rounded(x)
        for x in (want, want - s, want + s, want * (1 - s), want * (1 + s))
    ]
    low, high = np.min(near, axis=0), np.max(near, axis=0)
    wrong = ~((low <= got) & (got <= high))
    if kv_format(kind).coding is None:
        return wrong & (got != want)
    off, least = (np.abs(in_groups(x - want)) for x in (got, near[0]))
    poor = (off**2).sum(-1) > _AS_GOOD * (least**2).sum(-1)
    far = poor[..., None] | (off > 2 * least.max(-1, keepdims=True))
    return wrong & far.reshape(*want.shape[:-1], -1)[..., : want.shape[-1]]


def _place(wrong: np.ndarray, rows: np.ndarray | None = None) -> str:
    """The first place where something is wrong, the first axis counted by `rows`."""
    first = [int(n) for n in np.argwhere(wrong)[0]] if wrong.ndim else []
    if rows is not None:
        first[0] = int(rows[first[0]])
    return str(first)
