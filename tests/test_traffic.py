"""Bytes that a token must move, worked out by hand for small models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from small_models import Sizes, write_model

import runtime
from runtime import ops, traffic
from runtime.backends.plan.plan import Buffer, Call
from runtime.cli import facts
from runtime.gguf.reader import open_gguf
from runtime.ops.dtypes import F16, F32
from runtime.traffic import LiveStep

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
    rest = [ops.step_input(n, (1, 1) if n == "table" else (1,)) for n in ("table", "s", "p")]
    for window, seen in ((0, 500), (128, 128)):
        node = ops.attention(q, pages, pages, *rest, scale=1.0, window=window)
        found = traffic.of_token(ops.Graph((node,), "g"), 500)
        assert found.kv == seen * 2 * 2 * 32 * 2


def test_recurrent_state_is_read_and_written():
    state = ops.state("state.0.conv", (1, 3, 16), F32, "slots")
    slot = [ops.step_input(n, (ops.Dim("sequences", 1),)) for n in ("slot_in", "slot_out")]
    runs = ops.step_input("runs", (ops.Dim("sequences", 1), 2))
    table, w = ops.weight("table", (5, 16), F32), ops.weight("w", (16, 4), F32)
    x = ops.get_rows(table, ops.step_input("tokens", (1,)))
    node = ops.short_conv(x, w, state, runs, *slot)
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
        step = LiveStep.of(model.file, inputs, {"tokens": 1, "outputs": 1, "sequences": 1})
        plan = model.backend.plan(model.graph(1, 1))
        token = traffic.of_token(model.graph(1, 1), 64)
    assert step.lengths == (64,) and step.experts == ((2, 6) if size.experts else (0, 0))
    kinds = ("raw", "vector", "packed")
    weights = sum(
        step._of_weight(call, buffer)
        for call in plan.calls()
        for buffer in dict.fromkeys(call.reads)
        if buffer.kind in kinds
    )
    row = 64 * 4  # the embedding's row is read from the file, beside the output's packed copy
    assert weights == pytest.approx(token.weights + row)
    attention = [call for call in plan.calls() if call.kernel.name.startswith("attention")]
    pages = {b for call in attention for b in call.reads if b.kind == "state"}
    kv = sum(step._of_state(c, b) for c in attention for b in set(c.reads) & pages)
    assert kv == pytest.approx(token.kv)


def test_state_slots_of_a_call_count_twice_per_sequence():
    leaf = ops.state("state.0.delta", (8, 2, 16, 16), F32, "slots")
    buffer = Buffer("state", "state.0.delta", leaf.nbytes, tensor=leaf)
    call = Call(None, {}, (buffer,), (buffer,), leaf)  # type: ignore[arg-type]
    step = LiveStep({"tokens": 5}, (3, 2), (0, 0))
    assert step.nbytes(call) == 2 * 2 * (2 * 16 * 16 * 4)
