"""Plans: snapshots per architecture, no copies, rows that need no barrier inside, memory reused.

A changed kernel choice or buffer shows as a diff of tests/plans/*.txt; write them again with
`UPDATE_PLANS=1 pytest tests/test_plans.py` and read the diff.
"""

from __future__ import annotations

import importlib
import math
import os
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from small_models import HYBRID, NOVEL, Sizes, write_model

import runtime
from runtime import ops
from runtime.backends.cpu.abi import ATTENTION_TOKENS
from runtime.backends.cpu.planner import make_plan, options
from runtime.backends.cpu.rules import RULES
from runtime.backends.cpu.run.program import attention_tiles
from runtime.backends.passes.prepare import prepare
from runtime.backends.plan.kernel import Kernel
from runtime.backends.plan.plan import Buffer, Call, Plan, schedule
from runtime.gguf import GGUFFile
from runtime.memory import budget
from runtime.model import Model
from runtime.ops.dtypes import F32, nbytes_for
from runtime.ops.registry import OPS, find

PLANS = Path(__file__).parent / "plans"
SCRIPTS = Path(__file__).parent.parent / "scripts"
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
    p = model._engine.architecture.p
    # of a prompt the row whose logits are wanted: the last layer's residual, attention, its gate
    for tokens, moved in ((1, 0), (16, 3 if model.architecture in HYBRID else 2)):
        plan = _plan(model, tokens, 1)
        assert plan.copies() == moved
    assert len(_plan(model, 1, 1).instructions) <= p.layers * (11 if p.experts else 9) + 3


def test_calls_touch_the_state_that_their_op_declares(model: Model):
    """`reads` and `writes` of ops are what kernels do; splits and VALIDATE go by them."""
    for tokens in (1, 16):
        for call in _plan(model, tokens, 1).calls():
            inputs, op = call.node.inputs, find(call.node.op)
            reads, writes = ({inputs[i].base for i in of} for of in (op.reads, op.writes))
            read, written = (
                {b.tensor for b in of if b.memory == "state"} for of in (call.reads, call.writes)
            )
            assert written == writes, op.name
            assert reads <= read <= reads | writes, op.name


def test_copies_of_views_are_seen():
    """A copy, rows picked from an activation; not rows of a table, nor what computes something."""
    t, r = ops.Dim("tokens", 4), ops.Dim("outputs", 1)
    rows = ops.get_rows(ops.weight("t", (9, 64), F32), ops.step_input("ids", (t,)))
    turned = ops.copy(ops.permute(ops.split_heads(rows, 2), axes=(1, 0, 2)))
    picked = ops.select_rows(ops.silu(rows), ops.step_input("wanted", (r,)))
    plan = make_plan(ops.Graph((turned, picked)), options())
    assert plan.copies() == 2 and " 2 copies" in str(plan)
    assert "copy-item=4" in str(plan)


Place = tuple[int, int]  # of a call: its row, its number in that row


@pytest.mark.parametrize("tokens", [1, 16])
def test_barriers_stand_where_nodes_depend_on_each_other(model: Model, tokens: int):
    """By the nodes of the graph alone, whatever buffers say.

    A call stands behind a barrier from whatever it reads, or in the same row behind it where a
    thread needs no more than the columns it made itself. Calls that touch a state one of them
    writes are rows apart, in the graph's order.
    """
    graph = prepare(model.graph(tokens, 1), options())
    plan = RULES.plan(graph)
    places = {
        call.node: (n, i)
        for n, row in enumerate(plan.instructions)
        for i, call in enumerate(row.calls)
    }
    assert len(places) == len(plan.calls()), "two calls of one node"
    for node in (n for n in graph.nodes if n in places):
        for at, x in enumerate(node.inputs):
            for made in _makers(x, places):
                assert places[made] < places[node], f"{node!r} runs before {made!r}"
                if places[made][0] == places[node][0]:
                    assert _by_columns(node, at, made), f"no barrier from {made!r} to {node!r}"
    _check_states(graph, plan)


def _makers(x: ops.Tensor, places: dict[ops.Tensor, Place]) -> list[ops.Tensor]:
    """The nodes with calls that x comes from, by whatever views and names."""
    return [x] if x in places else [m for y in x.inputs for m in _makers(y, places)]


def _by_columns(node: ops.Tensor, at: int, made: ops.Tensor) -> bool:
    """Whether threads divide the columns of both alike, and input `at` is read by column."""
    added = len(node.inputs) - 1 if node.attrs.get("add") else -1
    terms = ("", "", *node.attrs.get("terms", ()))
    columns = {
        "linear": (added,), "swiglu_pack": (0, 1),
        "expert_sum": (0, *(i for i, term in enumerate(terms) if term in ("shared", "add"))),
    }  # fmt: skip
    x = node.inputs[at]
    alike = made.op in (*columns, "linear_id") and made.attrs.get("every", 1)
    return bool(alike and at in columns.get(node.op, ()) and x.shape[-1] == made.shape[-1])


def _check_states(graph: ops.Graph, plan: Plan) -> None:
    order = {node: n for n, node in enumerate(graph.nodes)}
    touched: dict[Buffer, list[tuple[int, int, bool]]] = {}
    for n, row in enumerate(plan.instructions):
        for call in row.calls:
            for buffer in {*call.reads, *call.writes}:
                if buffer.memory == "state":
                    entry = order[call.node], n, buffer in call.writes
                    touched.setdefault(buffer, []).append(entry)
    for buffer, calls in touched.items():
        for (_, row, writes), (_, later, writes_too) in pairwise(sorted(calls)):
            assert row < later or not (writes or writes_too), f"{buffer} has no barrier"


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
    rows = [[calls.index(call) for call in row.calls] for row in schedule(calls)]
    assert rows == [[0, 1, 2, 4], [3], [5], [6]]


def test_a_part_of_a_row_is_nobodys_own():
    """A view that begins inside a row is divided at other places than the row itself."""
    step = ops.step_input("x", (ops.Dim("tokens", 1), 64), ops.DTYPES["f32"])
    w, half = (ops.weight(f"w{n}", (n, 64), ops.DTYPES["f32"]) for n in (128, 64))
    both = ops.matmul(step, w)
    parts = (ops.slice_(both, axis=1, start=64 * i, stop=64 * i + 64) for i in range(2))
    gate, up = parts
    out = ops.matmul(ops.mul(ops.silu(gate), up), half)
    plan = make_plan(ops.Graph((out,)), options(activations="f32"))
    assert [len(row.calls) for row in plan.instructions] == [1, 1, 1, 1], str(plan)


def test_buffers_that_live_together_do_not_overlap(model: Model):
    for guarded in (False, True):
        graph = model.graph(16, 16)
        plan = make_plan(graph, options(), guarded)
        lives: dict = {}
        for row, instruction in enumerate(plan.instructions):
            for buffer in (*instruction.reads, *instruction.writes):
                if buffer.memory == "arena":
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


@pytest.fixture
def qwen3next_80b(monkeypatch: pytest.MonkeyPatch) -> Model:
    """Qwen3-Next-80B-A3B in Q4_K_M as a file of shapes, on the null backend."""
    monkeypatch.syspath_prepend(SCRIPTS)
    script, presets = (importlib.import_module(n) for n in ("make_random_model", "random_presets"))
    preset, tensors = presets.PRESETS["qwen3next-80b"], {}
    types = script.types_of(preset, "Q4_K_M")
    for slot in preset.tensors(preset):
        dtype = types[slot.name]
        nbytes = nbytes_for(dtype, slot.shape)
        tensors[slot.name] = SimpleNamespace(shape=slot.shape, dtype=dtype, nbytes=nbytes)
    keys = script.metadata_of(preset, "80b", "Q4_K_M")
    file = GGUFFile(Path("80b.gguf"), 3, keys, tensors, 0)  # type: ignore[arg-type]
    monkeypatch.setattr(budget, "available_memory", lambda: 128 << 30)
    return Model(file, "null", "q8_0", 65_536, None, "int8", 4, False)


def test_plan_of_an_80b_model_takes_no_memory(qwen3next_80b: Model):
    """The null backend plans models far larger than this machine."""
    model, file = qwen3next_80b, qwen3next_80b.file
    assert 79e9 < sum(math.prod(t.shape) for t in file.tensors.values()) < 80e9
    memory = model._engine.memory
    assert memory.page == 12 * 2 * (2 * ops.PAGE * 256 * 34 // 32)  # K and V of 2 heads, q8_0
    assert memory.state == 36 * 4 * (32 * 128 * 128 + 3 * 8192)
    assert memory.weights == file.tensors_nbytes == 48_483_058_688
    for tokens, rows, moved, arena in ((1, 531, 0, 620 << 10), (512, 768, 3, 68 << 20)):
        plan = _plan(model, tokens, 1)
        assert (len(plan.instructions), plan.copies()) == (rows, moved)
        assert arena * 0.9 < plan.arena_nbytes <= arena
        read = {
            b.key: b.nbytes for b in plan.buffers() if b.memory in ("raw", "repacked", "vector")
        }
        assert sum(read.values()) == file.tensors_nbytes
        assert sum(b.memory == "state" for b in plan.buffers()) == (12 + 36) * 2


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
        "tokens": tokens, "positions": places, "places": places, "kv_slots": places,
        "block_table": table, "sequences": np.zeros(len(tokens), np.int32),
        "output_rows": np.array(rows),
    }  # fmt: skip


def test_every_op_has_a_rule():
    make_plan(ops.Graph((ops.silu(ops.step_input("x", (2, 8), ops.DTYPES["f32"])),)), options())
    plain = {name for name, op in OPS.items() if not op.view}
    missing = plain - set(RULES.names()) - {"matmul", "matmul_id"}  # those two become packed forms
    assert not missing


@pytest.mark.parametrize("lengths", [[1], [20], [3, 1, 1, 80, 8], [32, 32], [33, 1], [1] * 12])
def test_attention_tiles_cover_each_token_once(lengths: list[int]):
    sequences = np.repeat(np.arange(len(lengths)), lengths).astype(np.int32)
    out = np.zeros((len(sequences), 4), np.int32)
    n = attention_tiles(sequences, len(sequences), out)
    covered = []
    for first, count, row, _ in out[:n]:
        assert 1 <= count <= ATTENTION_TOKENS
        assert (sequences[first : first + count] == row).all()
        covered += range(first, first + count)
    assert covered == list(range(len(sequences)))
