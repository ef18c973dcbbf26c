"""Random small graphs of all kinds of ops, with numbers for their leaves, for tests of splits."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from runtime import ops
from runtime.backends.reference import compute
from runtime.ops.dtypes import F32, I32
from runtime.ops.kv_formats import PAGE
from runtime.ops.rotation import hadamard
from runtime.ops.tensor import Tensor, stored_name

Values = dict[str, np.ndarray]  # by the name of a leaf

WIDTHS = (4, 6, 8, 12)
SEQUENCES = 2
TOKENS = 5


class RandomGraph:
    """A graph of about `size` ops; `values`: what its leaves hold before the step."""

    def __init__(self, seed: int, size: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.values: Values = {}
        self._weights: dict[tuple[int, ...], list[Tensor]] = {}
        self.tokens = ops.Dim("tokens", TOKENS)
        self._step()
        self.made = [self._input((self.tokens, n)) for n in self._some(WIDTHS, 2)]
        grow: list[Callable[[], Tensor]] = [
            getattr(self, name) for name in dir(self) if name.startswith("op_")
        ]
        while len(self._graph().nodes) < 2 * size:
            made = grow[self.rng.integers(len(grow))]()
            self.made.append(made)
        self.graph = self._graph()

    def whole(self) -> tuple[dict[Tensor, np.ndarray], Values]:
        """What every node is, and what leaves hold after the step."""
        after = {name: value.copy() for name, value in self.values.items()}
        found: dict[Tensor, np.ndarray] = {}
        for node in self.graph.nodes:
            if node.op == "constant":
                found[node] = node.attrs["value"]
            elif not node.inputs:
                found[node] = after[stored_name(node)]
            else:
                found[node] = compute(node, *(found[x] for x in node.inputs))
        return found, after

    def op_add(self) -> Tensor:
        x = self._any()
        other = self._like(x) if self.rng.random() < 0.6 else self._weight((x.shape[-1],))
        return ops.add(x, other)

    def op_mul(self) -> Tensor:
        x = self._any()
        return ops.mul(x, self._like(x))

    def op_scale(self) -> Tensor:
        return ops.scale(self._any(), factor=-0.5)

    def op_unary(self) -> Tensor:
        op = (ops.silu, ops.sigmoid, ops.softplus, ops.copy)[self.rng.integers(4)]
        return op(self._any())

    def op_swiglu(self) -> Tensor:
        x = self._any()
        return ops.swiglu_oai(x, self._like(x), alpha=1.7, limit=0.7)

    def op_gated(self) -> Tensor:
        """A gated product as of a feed-forward net, gate and up in one projection at times."""
        x, n = self._flat(), 2 * int(self.rng.integers(2, 7))
        if self.rng.random() < 0.5:
            both = self._project(x, 2 * n)
            gate, up = (ops.slice_(both, axis=1, start=a, stop=a + n) for a in (0, n))
        else:
            gate, up = self._project(x, n), self._project(x, n)
        return self._project(ops.mul(ops.silu(gate), up), int(x.shape[1]))

    def op_norm(self) -> Tensor:
        x = self._any()
        if self.rng.random() < 0.5:
            return ops.l2_norm(x, eps=1e-3)
        return ops.rms_norm(x, self._weight((x.shape[-1],)), eps=1e-3)

    def op_softmax(self) -> Tensor:
        x = ops.softmax(self._any())
        return ops.normalize(x) if self.rng.random() < 0.5 else x

    def op_column(self) -> Tensor:
        x = self._flat()
        return ops.row_scale(x, ops.sigmoid(self._project(self._flat(), 1)))

    def op_matmul(self) -> Tensor:
        return self._project(self._flat(), int(self._some(WIDTHS, 1)[0]))

    def op_slice(self) -> Tensor:
        x = self._any()
        axis = int(self.rng.integers(1, x.ndim))
        n = int(x.shape[axis])
        start = int(self.rng.integers(0, n // 2 + 1))
        axis -= x.ndim * int(self.rng.integers(2))
        return ops.slice_(x, axis=axis, start=start, stop=start + (n + 1) // 2)

    def op_heads_and_back(self) -> Tensor:
        x = self._heads(int(self.rng.integers(1, 4)))
        by_head = ops.permute(ops.copy(x), axes=(1, 0, 2))
        return ops.copy(ops.permute(ops.scale(by_head, factor=2.0), axes=(1, 0, 2)))

    def op_rows_of_heads(self) -> Tensor:
        """Heads flattened with tokens into rows and back, as a rotation of a cache has it."""
        x = self._heads(int(self.rng.integers(1, 5)))
        rows = ops.reshape(x, shape=(TOKENS * int(x.shape[1]), x.shape[2]))
        rotated = ops.matmul(rows, self._weight((x.shape[2], x.shape[2])))
        return ops.reshape(rotated, shape=x.shape)

    def op_merge(self) -> Tensor:
        return ops.merge_heads(self._heads(int(self.rng.integers(1, 5))))

    def op_broadcast(self) -> Tensor:
        x = self._flat()
        one = ops.reshape(x, shape=(x.shape[0], 1, x.shape[1]))
        return ops.copy(ops.broadcast(one, shape=(x.shape[0], 3, x.shape[1])))

    def op_rope(self) -> Tensor:
        x = self._heads(int(self.rng.integers(1, 5)), 4)
        return ops.rope(x, self.angles, style="neox")

    def op_hadamard(self) -> Tensor:
        return hadamard(self._heads(int(self.rng.integers(1, 5)), 4), block=4)

    def op_attention(self) -> Tensor:
        keys, ratio = int(self.rng.integers(1, 5)), int(self.rng.integers(1, 4))
        q, k, v = self._heads(keys * ratio, 4), self._heads(keys, 4), self._heads(keys, 4)
        pages = (4, PAGE, keys, 4)
        k_pages = ops.kv_write(k, self._state(pages, "k"), self.slots, which="k", kv="f32")
        v_pages = ops.kv_write(v, self._state(pages, "v"), self.slots, which="v", kv="f32")
        sinks = [self._weight((keys * ratio,))] if self.rng.random() < 0.3 else []
        merged = ops.merge_heads(ops.attention(
            ops.rope(q, self.angles, style="normal"), k_pages, v_pages, self.table,
            self.sequences, self.places, *sinks, scale=0.5,
            window=int(self.rng.integers(0, 2)) * 6,
        ))  # fmt: skip
        if self.rng.random() < 0.7:
            return merged
        half = int(merged.shape[1]) // 2
        start = int(self.rng.integers(half))  # some heads, and parts of them
        return self._project(ops.slice_(merged, axis=1, start=start, stop=start + half), 6)

    def op_conv(self) -> Tensor:
        x = self._flat()
        n = int(x.shape[1])
        state = self._state((3, 2, n), "slots")
        return ops.short_conv(x, self._weight((n, 3)), state, *self.slot_step)

    def op_delta(self) -> Tensor:
        keys, ratio = int(self.rng.integers(1, 4)), int(self.rng.integers(1, 4))
        heads, x = keys * ratio, self._flat()
        q, k = (ops.l2_norm(self._heads(keys, 4), eps=1e-3) for _ in range(2))
        decay = ops.scale(ops.softplus(self._project(x, heads)), factor=-1.0)
        beta = ops.sigmoid(self._project(x, heads))
        return ops.merge_heads(ops.gated_delta(
            q, k, self._heads(heads, 4), decay, beta, self._state((3, heads, 4, 4), "slots"),
            *self.slot_step, scale=0.5, order=("grouped", "tiled")[self.rng.integers(2)],
        ))  # fmt: skip

    def op_experts(self) -> Tensor:
        x = self._flat()
        n, inner, experts = int(x.shape[1]), 2 * int(self.rng.integers(1, 5)), 4
        scores = ops.softmax(self._project(x, experts))
        ids = ops.top_k(scores, k=2)
        up = ops.matmul_id(x, self._weight((experts, inner, n)), ids)
        if self.rng.random() < 0.5:
            up = ops.expert_bias(up, self._weight((experts, inner)), ids)
        down = ops.matmul_id(ops.silu(up), self._weight((experts, n, inner)), ids)
        if self.rng.random() < 0.5:
            down = ops.expert_bias(down, self._weight((experts, n)), ids)
        return ops.expert_sum(down, ops.normalize(ops.take(scores, ids)))

    def op_rows(self) -> Tensor:
        if self.rng.random() < 0.5:
            return ops.get_rows(self._weight((9, int(self._some(WIDTHS, 1)[0]))), self.ids)
        return ops.select_rows(self._any(), self.ids)

    def _graph(self) -> ops.Graph:
        used = {x for node in self.made for x in node.inputs}
        return ops.Graph(tuple(node for node in self.made if node not in used or node.op == "add"))

    def _step(self) -> None:
        """What all ops of a step share: two sequences, one of three tokens and one of two."""
        table = self.rng.permutation(4).reshape(SEQUENCES, 2)
        sequences, places = np.array([0, 0, 0, 1, 1]), np.array([30, 31, 32, 5, 6])
        slots = table[sequences, places // PAGE] * PAGE + places % PAGE
        self.table, self.sequences = self._int("table", table), self._int("sequences", sequences)
        self.places, self.slots = self._int("places", places), self._int("slots", slots)
        self.ids = self._int("ids", self.rng.integers(0, TOKENS, TOKENS))
        self.slot_step = (
            self._int("spans", np.array([(0, 3), (3, 2)])), self._int("slot_in", np.array([2, -1])),
            self._int("slot_out", np.array([0, 1])),
        )  # fmt: skip
        frequencies = ops.constant("frequencies", np.array([1.0, 0.1], np.float32))
        self.angles = ops.rope_angles(self.places, frequencies, magnitude=1.0)

    def _int(self, name: str, value: np.ndarray) -> Tensor:
        self.values[name] = value.astype(np.int32)
        counts = name in ("sequences", "places", "slots", "ids")
        return ops.step_input(name, (self.tokens,) if counts else value.shape, I32)

    def _input(self, shape: tuple[int, ...]) -> Tensor:
        return ops.step_input(self._name("input", shape), shape, F32)

    def _weight(self, shape: tuple[int, ...]) -> Tensor:
        """A new one, or at times one that something else uses too."""
        same = self._weights.setdefault(tuple(map(int, shape)), [])
        if not same or self.rng.random() < 0.8:
            same.append(ops.weight(self._name("weight", shape), shape, F32))
        return same[self.rng.integers(len(same))] if self.rng.random() < 0.2 else same[-1]

    def _state(self, shape: tuple[int, ...], storage: str) -> Tensor:
        return ops.state(self._name("state", shape), shape, F32, storage)

    def _name(self, kind: str, shape: tuple[int, ...]) -> str:
        name = f"{kind}{len(self.values)}"
        spread = int(shape[-1]) ** -0.5 if kind == "weight" else 1
        self.values[name] = spread * self.rng.standard_normal([int(n) for n in shape])
        return name

    def _some(self, of: tuple[int, ...], count: int) -> list[int]:
        return [int(n) for n in self.rng.choice(of, count)]

    def _any(self) -> Tensor:
        """Something made, late ones more often."""
        at = len(self.made) - 1 - int(self.rng.exponential(2.5))
        return self.made[max(0, at)]

    def _flat(self) -> Tensor:
        """Something of [tokens, n]."""
        x = self._any()
        if x.ndim > 2:
            x = ops.reshape(ops.copy(x), shape=(self.tokens, x.size // TOKENS))
        return x if int(x.shape[1]) <= max(WIDTHS) else self._project(x, 8)

    def _like(self, x: Tensor) -> Tensor:
        same = [y for y in self.made if tuple(y.shape) == tuple(x.shape)]
        if same and self.rng.random() < 0.8:
            return same[self.rng.integers(len(same))]
        return self._input(tuple(x.shape))

    def _project(self, x: Tensor, n: int) -> Tensor:
        return ops.matmul(x, self._weight((n, int(x.shape[1]))))

    def _heads(self, heads: int, dim: int = 0) -> Tensor:
        dim = dim or int(self.rng.integers(1, 5))
        return ops.split_heads(self._project(self._flat(), heads * dim), heads)
