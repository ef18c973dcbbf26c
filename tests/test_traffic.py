"""Bytes that a token must move, worked out by hand for small models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from small_models import Sizes, write_model

import runtime
from runtime import ops, traffic
from runtime.cli import facts
from runtime.gguf.reader import open_gguf
from runtime.ops.cost import Seen, cost, moves
from runtime.ops.dtypes import F16, F32, I32

KV = ("f16", "f16")
SIZES = [
    Sizes(),
    *(Sizes(name, experts=6, used=2, inner=32) for name in ("qwen3moe", "qwen35moe", "qwen3next")),
]


def moved(path: Path, context: int = 0, kv: tuple[str, str] = KV) -> traffic.Traffic:
    return traffic.of_file(open_gguf(path), kv, context)


def test_a_tied_embedding_is_read_once_as_the_output(tmp_path: Path):
    path = write_model(tmp_path / "tied.gguf")
    assert moved(path).weights == open_gguf(path).tensors_nbytes


def test_an_embedding_beside_an_output_gives_one_row(tmp_path: Path):
    output = np.ones((80, 64), np.float32)
    path = write_model(tmp_path / "untied.gguf", replace={"output.weight": output})
    others = open_gguf(path).tensors_nbytes - output.nbytes
    assert moved(path).weights == others + output.nbytes // 80


def test_of_experts_the_chosen_ones_count(tmp_path: Path):
    path = write_model(tmp_path / "moe.gguf", Sizes("qwen3moe", experts=6, used=2, inner=32))
    tensors = open_gguf(path).tensors
    experts = sum(t.nbytes for name, t in tensors.items() if "_exps" in name)
    others = sum(t.nbytes for name, t in tensors.items() if "_exps" not in name)
    assert moved(path).weights == pytest.approx(others + experts * 2 / 6)
    matrices = [t for t in tensors.values() if len(t.shape) > 1 and t.name != "token_embd.weight"]
    shares = {t.name: 2 / 6 if "_exps" in t.name else 1 for t in matrices}
    assert moved(path).macs == pytest.approx(sum(t.nbytes / 4 * shares[t.name] for t in matrices))


def test_the_cache_counts_by_its_types(tmp_path: Path):
    path = write_model(tmp_path / "m.gguf")  # 2 layers, 2 KV heads of 32
    values = 2 * 2 * 32
    assert moved(path, 100).kv == 100 * 2 * values * 2
    assert moved(path, 100, ("q8_0", "f16")).kv == 100 * values * (34 / 32 + 2)
    assert moved(path, 100).nbytes - moved(path, 0).nbytes == moved(path, 100).kv


def test_windows_bound_what_attention_reads():
    table = ops.weight("table", (4, 128), F32)
    q = ops.reshape(ops.get_rows(table, ops.step_input("tokens", (1,))), shape=(1, 4, 32))
    pages = ops.state("k", (1, 32, 2, 32), F16)
    rest = [
        ops.step_input(n, (1, 1) if n == "block_table" else (1,)) for n in ("block_table", "s", "p")
    ]
    for window, seen in ((0, 500), (128, 128)):
        node = ops.attention(q, pages, pages, *rest, scale=1.0, window=window)
        found = traffic.of_token(ops.Graph((node,), "g"), 500)
        assert found.kv == seen * 2 * 2 * 32 * 2


def test_recurrent_state_is_read_and_written():
    state = ops.state("state.0.conv", (1, 3, 16), F32, "slots")
    slot = [ops.step_input(n, (ops.Dim("sequences", 1),)) for n in ("slot_in", "slot_out")]
    spans = ops.step_input("spans", (ops.Dim("sequences", 1), 2))
    table, w = ops.weight("table", (5, 16), F32), ops.weight("w", (16, 4), F32)
    x = ops.get_rows(table, ops.step_input("tokens", (1,)))
    node = ops.short_conv(x, w, state, spans, *slot)
    found = traffic.of_token(ops.Graph((node,), "g"), 9)
    assert (found.state, found.weights, found.kv) == (2 * 3 * 16 * 4, 16 * 4 * 4 + 16 * 4, 0)


@pytest.mark.parametrize("name", ["qwen35", "qwen3next"])
def test_memory_and_traffic_of_hybrid_models(tmp_path: Path, name: str):
    """Of three layers in four a state, of the fourth a cache; one slot is read and one written."""
    size = Sizes(name, layers=4, interval=4, experts=6 if name == "qwen3next" else 0)
    file = open_gguf(write_model(tmp_path / "m.gguf", size))
    keys, values = size.key_heads * size.k_dim, size.value_heads * size.v_dim
    state = 3 * 4 * ((size.taps - 1) * (2 * keys + values) + values * size.k_dim)
    found, memory = traffic.of_file(file, KV, 10), facts.memory(file, "f16")
    assert found.state == 2 * state and found.kv == 10 * 2 * 2 * size.kv_heads * size.dim
    assert memory is not None and memory.state == state
    assert memory.of(64) == file.tensors_nbytes + state + 64 * 2 * 2 * size.kv_heads * size.dim


@pytest.mark.parametrize("size", SIZES, ids=lambda size: size.architecture)
def test_calls_of_a_plan_add_up_to_the_token(tmp_path: Path, size: Sizes):
    """Rows of the instruction table read every weight of the graph, and as much of each."""
    path = write_model(tmp_path / "m.gguf", size)
    inputs = {"sequences": np.array([0]), "places": np.array([63])}
    with runtime.load(path, devices="null") as model:
        seen = traffic.seen_by(inputs, LIVE, model.backend.page_nbytes)
        plan = model.backend.plan(model.graph(1, 1))
        token = traffic.of_token(model.graph(1, 1), 64)
        step = model.graph(1, 1).cost(seen)
    assert seen.lengths == (64,)
    found = [move for call in plan.calls() for move in moves(call.node, seen)]
    weights = sum(nbytes for tensor, nbytes, _ in found if tensor.base.op == "weight")
    row = 64 * 4  # the embedding's row is read from the file, beside the output's packed copy
    assert weights == pytest.approx(token.weights + row)
    states = [move for move in found if move.tensor.base.attrs.get("storage") in ("k", "v")]
    assert sum(m.nbytes for m in states if not m.written) == pytest.approx(token.kv)
    assert token.nbytes < step.bytes < 1.2 * token.nbytes, "the graph's own cost agrees"


LIVE = {"tokens": 1, "outputs": 1, "sequences": 1}


def _delta(slots: int) -> ops.Tensor:
    """Eight tokens of room, four sequences of room."""
    t, s = ops.Dim("tokens", 8), ops.Dim("sequences", 4)
    heads = [ops.step_input(name, (t, 2, 16), F32) for name in "qkv"]
    gates = [ops.step_input(name, (t, 2), F32) for name in ("decay", "beta")]
    state = ops.state("state.0.delta", (slots, 2, 16, 16), F32, "slots")
    where = [ops.step_input(n, (s, 2) if n == "spans" else (s,)) for n in ("spans", "in", "out")]
    return ops.gated_delta(*heads, *gates, state, *where, scale=1.0, order="tiled")


def test_state_slots_count_twice_per_live_sequence():
    seen = Seen({"tokens": 5, "sequences": 2})
    each = 2 * 16 * 16 * 4
    state = [m for m in moves(_delta(8), seen) if m.tensor.base.op == "state"]
    assert [m.nbytes for m in state] == [2 * each, 2 * each]
    assert [m.written for m in state] == [False, True]


def test_what_is_not_live_costs_nothing():
    node = _delta(8)
    per_token = cost(node, Seen({"tokens": 1, "sequences": 0})).bytes
    assert per_token == (4 * 2 * 16 + 2 * 2) * 4
    assert cost(node, Seen({"tokens": 3, "sequences": 0})).bytes == 3 * per_token
    assert cost(node, Seen()).flops == 8 / 3 * cost(node, Seen({"tokens": 3})).flops


def test_of_experts_as_many_as_are_chosen():
    """Never more than there are; each chosen one counts its matrix."""
    w = ops.weight("w", (6, 10, 32), F32)
    x, ids = (
        ops.step_input("x", (8, 32), F32),
        ops.step_input("ids", (ops.Dim("tokens", 8), 2), I32),
    )
    node = ops.matmul_id(x.with_(shape=(ids.shape[0], 32)), w, ids)
    for tokens, matrices in ((1, 2), (2, 4), (3, 6), (8, 6)):
        read = {m.tensor: m.nbytes for m in moves(node, Seen({"tokens": tokens}))}[w]
        assert read == matrices * 10 * 32 * 4
