"""Element types and shapes that are no matrices of float32: read where they lie, or refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from guarded import damaged, poison

from runtime import ops
from runtime.backends.cpu import CpuBackend
from runtime.backends.reference import ReferenceBackend
from runtime.ops.dtypes import BF16, DTYPES, F16, F32, I32
from runtime.ops.errors import BackendError


def both(graph: ops.Graph, **inputs: np.ndarray) -> list[np.ndarray]:
    """The CPU's results, which must be the reference's."""
    live = {"tokens": len(inputs["x"])} if inputs["x"].ndim else {}
    cpu = CpuBackend(threads=2)
    got = [x.copy() for x in cpu.program(graph).run(inputs, live)]
    cpu.close()
    for a, b in zip(got, ReferenceBackend().program(graph).run(inputs, live), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a.astype(np.float64), b, rtol=1e-6)
    return got


@pytest.mark.parametrize("dtype", [F32, F16, I32])
@pytest.mark.parametrize("start", [0, 3])
def test_part_of_an_input_is_copied_from_its_place(dtype: Any, start: int):
    """Offsets count in the input's own type."""
    x = ops.step_input("x", (ops.Dim("tokens", 4), 2, 24), dtype)
    part = ops.slice_(x, axis=2, start=start, stop=start + 17)
    turned = ops.permute(part, axes=(0, 2, 1))
    value = np.arange(3 * 48).reshape(3, 2, 24).astype(dtype.numpy)
    got = both(ops.Graph((ops.copy(part), ops.copy(turned))), x=value)
    np.testing.assert_array_equal(got[0], value[..., start : start + 17])
    np.testing.assert_array_equal(got[1], value[..., start : start + 17].transpose(0, 2, 1))
    assert got[0].dtype == dtype.numpy


def test_types_flow_from_the_first_input():
    x = ops.step_input("x", (ops.Dim("tokens", 4), 32), F16)
    w = ops.weight("w", (8, 32), DTYPES["q8_0"])
    nodes = [
        ops.silu(x), ops.add(x, x), ops.matmul(x, w), ops.softmax(x), ops.copy(x),
        ops.reshape(x, shape=(x.shape[0], 4, 8)), ops.select_rows(x, ops.step_input("i", (2,))),
    ]  # fmt: skip
    assert [node.dtype for node in nodes] == [F16] * len(nodes)
    ids = ops.step_input("ids", (2,))
    assert ops.get_rows(w, ids).dtype is F32 and ops.top_k(x, k=2).dtype is I32


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_a_type_that_a_kernel_cannot_read_is_named(dtype: Any):
    x = ops.step_input("x", (3, 32), dtype)
    for node in (ops.silu(x), ops.silu(ops.copy(x)), ops.rms_norm(x, x.with_(shape=(32,)), eps=0)):
        with pytest.raises(BackendError, match=rf"cannot run.*{dtype.name}.*neither f32"):
            CpuBackend().plan(ops.Graph((node,)))


def test_one_number_is_a_tensor_without_axes():
    x = ops.step_input("x", (), F32)
    doubled = ops.add(ops.scale(x, factor=1.5), x)
    one = ops.reshape(ops.silu(ops.reshape(doubled, shape=(1, 1))), shape=())
    assert (doubled.shape, doubled.size, doubled.nbytes, one.shape) == ((), 1, 4, ())
    got = both(ops.Graph((doubled, one, ops.copy(one))), x=np.array(2.0, np.float32))
    assert float(got[0]) == 5.0 and got[2].shape == ()
    assert ops.Graph((one,)).cost().flops == 1 + 1 + 5


def test_a_copy_has_live_rows_and_no_more():
    x = ops.step_input("x", (ops.Dim("tokens", 6), 40), F32)
    node = ops.copy(ops.slice_(x, axis=1, start=1, stop=38))
    cpu = CpuBackend(threads=2)
    program = cpu.bind(cpu.plan(ops.Graph((node,)), guarded=True))
    poison(program)
    value = np.random.default_rng(0).standard_normal((4, 40)).astype(np.float32)
    (got,) = program.run({"x": value}, {"tokens": 4})
    np.testing.assert_array_equal(got, value[:, 1:38])
    assert not damaged(program) and np.isnan(program._outputs[0][4:]).all()
    cpu.close()


def test_two_step_inputs_of_one_name_are_refused():
    """A step has one array for a name; two equal declarations are one input."""
    first, again, other = (ops.step_input("x", (3, n), F32) for n in (8, 8, 5))
    assert CpuBackend().plan(ops.Graph((ops.add(first, again),)))
    with pytest.raises(BackendError, match=r"two step inputs of one name: x.*\[3, 8\].*\[3, 5\]"):
        CpuBackend().plan(ops.Graph((ops.silu(first), ops.silu(other))))
