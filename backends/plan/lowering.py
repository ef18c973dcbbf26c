"""Lowering: one rule per op turns nodes into kernel calls over buffers.

A device's rules are registered by op name in files that mirror `ops/` (norm.py, matmul.py, ...). A
rule says which kernel, with which arguments; instructions, buffers and memory are decided here and
in plan.py, for all devices alike.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from typing import Any

from runtime.backends.plan.kernel import Kernel
from runtime.backends.plan.plan import (
    Argument,
    Buffer,
    Call,
    Plan,
    Ref,
    Share,
    place_buffers,
    schedule,
)  # fmt: skip
from runtime.ops.dtypes import F32, I32, DType
from runtime.ops.errors import BackendError, OpError
from runtime.ops.graph import Graph
from runtime.ops.registry import FUSED, OPS, Kind, Op, kind_of
from runtime.ops.tensor import Dim, Tensor

Rule = Callable[["Lowering", Tensor], None]


class Declined(Exception):  # noqa: N818  not a failure by itself
    """A rule cannot lower this node; the text says why."""


class Rules:
    """The rules of one device: op -> the function that lowers its nodes."""

    def __init__(self, device: str, folder: str) -> None:
        """folder: where the files of rules are, for messages."""
        self.device, self._folder = device, folder
        self._rules: dict[str, Rule] = {}
        self._kinds: dict[Kind, Rule] = {}

    def lowers(self, *names: str) -> Callable[[Rule], Rule]:
        """Register the rule of some ops; an unknown or second registration fails at import."""

        def register(rule: Rule) -> Rule:
            for name in names:
                if name not in OPS and name not in FUSED:
                    raise OpError(f"{self.device} backend: rule for unknown op {name!r}")
                if name in self._rules:
                    raise OpError(f"{self.device} backend: two rules for op {name!r}")
                self._rules[name] = rule
            return rule

        return register

    def lowers_kind(self, kind: Kind) -> Callable[[Rule], Rule]:
        """Register the rule of all ops of a kind that have none of their own."""

        def register(rule: Rule) -> Rule:
            self._kinds[kind] = rule
            return rule

        return register

    def names(self) -> list[str]:
        """Ops that have a rule, sorted."""
        by_kind = (name for name, op in OPS.items() if op.kind in self._kinds)
        return sorted({*self._rules, *by_kind})

    def check(self, declared: Mapping[str, Op], replaced: Collection[Op] = ()) -> None:
        """OpError for an op of this package that has no rule; others' ops bring their own.

        replaced: ops of which the device's passes leave none.
        """
        package = Op.__module__.rpartition(".")[0]
        for name, op in declared.items():
            of, _, file = op.reference.__module__.rpartition(".")
            has = name in self._rules or op.kind in self._kinds
            if of == package and not op.view and not has and op not in replaced:
                raise OpError(
                    f"op {name!r} of ops/{file}.py has no rule on the {self.device} backend: write "
                    f"a function with @lowers({name!r}) in {self._folder}/{file}.py"
                )

    def lower(self, graph: Graph) -> Lowering:
        """All nodes of a graph lowered in order. BackendError: one that cannot be."""
        reads = ((node, n, x) for node in graph.nodes for n, x in enumerate(node.inputs))
        lowering = Lowering(multiplied(reads))
        for node in _in_order(graph):
            if kind_of(node) in (Kind.LEAF, Kind.VIEW):
                continue
            rule = self._rules.get(node.op) or self._kinds.get(kind_of(node))
            if rule is None:
                raise BackendError(
                    f"{self.device} backend has no kernel for op {node.op!r} ({node!r}); "
                    f"it has {', '.join(self.names())}"
                )
            try:
                rule(lowering, node)
            except Declined as reason:
                raise BackendError(
                    f"{self.device} backend cannot run {node.op} ({node!r}): {reason}"
                ) from None
        return lowering

    def plan(self, graph: Graph, guarded: bool = False) -> Plan:
        """The plan of a graph: lowered, gathered into instructions, memory placed."""
        lowering = self.lower(graph)
        kept = tuple(o for o in graph.outputs if o.base.op != "state")
        results = [lowering.place(o, (o.dtype,)) for o in kept]
        plan = Plan(
            graph.name, schedule(lowering.calls), results, kept, lowering.counts,
            scratch_nbytes=lowering.scratch_nbytes, results=lowering.results, parts=lowering.parts,
        )  # fmt: skip
        place_buffers(plan, guarded)
        return plan


class Lowering:
    """The state of lowering one graph: calls so far and the buffer of each tensor."""

    def __init__(self, multiplied: Collection[Hashable] = ()) -> None:
        """multiplied: see the function of that name."""
        self.multiplied = multiplied
        self.calls: list[Call] = []
        self.counts: dict[tuple[str, int], int] = {}
        self.scratch_nbytes = self.n_tickets = 0
        self.router_results: dict[Tensor, dict[str, Buffer]] = {}
        self.results: dict[Tensor, Buffer] = {}
        self.parts: dict[int, Ref] = {}  # see Plan
        self._fixed: dict[Hashable, Buffer] = {}
        self._inputs: dict[str, Tensor] = {}
        self._counts = Buffer("count", "counts", 0)

    def emit(
        self, kernel: str, node: Tensor, constants: dict | None = None, share: Share | None = None,
        grid: tuple[int, ...] = (), **arguments: Any,
    ) -> None:  # fmt: skip
        """Append a call; arguments by the names that the kernel's function gives them.

        They are numbers, Refs to read, or `Out(ref)` to write.
        share: how the kernel divides some of them between threads, where it promises something.
        grid: see `Call`.
        """
        plain = {n: a.ref if isinstance(a, Out) else a for n, a in arguments.items()}
        writes = [a.ref.buffer for a in arguments.values() if isinstance(a, Out)]
        updates = [a.ref.buffer for a in arguments.values() if isinstance(a, Out) and a.also_read]
        reads = [a.buffer for a in arguments.values() if isinstance(a, Ref)]
        self.calls.append(
            Call(
                Kernel.of(kernel, **(constants or {})), plain,
                tuple(dict.fromkeys(reads + updates)), tuple(dict.fromkeys(writes)), node,
                share.length if share else 0, _own(share, plain), grid,
            )
        )  # fmt: skip

    def read(self, x: Tensor) -> Ref:
        """Where a tensor (or view) lies whose elements follow each other."""
        if not x.layout.is_contiguous(x.shape):
            raise Declined(f"{x!r} is not contiguous")
        return self.place(x)

    def place(self, x: Tensor, dtypes: Collection[DType] = (F32, I32)) -> Ref:
        """Where a tensor (or view) begins; dtypes: those that the kernel can read."""
        layout = x.layout
        dtype = F32 if layout.base.op == "weight" else x.dtype  # weights are widened
        if dtype not in dtypes:
            raise Declined(f"{x!r} is neither {' nor '.join(d.name for d in dtypes)}")
        return Ref(self._buffer(layout.base), layout.offset * dtype.nbytes)

    def write(self, node: Tensor, nbytes: int | None = None) -> Out:
        """New arena memory for a node's result."""
        buffer = Buffer("arena", node.name or node.op, nbytes or node.nbytes, tensor=node)
        self.results[node] = buffer
        return Out(Ref(buffer))

    def alias(self, node: Tensor, buffer: Buffer) -> None:
        """The result of `node` lies in a buffer that another node wrote."""
        self.results[node] = buffer

    def take_back(self, node: Tensor) -> bool:
        """Whether another call may do the work of a node's calls, which are then dropped.

        Not where a call has read the result, or made other results too.
        """
        buffer, mine = self.results[node], [c for c in self.calls if c.node is node]
        rest = [c for c in self.calls if c.node is not node]
        others = {*self.results.values()} - {buffer}
        if not mine or any(buffer in c.reads for c in rest):
            return False
        if any(b in others for c in mine for b in c.writes):
            return False
        self.calls = rest
        return True

    def result(self, node: Tensor) -> Buffer:
        """The buffer a node was written to."""
        return self.results[node]

    def weight(self, x: Tensor, form: str) -> Ref:
        """A weight in one of its forms: "raw" file bytes, "vector" float32, "repacked", or "turns",
        which a device makes of frequencies."""
        if x.op not in ("weight", "constant"):
            raise Declined(f"{x!r} is computed, not a weight of the file")
        memory = "constant" if x.op == "constant" and form != "turns" else form
        return Ref(self._fixed_one(memory, x.name, x))

    def state(self, x: Tensor) -> Ref:
        """Pages of a state leaf."""
        return Ref(self._buffer(x.base))

    def room(self, node: Tensor, name: str, nbytes: int) -> Out:
        """New arena memory for what one of a node's calls leaves to another."""
        return Out(Ref(Buffer("arena", f"{node.name or node.op}.{name}", nbytes)))

    def scratch(self, nbytes: int) -> Ref:
        """Memory that lives for one call; all calls share the largest."""
        self.scratch_nbytes = max(self.scratch_nbytes, nbytes)
        return Ref(self._fixed_one("scratch", "scratch"))

    def joint(self, memory: str, key: str) -> Ref:
        """Where the devices that share a graph meet, or what else they need for it; see Buffer."""
        return Ref(self._fixed_one(memory, key))

    def step(self, name: str) -> Ref:
        """A step input that the program makes itself, such as attention tiles."""
        return Ref(self._fixed_one("input", name))

    def tickets(self, node: Tensor, count: int = 1) -> Out:
        """`count` u32 of a call's own that are 0 before it and that it leaves so."""
        self.n_tickets += 1
        name = f"{node.name or node.op}.tickets{self.n_tickets}"
        return Out(Ref(Buffer("tickets", name, 4 * count)), also_read=True)

    def count(self, dim: str, factor: int = 1) -> Ref:
        """The address of a live count: how many of `dim` this step has, times `factor`."""
        slot = self.counts.setdefault((dim, factor), len(self.counts))
        return Ref(self._counts, slot * 8)

    def live(self, x: Tensor, factor: int = 1) -> Ref:
        """The live rows of x: its first axis times `factor` rows per element."""
        first = x.shape[0] if x.ndim else 1
        name = first.name if isinstance(first, Dim) else f"={int(first)}"
        return self.count(name, factor)

    def rows(self, x: Tensor) -> tuple[Ref, int, Ref, int]:
        """x as rows of its last axis: address, row length, live count, row stride."""
        strides, shape = x.layout.strides, x.shape
        if any(isinstance(n, Dim) for n in shape[1:] or shape):
            raise Declined(f"{x!r} has live elements, where rows may be live and nothing else")
        if x.ndim < 2:
            return self.read(x), x.size, self.count("=1"), x.size
        if strides[-1] != 1 and shape[-1] != 1:
            raise Declined(f"rows of {x!r} are not contiguous")
        step = strides[-2]
        for axis in range(x.ndim - 2):
            if strides[axis] != strides[axis + 1] * shape[axis + 1] and shape[axis] != 1:
                raise Declined(f"axes of {x!r} do not merge into rows")
        factor = 1
        for n in shape[1:-1]:
            factor *= int(n)
        return self.place(x), int(shape[-1]), self.live(x, factor), int(step)

    def tokens(self, x: Tensor) -> tuple[Ref, int, Ref, int]:
        """x as one row per element of its first axis: address, row length, live, row stride."""
        tail = 1
        for n, stride in zip(reversed(x.shape[1:]), reversed(x.layout.strides[1:]), strict=True):
            if stride != tail and n != 1:
                raise Declined(f"a row of {x!r} is not contiguous")
            tail *= int(n)
        return self.place(x), tail, self.live(x), int(x.layout.strides[0])

    def axes(self, x: Tensor) -> dict[str, Any]:
        """x as up to four axes a, b, c, n: sizes of all but the first, and the strides of all."""
        (_, first), *inner = list(zip(map(int, x.shape), x.layout.strides, strict=True)) or [(1, 0)]
        if len(inner) > 3:
            raise Declined(f"{x!r} has more than four axes")
        found = {"stride_a": int(first)}
        for name, (n, stride) in zip("bcn", [(1, 0)] * (3 - len(inner)) + inner, strict=True):
            found |= {name: n, f"stride_{name}": int(stride)}
        return found

    def heads(self, x: Tensor) -> tuple[Ref, int, int]:
        """x [tokens, heads, dim], a view or not: address, token stride, head stride."""
        token, head, step = x.layout.strides
        if step != 1 and x.shape[2] != 1:
            raise Declined(f"heads of {x!r} are not contiguous")
        return self.place(x), int(token), int(head)

    def _buffer(self, base: Tensor) -> Buffer:
        if base in self.results:
            return self.results[base]
        if kind_of(base) is not Kind.LEAF:
            raise BackendError(f"lowering reads {base!r} before anything wrote it")
        same = self._inputs.setdefault(base.name, base) if base.op == "input" else base
        if same.content != base.content:
            raise BackendError(f"two step inputs of one name: {same!r} and {base!r}")
        return self._fixed_one("vector" if base.op == "weight" else base.op, base.name, base)

    def _fixed_one(self, memory: str, key: str, leaf: Tensor | None = None) -> Buffer:
        """The one buffer of what is not made by this plan."""
        made = Buffer(memory, key, leaf.nbytes if leaf else 0, tensor=leaf)
        return self._fixed.setdefault(made.content, made)


def multiplied(reads: Iterable[tuple[Tensor, int, Tensor]]) -> frozenset[Hashable]:
    """Contents of the weights that products read, in tiles: an embedding may be one of them.

    reads: (node, number of an input, the tensor that it is).
    """
    return frozenset(
        x.content for node, n, x in reads
        if n == 1 and x.op == "weight" and kind_of(node) is Kind.CONTRACTION
    )  # fmt: skip


def _in_order(graph: Graph) -> Sequence[Tensor]:
    """The nodes, collectives by their numbers: so all devices come to the same one together."""
    meetings = [node for node in graph.nodes if kind_of(node) is Kind.COLLECTIVE]
    meetings.sort(key=lambda node: node.attrs["number"])
    return Graph((*meetings, *graph.outputs)).nodes if meetings else graph.nodes


class Out:
    """An argument that is written (and, with `also_read`, read before)."""

    def __init__(self, ref: Ref, also_read: bool = False) -> None:
        self.ref, self.also_read = ref, also_read


def _own(share: Share | None, arguments: dict[str, Argument]) -> frozenset[Buffer]:
    """The buffers a share speaks of; an argument that begins inside a row is none of them."""
    refs = [arguments[name] for name in share.arguments] if share else []
    length = share.length if share else 0
    partial, whole = set[Buffer](), set[Buffer]()
    for ref in refs:
        if isinstance(ref, Ref):
            assert ref.buffer.tensor is not None, "what is divided is a tensor"
            inside = ref.offset % (ref.buffer.tensor.dtype.nbytes * length)
            (partial if inside else whole).add(ref.buffer)
    return frozenset(whole - partial)
