"""The IR: construction errors, the walker, views, keys, printing, and the one arrow of imports."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime import ops
from runtime.ops.dtypes import F32, Q8_0
from runtime.ops.errors import OpError
from runtime.ops.views import reshape_strides

ROOT = Path(__file__).resolve().parents[1]


def _mlp(tokens: int = 4, name: str = "w") -> ops.Graph:
    x = ops.step_input("x", (ops.Dim("tokens", tokens), 32), F32)
    y = ops.matmul(x, ops.weight(name, (64, 32), Q8_0), name="up")
    return ops.Graph((ops.add(ops.matmul(ops.silu(y), ops.weight("d", (32, 64), F32)), x),))


def test_errors_name_op_shapes_and_tensor():
    x = ops.step_input("x", (4, 32), F32)
    with pytest.raises(
        OpError, match=r"matmul \(blk.0.q\): inner sizes 32 and 48 differ.*\[8, 48\]"
    ):
        ops.matmul(x, ops.weight("w", (8, 48), F32), name="blk.0.q")
    with pytest.raises(OpError, match="cannot reshape"):
        ops.reshape(x, shape=(3, 5))


def test_nodes_follow_their_inputs():
    graph = _mlp()
    seen: set[ops.Tensor] = set()
    for node in graph.nodes:
        assert seen.issuperset(node.inputs)
        seen.add(node)


def test_key_depends_on_content_alone():
    assert _mlp().key() == _mlp().key()
    others = {_mlp(8).key(), _mlp(name="v").key(), _mlp().key()}
    assert len(others) == 3


def test_walk_names_the_op_without_a_rule():
    with pytest.raises(OpError, match="no rule for op 'input'"):
        ops.walk(_mlp(), {})


def test_rewrite_replaces_and_keeps_the_rest():
    def silu(node: ops.Tensor, x: ops.Tensor) -> ops.Tensor:
        return ops.sigmoid(x)

    before = _mlp()
    after = ops.rewrite(before, {"silu": silu})
    assert "silu" not in {n.op for n in after.nodes}
    assert after.outputs[0].shape == before.outputs[0].shape
    untouched = ops.rewrite(before, {})
    assert untouched.outputs == before.outputs


def test_print_shows_every_op_once():
    text = str(_mlp())
    assert "%2 = silu(%1) f32[tokens:4, 64]" in text
    assert text.count("matmul(") == 2 and text.endswith("return %4")


def test_cost_counts_bytes_and_flops():
    x = ops.step_input("x", (2, 32), F32)
    cost = ops.Graph((ops.matmul(x, ops.weight("w", (8, 32), Q8_0)),)).cost()
    assert cost.flops == 2 * 2 * 8 * 32
    assert cost.bytes == 2 * 32 * 4 + 2 * 8 * 4 + 8 * 34


def test_a_declaration_that_contradicts_itself_is_refused():
    """Splits, cost and VALIDATE believe what an op says of its state."""
    wrong: dict[str, dict[str, Any]] = {
        "reads or writes an input": {"kind": ops.Kind.STATEFUL},
        "what is stateful reads": {"kind": ops.Kind.ROWWISE, "writes": (1,), "picks": {1: 2}},
        "`picks` says what": {"kind": ops.Kind.STATEFUL, "reads": (1,)},
        "a view has a layout": {"kind": ops.Kind.VIEW},
    }
    for message, declared in wrong.items():
        with pytest.raises(OpError, match=f"op 'wrong': .*{message}"):
            ops.op("wrong", shape=ops.registry.same_shape, **declared)(np.copy)
    assert "wrong" not in ops.OPS


def test_an_empty_share_costs_nothing():
    ids = ops.step_input("ids", (ops.Dim("tokens", 4), 2))
    x = ops.step_input("x", (ids.shape[0], 32), F32)
    none = ops.weight("w", (6, 8, 32), F32, {0: ()})
    node = ops.matmul_id(x, none, ids)
    assert ops.Graph((node,)).cost().bytes == 4 * (32 + 2 + 2 * 8) * 4


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_view_layouts_agree_with_numpy(data: st.DataObject):
    """Random chains of views address the same elements as numpy's own."""
    shape = tuple(data.draw(st.lists(st.integers(1, 4), min_size=2, max_size=3)))
    x = ops.step_input("x", shape, F32)
    array = np.arange(int(np.prod(shape)), dtype=np.float32).reshape(shape)
    for _ in range(data.draw(st.integers(1, 4))):
        kind = data.draw(st.sampled_from(["permute", "slice", "flatten"]))
        if kind == "permute":
            axes = tuple(data.draw(st.permutations(range(x.ndim))))
            x, array = ops.permute(x, axes=axes), array.transpose(axes)
        elif kind == "slice":
            axis = data.draw(st.integers(0, x.ndim - 1))
            start = data.draw(st.integers(0, int(x.shape[axis]) - 1))
            x = ops.slice_(x, axis=axis, start=start, stop=int(x.shape[axis]))
            array = np.take(array, range(start, array.shape[axis]), axis)
        else:
            x, array = ops.reshape(x, shape=(x.size, 1)), array.reshape(-1, 1)
    try:
        layout = x.layout
    except OpError as error:
        assert "needs a copy" in str(error)
        return
    flat = np.arange(int(np.prod(shape)), dtype=np.float32)[layout.offset :]
    strides = tuple(4 * s for s in layout.strides)
    got = np.lib.stride_tricks.as_strided(flat, [int(n) for n in x.shape], strides)
    np.testing.assert_array_equal(got, array)


def test_reshape_of_transposed_needs_a_copy():
    with pytest.raises(OpError, match="needs a copy"):
        reshape_strides((3, 4), (1, 3), (12,))


LAYERS = {"ops": {"ops"}, "backends": {"ops", "backends"}}


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_point_one_way(layer: str):
    """ops <- backends <- runtime; bare `ops` or `backends` would be a second registry."""
    allowed = {f"runtime.{name}" for name in LAYERS[layer]} | {"runtime.backends.environment"}
    for path in (ROOT / layer).rglob("*.py"):
        for module in _imports(path):
            assert module.split(".")[0] not in ("ops", "backends"), f"{path}: {module}"
            inside = module == "runtime" or module.startswith("runtime.")
            top = ".".join(module.split(".")[:2])
            assert not inside or top in allowed, f"{path} imports {module}"
            if layer == "ops" and not inside:
                assert module.split(".")[0] not in ("numba", "llvmlite", "gguf"), (
                    f"{path}: {module}"
                )


def _imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.append(node.module or "")
    return found
