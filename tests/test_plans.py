"""Plans: snapshots per architecture, no copies, rows that need no barrier inside, memory reused.

A changed kernel choice or buffer shows as a diff of tests/plans/*.txt; write them again with
`UPDATE_PLANS=1 pytest tests/test_plans.py` and read the diff.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from small_models import NOVEL, Sizes, write_model

import runtime
from runtime import ops
from runtime.backends.cpu.planner import lower, options
from runtime.backends.cpu.rules import RULES
from runtime.backends.cpu.run.program import TILE_TOKENS, attention_tiles
from runtime.backends.plan.kernel import Kernel
from runtime.backends.plan.plan import Buffer, Call, Plan, make_rows
from runtime.model import Model
from runtime.ops.registry import OPS

PLANS = Path(__file__).parent / "plans"
ARCHITECTURES = {
    "llama": Sizes("llama"),
    "qwen2": Sizes("qwen2"),
    "qwen3": Sizes("qwen3"),
    "qwen3moe": Sizes("qwen3moe", experts=6, inner=32),
    **{name: NOVEL[name] for name in ("qwen35", "qwen35moe", "qwen3next", "gpt-oss")},
}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    path = tmp_path_factory.mktemp("plans") / f"{request.param}.gguf"
    return runtime.load(write_model(path, ARCHITECTURES[request.param], "Q4_0"), devices="null")


def _plan(model: Model, tokens: int, outputs: int) -> Plan:
    return model.backend.plan(model.graph(tokens, outputs))  # type: ignore[attr-defined]


@pytest.mark.parametrize("tokens", [1, 16])
def test_snapshot(model: Model, tokens: int):
    text = f"{_plan(model, tokens, 1)}\n"
    path = PLANS / f"{model.architecture}-{tokens}.txt"
    if os.environ.get("UPDATE_PLANS"):
        path.write_text(text, encoding="utf-8")
    assert path.read_text(encoding="utf-8") == text


def test_no_copies_and_few_ops(model: Model):
    plan = _plan(model, 1, 1)
    p = model._engine.architecture.p
    assert plan.copies() == 0
    assert len(plan.instructions) <= p.layers * (11 if p.experts else 9) + 3


def test_calls_of_a_row_need_no_barrier(model: Model):
    """Inside a row nothing is touched that another call writes, but what a thread owns in both."""
    for tokens in (1, 16):
        for row in _plan(model, tokens, 1).instructions:
            for i, call in enumerate(row.calls):
                for before in row.calls[:i]:
                    shared = {*before.writes} & {*call.reads, *call.writes}
                    shared |= {*before.reads} & {*call.writes}
                    assert all(before.aligned(call, buffer) for buffer in shared)


def test_rows_keep_the_order_of_dependent_calls(model: Model):
    """Run in the plan's order every call reads what the plain order would have it read."""
    for tokens in (1, 16):
        graph = model.graph(tokens, 1)
        plain = [c.node.name for c in lower(graph, options()).calls() if c.node.op == "linear"]
        assert len(plain) == len(set(plain))
        written: set = set()
        for call in lower(graph, options()).calls():
            missing = [b for b in call.reads if b.kind == "arena" and b not in written]
            assert not missing, f"{call.kernel} reads {missing} before anything wrote it"
            written.update(call.writes)


def _call(reads: list[Buffer], writes: list[Buffer], divided: int = 0) -> Call:
    node = ops.step_input("x", (1,))
    own = frozenset((*reads, *writes)) if divided else frozenset()
    return Call(Kernel.of("add"), {}, tuple(reads), tuple(writes), node, divided, own)


def test_what_joins_a_row():
    """Independent calls, and those whose threads need what they made themselves; no others."""
    a, b, c, d, e = (Buffer("arena", name, 64) for name in "abcde")
    calls = [
        _call([a], [b], 96), _call([a], [c], 96), _call([b, c], [d], 96),  # one division: row 0
        _call([d], [e], 64),  # another division: row 1
        _call([a], [Buffer("arena", "f", 64)]),  # depends on nothing: row 0
        _call([e], [b], 96),  # reads what row 1 wrote: row 2
        _call([c], [e]),  # overwrites what row 2 reads: row 3
    ]  # fmt: skip
    rows = [[calls.index(call) for call in row.calls] for row in make_rows(calls)]
    assert rows == [[0, 1, 2, 4], [3], [5], [6]]


def test_a_part_of_a_row_is_nobodys_own():
    """A view that begins inside a row is divided at other places than the row itself."""
    step = ops.step_input("x", (ops.Dim("tokens", 1), 64), ops.DTYPES["f32"])
    w, half = (ops.weight(f"w{n}", (n, 64), ops.DTYPES["f32"]) for n in (128, 64))
    both = ops.matmul(step, w)
    parts = (ops.slice_(both, axis=1, start=64 * i, stop=64 * i + 64) for i in range(2))
    gate, up = parts
    out = ops.matmul(ops.mul(ops.silu(gate), up), half)
    plan = lower(ops.Graph((out,)), options(activations="f32"))
    assert [len(row.calls) for row in plan.instructions] == [1, 1, 1, 1], str(plan)


def test_buffers_that_live_together_do_not_overlap(model: Model):
    for guarded in (False, True):
        graph = model.graph(16, 16)
        plan = lower(graph, options(), guarded)
        lives: dict = {}
        for row, instruction in enumerate(plan.instructions):
            for buffer in (*instruction.reads, *instruction.writes):
                if buffer.kind == "arena":
                    lives.setdefault(buffer, []).append(row)
        spans = [(b, min(at), max(at)) for b, at in lives.items()]
        for i, (a, first, last) in enumerate(spans):
            for b, start, stop in spans[i + 1 :]:
                if first <= stop and start <= last:
                    apart = a.offset + a.nbytes <= b.offset or b.offset + b.nbytes <= a.offset
                    assert apart, f"{a.key} and {b.key} overlap"
        if not guarded:
            separate = sum(b.nbytes for b in lives)
            assert plan.arena_nbytes < separate / 2, "memory is not reused"


def test_plan_of_an_80b_graph_takes_no_memory():
    """The null backend plans models far larger than this machine."""
    step = ops.Dim("tokens", 512)
    x = ops.step_input("x", (step, 8192), ops.DTYPES["f32"])
    for i in range(80):
        w = ops.weight(f"w{i}", (8192, 8192), ops.DTYPES["q4_0"])
        x = ops.add(x, ops.matmul(ops.rms_norm(x, ops.weight(f"n{i}", (8192,), x.dtype), eps=0), w))
    plan = lower(ops.Graph((x,)), options())
    assert len(plan.instructions) == 160


def test_select_early_changes_nothing_but_the_cost(small_model: Path):
    with runtime.load(small_model, devices="reference", context=64) as model:
        graph = model.graph(16, 1)
        early = ops.select_early(graph)
        assert early.cost().flops < graph.cost().flops
        inputs = _step(np.arange(9), [4])
        live = {"tokens": 9, "outputs": 1}
        want = model.backend.program(graph).run(inputs, live)[0]
        got = model.backend.program(early).run(inputs, live)[0]
    np.testing.assert_allclose(got, want, rtol=1e-12)


def _step(tokens: np.ndarray, rows: list[int]) -> dict[str, np.ndarray]:
    places = np.arange(len(tokens), dtype=np.int32)
    table = np.zeros((1, 2), np.int32)
    return {
        "tokens": tokens, "positions": places, "places": places, "slots": places, "table": table,
        "sequences": np.zeros(len(tokens), np.int32), "output_rows": np.array(rows),
    }  # fmt: skip


def test_every_op_has_a_rule():
    lower(ops.Graph((ops.silu(ops.step_input("x", (2, 8), ops.DTYPES["f32"])),)), options())
    plain = {name for name, op in OPS.items() if not op.view}
    missing = plain - set(RULES.names()) - {"matmul", "matmul_id"}  # those two become packed forms
    assert not missing


@pytest.mark.parametrize("lengths", [[1], [20], [3, 1, 1, 30, 8], [8, 8], [1] * 12])
def test_attention_tiles_cover_each_token_once(lengths: list[int]):
    sequences = np.repeat(np.arange(len(lengths)), lengths).astype(np.int32)
    out = np.zeros((len(sequences), 4), np.int32)
    n = attention_tiles(sequences, len(sequences), out)
    covered = []
    for first, count, row, _ in out[:n]:
        assert 1 <= count <= TILE_TOKENS
        assert (sequences[first : first + count] == row).all()
        covered += range(first, first + count)
    assert covered == list(range(len(sequences)))
