"""Feed-forward networks as graphs: rows of their plans, fused against plain, and who reads what.

Rows have no barrier inside. `in_turn` runs them thread after thread, in any order, on poisoned
memory: a call that needs what another thread has yet to write gives other bits, every time.
"""

from __future__ import annotations

import functools
import itertools
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
from guarded import damaged, poison
from stored_tensors import Stored, file_of

from runtime import ops
from runtime.backends.cpu import CpuBackend
from runtime.backends.cpu.compile.objects import function
from runtime.backends.cpu.run.program import Program
from runtime.backends.plan.plan import Call
from runtime.backends.reference import ReferenceBackend
from runtime.ops.dtypes import DTYPES, F32

HIDDEN, INNER, EXPERTS, USED, EPS = 160, 96, 8, 3, 1e-6
ALPHA, LIMIT = 1.702, 7.0
THREADS = (1, 2, 3, 5)
_MATRICES = {
    "gate": (INNER, HIDDEN), "up": (INNER, HIDDEN), "down": (HIDDEN, INNER),
    "gate_exps": (EXPERTS, INNER, HIDDEN), "up_exps": (EXPERTS, INNER, HIDDEN),
    "down_exps": (EXPERTS, HIDDEN, INNER),
}  # fmt: skip
_VECTORS = {
    "norm": (HIDDEN,), "scores": (EXPERTS, HIDDEN), "opening": (1, HIDDEN), "scores.b": (EXPERTS,),
    "up_exps.b": (EXPERTS, INNER), "gate_exps.b": (EXPERTS, INNER),
    "down_exps.b": (EXPERTS, HIDDEN),
}  # fmt: skip


@functools.cache
def file(kind: str) -> SimpleNamespace:
    """Random weights, matrices of experts and networks in `kind`."""
    rng = np.random.default_rng(5)
    tensors = {}
    for name, shape in {**_MATRICES, **_VECTORS}.items():
        value = (2 * rng.standard_normal(shape) / shape[-1] ** 0.5).astype(np.float32)
        dtype = F32
        data = value.view(np.uint8)
        if kind != "f32" and name in _MATRICES:
            dtype, known = DTYPES[kind], gguf.GGMLQuantizationType[kind.upper()]
            data = gguf.quants.quantize(value, known)
            value = gguf.quants.dequantize(data, known).astype(np.float32)
        tensors[name] = Stored(value, data, dtype)
    return file_of(tensors)


FILES = {kind: file(kind) for kind in ("f32", "q8_0")}


class Layer:
    """Builders of one layer's feed-forward part, for steps of `tokens` and weights of `kind`."""

    def __init__(self, tokens: int, kind: str) -> None:
        self.tensors = file(kind).tensors
        self.x = ops.step_input("x", (ops.Dim("tokens", tokens), HIDDEN), F32)
        self.h = ops.rms_norm(self.x, self.w("norm"), eps=EPS)

    def w(self, name: str) -> ops.Tensor:
        return ops.weight(name, self.tensors[name].shape, self.tensors[name].dtype)

    def network(self) -> ops.Tensor:
        gate, up = (ops.matmul(self.h, self.w(name)) for name in ("gate", "up"))
        return ops.matmul(ops.mul(ops.silu(gate), up), self.w("down"))

    def scores(self) -> ops.Tensor:
        return ops.matmul(self.h, self.w("scores"))

    def experts(self, ids: ops.Tensor, weights: ops.Tensor, oai: bool = False) -> ops.Tensor:
        def product(x: ops.Tensor, name: str) -> ops.Tensor:
            y = ops.matmul_id(x, self.w(name), ids)
            return ops.expert_bias(y, self.w(f"{name}.b"), ids) if oai else y

        gate, up = product(self.h, "gate_exps"), product(self.h, "up_exps")
        if oai:
            inner = ops.swiglu_oai(gate, up, alpha=ALPHA, limit=LIMIT)
        else:
            inner = ops.mul(ops.silu(gate), up)
        return ops.expert_sum(product(inner, "down_exps"), weights)

    def dense(self) -> ops.Tensor:
        return ops.add(self.x, self.network())

    def softmax(self) -> ops.Tensor:
        shares = ops.softmax(self.scores())
        ids = ops.top_k(shares, k=USED)
        weights = ops.normalize(ops.take(shares, ids))
        return ops.add(self.x, self.experts(ids, weights))

    def shared(self) -> ops.Tensor:
        """Qwen3-Next: an expert for every token, opened by a number per token."""
        shares = ops.softmax(self.scores())
        ids = ops.top_k(shares, k=USED)
        chosen = self.experts(ids, ops.normalize(ops.take(shares, ids)))
        opening = ops.sigmoid(ops.matmul(self.h, self.w("opening")))
        return ops.add(self.x, ops.add(chosen, ops.row_scale(self.network(), opening)))

    def ungated(self) -> ops.Tensor:
        """Sigmoid scores, a factor, and a shared expert that is always open."""
        shares = ops.sigmoid(self.scores())
        ids = ops.top_k(shares, k=USED)
        weights = ops.scale(ops.normalize(ops.take(shares, ids)), factor=2.5)
        return ops.add(self.x, ops.add(self.experts(ids, weights), self.network()))

    def oai(self) -> ops.Tensor:
        """gpt-oss: biases everywhere, softmax of the chosen scores."""
        scores = ops.add(self.scores(), self.w("scores.b"))
        ids = ops.top_k(scores, k=USED)
        weights = ops.softmax(ops.take(scores, ids))
        return ops.add(self.x, self.experts(ids, weights, oai=True))


ROWS = {"dense": 3, "softmax": 5, "shared": 5, "ungated": 5, "oai": 5}
TOKENS = [1, 4, 96]


def graph(name: str, tokens: int, kind: str) -> ops.Graph:
    return ops.Graph((getattr(Layer(tokens, kind), name)(),), name)


def given(tokens: int) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    x = np.random.default_rng(3).standard_normal((max(TOKENS), HIDDEN)).astype(np.float32)
    return {"x": x[:tokens]}, {"tokens": tokens}


def in_turn(program: Program, tokens: int, order: list[int]) -> np.ndarray:
    """One step, row by row, each by one thread after the other in `order`."""
    poison(program)
    program.prepare(*given(tokens))
    records, starts = program.table._records, program.table.starts
    for first, end in itertools.pairwise(starts):
        for thread in order:
            for kernel, arguments, _ in records[first:end]:
                function(int(kernel))(int(arguments), thread, len(order))
    return program.results(given(tokens)[1])[0].copy()


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    """All kernels of all graphs at once."""
    for kind in FILES:
        graphs = [graph(name, tokens, kind) for name in ROWS for tokens in TOKENS]
        backend = CpuBackend(FILES[kind])
        plans = [backend.plan(g) for g in graphs]
        plans += [CpuBackend(FILES[kind], fuse=False).plan(g) for g in graphs]
        backend.library.prepare(backend.kernels(plans))


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("name", ROWS)
def test_rows_of_a_token(name: str, kind: str):
    plan = CpuBackend(FILES[kind]).plan(graph(name, 1, kind))
    assert len(plan.instructions) == ROWS[name], str(plan)
    assert plan.copies() == 0
    used = {kernel.name for kernel in plan.kernels()}
    assert not used & {"pack_rows", "expert_group", "rms_norm", "add", "row_scale", "sigmoid"}


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("name", ROWS)
def test_any_order_of_threads_gives_the_same_bits(name: str, tokens: int, kind: str):
    backend = CpuBackend(FILES[kind], threads=max(THREADS))
    program = backend.program(graph(name, tokens, kind))
    wanted = in_turn(program, tokens, [0])
    assert np.isfinite(wanted).all()
    for threads in THREADS[1:]:
        for order in (list(range(threads)), list(range(threads))[::-1]):
            np.testing.assert_array_equal(in_turn(program, tokens, order), wanted)
    np.testing.assert_array_equal(program.run(*given(tokens))[0], wanted)
    backend.close()


def test_a_barrier_too_few_is_found(monkeypatch: pytest.MonkeyPatch):
    """What the test above rests on: with every call in one row it fails."""
    monkeypatch.setattr(Call, "aligned", lambda *_: True)
    backend = CpuBackend(FILES["f32"], threads=2)
    plan = backend.plan(graph("dense", 1, "f32"))
    assert len(plan.instructions) == 1
    program = backend.bind(plan)
    assert not np.array_equal(in_turn(program, 1, [0, 1]), in_turn(program, 1, [0]))


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("name", ROWS)
def test_fused_has_the_bits_of_plain_ops(name: str, tokens: int, kind: str):
    g = graph(name, tokens, kind)
    results = []
    for fuse in (True, False):
        backend = CpuBackend(FILES[kind], threads=2, fuse=fuse)
        program = backend.bind(backend.plan(g, guarded=True))
        poison(program)
        results.append(np.array(program.run(*given(tokens))[0]))
        assert not damaged(program)
        backend.close()
    np.testing.assert_array_equal(*results)
    wanted = ReferenceBackend(FILES[kind]).program(g).run(*given(tokens))[0]
    error = ((results[0] - wanted) ** 2).sum() / (wanted**2).sum()
    assert error <= {"f32": 1e-11, "q8_0": 1e-3}[kind]


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("name", ROWS)
def test_a_token_has_the_same_bits_in_every_bucket(name: str, kind: str):
    backend = CpuBackend(FILES[kind], threads=2)
    rows = [backend.program(graph(name, n, kind)).run(*given(n))[0].copy() for n in TOKENS]
    for fewer, more in itertools.pairwise(rows):
        np.testing.assert_array_equal(fewer, more[: len(fewer)])
    backend.close()
