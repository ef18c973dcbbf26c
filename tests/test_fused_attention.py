"""Gated layers as graphs: fused plans have no copies and give the bits of the plain ones."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from stored_tensors import Stored, file_of

from runtime import ops
from runtime.backends.cpu import CpuBackend
from runtime.backends.passes.rotate_cache import rotate_cache
from runtime.backends.reference import ReferenceBackend
from runtime.ops.dtypes import F32
from runtime.ops.kv_formats import kv_format

HIDDEN, HEADS, KV_HEADS, DIM, TOKENS, PAGES = 64, 4, 2, 64, 6, 3
EPS, SECTIONS = 1e-6, (4, 2, 2, 0)


def _file(**shapes: tuple[int, ...]) -> SimpleNamespace:
    rng = np.random.default_rng(5)

    def tensor(shape: tuple[int, ...]) -> Stored:
        value = (rng.standard_normal(shape) / shape[-1] ** 0.5).astype(np.float32)
        return Stored(value)

    tensors = {name: tensor(shape) for name, shape in shapes.items()}
    return file_of(tensors)


FILE = _file(
    q=(HEADS * 2 * DIM, HIDDEN), k=(KV_HEADS * DIM, HIDDEN), v=(KV_HEADS * DIM, HIDDEN),
    q_norm=(DIM,), k_norm=(DIM,), out=(HIDDEN, HEADS * DIM), z=(HEADS * DIM, HIDDEN), norm=(DIM,),
    plain_q=(HEADS * DIM, HIDDEN), up=(HEADS * DIM, HIDDEN),
)  # fmt: skip


def w(name: str) -> ops.Tensor:
    return ops.weight(name, FILE.tensors[name].shape, F32)


def tokens() -> ops.Dim:
    return ops.Dim("tokens", TOKENS)


def gated_attention(*, norm: bool = True, rope: bool = True, kv: str = "f32") -> ops.Graph:
    """Qwen3.5's full attention: query and gate of each head in one projection, M-RoPE.

    Rotated where the cache type asks for it.
    """
    t = tokens()
    x = ops.step_input("x", (t, HIDDEN), F32)
    both = ops.reshape(ops.matmul(x, w("q")), shape=(t, HEADS, 2 * DIM))
    q = ops.slice_(both, axis=2, start=0, stop=DIM)
    gate = ops.slice_(both, axis=2, start=DIM, stop=2 * DIM)
    k, v = (ops.split_heads(ops.matmul(x, w(name)), KV_HEADS) for name in "kv")
    if norm:
        q, k = (ops.rms_norm(y, w(n), eps=EPS) for y, n in ((q, "q_norm"), (k, "k_norm")))
    if rope:
        half = sum(SECTIONS)
        frequencies = ops.constant("inv_freq", (1e4 ** (-np.arange(half) / half)).astype("f4"))
        components = ops.constant("components", ops.rope_components(SECTIONS, half, True))
        positions = ops.step_input("positions", (t, 4))
        angles = ops.rope_angles(positions, frequencies, components, magnitude=1.0)
        q, k = (ops.rope(y, angles, style="neox") for y in (q, k))
    kinds = {"k": k, "v": v}
    kv_slots = ops.step_input("kv_slots", (t,))
    pages = {
        which: ops.kv_write(
            y, ops.state(which, (PAGES, ops.PAGE, KV_HEADS, DIM), kv_format(kv).dtype), kv_slots,
            which=which, kv=kv,
        )
        for which, y in kinds.items()
    }  # fmt: skip
    y = ops.attention(
        q, pages["k"], pages["v"], ops.step_input("block_table", (1, PAGES)),
        ops.step_input("sequences", (t,)), ops.step_input("places", (t,)), scale=DIM**-0.5,
    )  # fmt: skip
    opened = ops.mul(y, ops.sigmoid(gate))
    out = ops.add(x, ops.matmul(ops.merge_heads(opened), w("out")))
    return rotate_cache(ops.Graph((out,)))


def gated_norm() -> ops.Graph:
    """The end of a delta-net layer: per-head norm, gated by a projection."""
    t = tokens()
    x = ops.step_input("x", (t, HIDDEN), F32)
    y = ops.split_heads(ops.matmul(x, w("plain_q")), HEADS)
    z = ops.split_heads(ops.matmul(x, w("z")), HEADS)
    gated = ops.mul(ops.rms_norm(y, w("norm"), eps=EPS), ops.silu(z))
    return ops.Graph((ops.matmul(ops.merge_heads(gated), w("out")),))


def clamped_ffn() -> ops.Graph:
    """gpt-oss's activation in a feed-forward network."""
    x = ops.step_input("x", (tokens(), HIDDEN), F32)
    gate, up = (ops.scale(ops.matmul(x, w(name)), factor=8.0) for name in ("z", "up"))
    inner = ops.swiglu_oai(gate, up, alpha=1.702, limit=7.0)
    return ops.Graph((ops.matmul(inner, w("out")),))


def step(live: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    places = np.arange(live, dtype=np.int32)
    return {
        "x": rng.standard_normal((live, HIDDEN)).astype(np.float32),
        "positions": rng.integers(0, 900, (live, 4)).astype(np.int32),
        "kv_slots": places + ops.PAGE, "places": places,
        "block_table": np.array([[1, 0, 2]], np.int32), "sequences": np.zeros(live, np.int32),
        "rows": np.array([live - 1, 0], np.int32),
    }  # fmt: skip


def run(graph: ops.Graph, live: int, activations: str = "f32", **options) -> np.ndarray:
    backend = CpuBackend(FILE, activations=activations, **options)
    values = backend.program(graph).run(_given(graph, live), {"tokens": live, "outputs": 2})
    result = np.array(values[0])
    backend.close()
    return result


def _given(graph: ops.Graph, live: int) -> dict[str, np.ndarray]:
    names = {leaf.name for leaf in graph.leaves("input")}
    return {name: value for name, value in step(live).items() if name in names}


def kernels(graph: ops.Graph) -> list[str]:
    backend = CpuBackend(FILE, activations="f32")
    return [kernel.name for kernel in backend.plan(graph).kernels()]


GRAPHS = {
    "attention": (gated_attention(), "sigmoid_gate_pack"),
    "attention without norm": (gated_attention(norm=False), "sigmoid_gate_pack"),
    "attention without rope": (gated_attention(norm=False, rope=False), "sigmoid_gate_pack"),
    "rotated attention": (gated_attention(kv="q8_0"), "sigmoid_gate_pack"),
    "norm": (gated_norm(), "gated_norm_pack"),
    "clamped": (clamped_ffn(), "swiglu_pack"),
}


@pytest.mark.parametrize("live", [1, TOKENS])
@pytest.mark.parametrize("graph, fused", GRAPHS.values(), ids=GRAPHS)
def test_fused_has_the_bits_of_plain_ops(graph: ops.Graph, fused: str, live: int):
    assert fused in kernels(graph)
    plain = {"sigmoid", "silu", "mul", "rms_norm", "rope", "swiglu_oai", "hadamard"}
    assert not plain & set(kernels(graph))
    found = run(graph, live, threads=2)
    np.testing.assert_array_equal(found, run(graph, live, threads=1, fuse=False))
    reference = ReferenceBackend(FILE).program(graph)
    wanted = reference.run(_given(graph, live), {"tokens": live})[0]
    limit = 1e-10 if graph is GRAPHS["rotated attention"][0] else 1e-11  # weights of 15 bits
    assert ((found - wanted) ** 2).sum() <= limit * (wanted**2).sum()


def test_wanted_rows_are_picked_before_the_gate():
    graph = gated_attention()
    rows = ops.step_input("rows", (ops.Dim("outputs", 2),))
    some = ops.Graph((ops.select_rows(graph.outputs[0], rows),))
    assert "sigmoid_gate_pack" in kernels(some)
    whole = run(graph, TOKENS)
    np.testing.assert_array_equal(run(some, TOKENS), whole[[TOKENS - 1, 0]])
