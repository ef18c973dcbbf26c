"""The cases of all ops as graphs: each in every form that a step may give its inputs.

A case of an op is a few shapes; the variants are made here. All but "whole" leave room behind the
live rows, and what lies there is poison.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from stored_tensors import Stored, file_of
from tile_calls import random_rows

from runtime import ops
from runtime.ops.dtypes import BF16, DTYPES, F32, I32, DType
from runtime.ops.kv_formats import HEAD_UNIT, KV_FORMATS, fill, kv_format
from runtime.ops.quants import dequantize
from runtime.ops.registry import OPS, Arg, Case

SPARE = 3  # rows of room behind the live ones
# Arguments whose first axis counts live rows; of other ops the first, and those as long as it.
LIVE: dict[str, dict[int, str]] = {
    "attention": {0: "tokens", 4: "tokens", 5: "tokens"},
    "gated_delta": dict.fromkeys(range(5), "tokens") | dict.fromkeys((6, 7, 8), "sequences"),
    "get_rows": {1: "tokens"},
    "kv_write": {0: "tokens", 2: "tokens"},
    "rope_angles": {0: "tokens"},
    "select_rows": {0: "tokens", 1: "outputs"},
    "short_conv": {0: "tokens"} | dict.fromkeys((3, 4, 5), "sequences"),
}
# One of each way to unpack; tests of tiles have them all.
FORMATS = ("F16", "BF16", "Q8_0", "Q4_1", "Q5_0", "Q4_K", "Q6_K", "IQ4_NL", "MXFP4")
VIEWS = ("sliced", "heads", "permuted", "repeated")
INPUTS = ("f16", "bf16")  # of a step


def variants(name: str, case: Case) -> list[str]:
    """The forms that a case is run in."""
    if OPS[name].view:
        return ["whole"]
    args = case.arguments()
    found = ["whole", "partly", "empty"]
    for i, arg in enumerate(args):
        if _plain(arg):
            found += [f"{view} {i}" for view in VIEWS if view != "heads" or len(arg.shape) > 2]
            found += [f"{kind} {i}" for kind in INPUTS]
    weights = [a for a in args if a.leaf == "weight"]
    if weights and weights[0].shape[-1] % 256 == 0:
        found += FORMATS
    return found if name == "kv_write" else [*found, "base"]


def _plain(arg: Arg) -> bool:
    """Whether an argument is a float input of a step that may lie in memory in any way."""
    return arg.leaf == "input" and arg.dtype is F32 and len(arg.shape) > 1


class Built:
    """One case in one variant: a graph over leaves, and their numbers.

    `values` are what the op's maths sees: live rows alone.
    """

    def __init__(self, name: str, case: Case, variant: str = "whole") -> None:
        self.name, self.case, self.variant = name, case, variant
        self.inputs: dict[str, np.ndarray] = {}
        self.tensors: dict[str, Stored] = {}
        self.states: dict[str, tuple[ops.Tensor, np.ndarray]] = {}
        self.kept: dict[str, np.ndarray] = {}  # of caches: the bits of each token
        self.values: list[np.ndarray] = []
        self.live: dict[str, int] = {"tokens": 0}
        self._rng, self._room = np.random.default_rng(1), 0 if variant == "whole" else SPARE
        leaves = [self._leaf(i, arg) for i, arg in enumerate(case.arguments())]
        if OPS[name].view:  # an output that is a view of something computed
            leaves[0] = ops.scale(leaves[0], factor=1.0)
        self.node = OPS[name](*leaves, name="result", **case.attrs)
        outputs = [self.node]
        if variant == "base":  # of an output another output is a part
            self.part = {"axis": self.node.ndim - 1, "start": 1, "stop": int(self.node.shape[-1])}
            outputs.append(ops.slice_(self.node, **self.part))
        self.graph = ops.Graph(tuple(outputs))

    def file(self) -> Any:
        """What stands for the model's file."""
        return file_of(self.tensors)

    def _leaf(self, i: int, arg: Arg) -> ops.Tensor:
        name, dim = f"x{i}", self._live(i, arg)
        value = np.asarray((arg.make or (lambda r, s: r.standard_normal(s)))(self._rng, arg.shape))
        value = value.astype(np.int32 if arg.dtype is I32 else np.float32)
        value = value[:0] if dim and self.variant == "empty" else value
        shape = arg.shape
        if dim:
            self.live[dim] = len(value)
            shape = (ops.Dim(dim, arg.shape[0] + self._room), *shape[1:])
        if arg.leaf == "weight" or (not dim and arg.leaf == "input" and arg.dtype is F32):
            return self._weight(name, value)
        if arg.leaf in ("state", "slots"):
            return self._state(name, value, arg)
        form, _, which = self.variant.partition(" ")
        if form in VIEWS and which == str(i):
            return self._view(name, value, shape, form)
        kind = DTYPES[form] if form in INPUTS and which == str(i) else None
        if kind:
            value = kv_format(kind.name).rounded(value)
        self._keep(value)
        whole = _with_room(value, shape)
        if kind is BF16:  # kept as its bits
            whole = (whole.view(np.uint32) >> 16).astype(np.uint16)
        self.inputs[name] = whole.astype(kind.numpy) if kind else whole
        return ops.step_input(name, shape, kind or arg.dtype)

    def _live(self, i: int, arg: Arg) -> str:
        """The name of the argument's live axis, if it has one."""
        if self.name in LIVE:
            return LIVE[self.name].get(i, "")
        first = self.case.arguments()[0].shape[0]
        counts = arg.leaf == "input" and arg.shape[0] == first and (len(arg.shape) > 1 or not i)
        return "tokens" if counts and not OPS[self.name].view else ""

    def _keep(self, value: np.ndarray) -> None:
        self.values.append(value.astype(np.float64) if value.dtype == np.float32 else value)

    def _weight(self, name: str, value: np.ndarray) -> ops.Tensor:
        chosen = self.variant in FORMATS and value.ndim > 1
        kind: DType = DTYPES[self.variant.lower()] if chosen else F32
        data = np.ascontiguousarray(value)
        if kind is not F32:
            rows = random_rows(self.variant, value.size // value.shape[-1], value.shape[-1])
            data, value = rows, dequantize(rows.reshape(-1), kind, value.shape)
        self.tensors[name] = Stored(value, data, kind)
        self._keep(value)
        return ops.weight(name, value.shape, kind)

    def _state(self, name: str, value: np.ndarray, arg: Arg) -> ops.Tensor:
        if arg.dtype.name in KV_FORMATS and arg.leaf == "state":
            planes = kv_format(arg.dtype.name).encode(fill(value, HEAD_UNIT))
            self.kept[name] = kv_format(arg.dtype.name).to_rows(planes)
            value = kv_format(arg.dtype.name).plain(self.kept[name], value.shape[-1])
        kind = self.case.attrs.get("which") or ("k" if name == "x1" else "v")
        kind = "slots" if arg.leaf == "slots" else kind
        leaf = ops.state(name, arg.shape, arg.dtype, kind)
        self.states[name] = leaf, value
        self._keep(value)
        return leaf

    def _view(self, name: str, value: np.ndarray, shape: tuple[int, ...], form: str) -> ops.Tensor:
        """The input as a view of a leaf that has more, or another order."""
        axis = {"sliced": value.ndim - 1, "heads": 1}.get(form)
        if form == "repeated":
            value = np.repeat(value[:1], len(value), 0)
            leaf = ops.step_input(name, (1, *shape[1:]), F32)
            self.inputs[name], x = value[:1], ops.broadcast(leaf, shape=shape)
        elif axis is None:
            order = (1, 0, *range(2, value.ndim))
            whole = _with_room(value, shape)
            leaf = ops.step_input(name, tuple(shape[a] for a in order), F32)
            self.inputs[name], x = whole.transpose(order), ops.permute(leaf, axes=order)
        else:
            n = int(shape[axis])
            wide = (*shape[:axis], n + 7, *shape[axis + 1 :])
            whole = np.full([int(m) for m in wide], np.nan, np.float32)
            np.moveaxis(whole, axis, 0)[3 : 3 + n] = np.moveaxis(_with_room(value, shape), axis, 0)
            leaf = ops.step_input(name, wide, F32)
            self.inputs[name], x = whole, ops.slice_(leaf, axis=axis, start=3, stop=3 + n)
        self._keep(value)
        return x


def _with_room(value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The live rows, and poison up to the capacity: NaN, or the index 1 where something lies."""
    whole = np.full([int(n) for n in shape], np.nan if value.dtype == np.float32 else 1)
    whole[: len(value)] = value
    return whole.astype(value.dtype)


def grid() -> Iterator[tuple[str, int, str]]:
    """Op, number of its case, variant."""
    for name in sorted(OPS):
        for n, case in enumerate(OPS[name].cases):
            for variant in variants(name, case):
                yield name, n, variant
