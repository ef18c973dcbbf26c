"""Every op on every backend: outputs poisoned and fenced, float64 numpy as the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from stored_tensors import Stored, file_of

from runtime import ops
from runtime.backends.cpu import CpuBackend
from runtime.backends.cpu.compile.library import Native, library
from runtime.backends.cpu.pages import from_plain, to_plain
from runtime.backends.cpu.rules import RULES
from runtime.backends.plan.kernel import Kernel
from runtime.backends.reference import ReferenceBackend
from runtime.ops.dtypes import F32, I32
from runtime.ops.errors import BackendError, OpError
from runtime.ops.registry import OPS, Case, Op, op
from runtime.ops.rounding import round_to

NAMES = [
    "add", "attention", "broadcast", "expert_bias", "expert_sum", "gated_delta", "get_rows",
    "kv_write", "l2_norm", "matmul", "matmul_id", "mul", "normalize", "permute", "reshape",
    "rms_norm", "rope", "rope_angles", "row_scale", "scale", "select_rows", "short_conv",
    "sigmoid", "silu", "slice", "softmax", "softplus", "swiglu_oai", "take", "top_k",
]  # fmt: skip

GRID = [
    pytest.param(name, case, id=f"{name}-{n}")
    for name in sorted(OPS)
    for n, case in enumerate(OPS[name].cases)
]


class Built:
    """One case as a graph over leaves, with their numbers."""

    def __init__(self, name: str, case: Case) -> None:
        rng = np.random.default_rng(1)
        self.inputs: dict[str, np.ndarray] = {}
        self.tensors: dict[str, Stored] = {}
        self.states: dict[str, tuple[ops.Tensor, np.ndarray]] = {}
        self.values: list[np.ndarray] = []
        leaves = [self._leaf(i, arg, rng) for i, arg in enumerate(case.arguments())]
        self.node = OPS[name](*leaves, name="result", **case.attrs)
        self.graph = ops.Graph((self.node,))

    def _leaf(self, i: int, arg: ops.Arg, rng: np.random.Generator) -> ops.Tensor:
        make = arg.make or (lambda r, s: r.standard_normal(s))
        value = np.asarray(make(rng, arg.shape))
        value = value.astype(np.int32 if arg.dtype is I32 else np.float32)
        name = f"x{i}"
        self.values.append(value.astype(np.float64) if value.dtype == np.float32 else value)
        if arg.leaf == "weight" or (arg.leaf == "input" and len(arg.shape) == 1 and i == 1
                                    and arg.dtype is F32):  # fmt: skip
            self.tensors[name] = Stored(np.ascontiguousarray(value))
            return ops.weight(name, arg.shape, F32)
        if arg.leaf == "state":
            leaf = ops.state(name, arg.shape, arg.dtype)
            self.states[name] = leaf, value
            return leaf
        if arg.leaf == "slots":
            leaf = ops.state(name, arg.shape, arg.dtype, "slots")
            self.states[name] = leaf, value
            return leaf
        self.inputs[name] = value
        return ops.step_input(name, arg.shape, arg.dtype)

    def file(self) -> Any:
        return file_of(self.tensors)

    def live(self) -> dict[str, int]:
        tokens = self.values[0].shape[0] if self.node.op == "attention" else 0
        return {"tokens": tokens}


def _which(built: Built, name: str) -> str:
    if built.node.op == "kv_write":
        return built.node.attrs["which"]
    return "k" if name == "x1" else "v"


def _reference(name: str, case: Case, built: Built) -> np.ndarray:
    return _reference_and_slots(name, case, built)[0]


def _reference_and_slots(
    name: str, case: Case, built: Built
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The result, and what it leaves in the slots of each such state."""
    values = [v.copy() for v in built.values]
    result = OPS[name].reference(*values, **case.attrs)
    slots = [k for k, (leaf, _) in built.states.items() if leaf.attrs["kind"] == "slots"]
    return result, {key: values[int(key[1:])] for key in slots}


def _error(got: np.ndarray, want: np.ndarray) -> float:
    return float(((got - want) ** 2).sum() / max(1e-300, float((want**2).sum())))


def test_op_names_are_pinned():
    assert sorted(OPS) == NAMES


def test_unknown_and_duplicate_ops_are_refused():
    with pytest.raises(OpError, match="did you mean 'rms_norm'"):
        ops.registry.find("rms_nrom")
    with pytest.raises(OpError, match="already declared"):
        op("add", shape=lambda x: x.shape, cases=[])(lambda x: x)


@pytest.mark.parametrize("name, case", GRID)
def test_shape_rule_agrees_with_reference(name: str, case: Case):
    built = Built(name, case)
    want = _reference(name, case, built)
    assert tuple(built.node.shape) == want.shape
    assert (built.node.dtype.name == "i32") == (want.dtype.kind == "i")


@pytest.mark.parametrize("name, case", GRID)
def test_reference_backend(name: str, case: Case):
    built = Built(name, case)
    if built.node.base.op in ("input", "weight", "state") and name != "kv_write":
        pytest.skip("a view of a leaf has no code of its own")
    backend = ReferenceBackend(built.file())
    for leaf, value in built.states.values():
        backend.state(leaf)[:] = value
    want, slots = _reference_and_slots(name, case, built)
    got = backend.program(built.graph).run(built.inputs, built.live())
    if name == "kv_write":
        got = [backend.state(built.states["x1"][0])]
    assert _error(got[0], want) <= case.tolerance
    for key, value in slots.items():
        assert _error(backend.state(built.states[key][0]), value) <= case.tolerance


@pytest.fixture(scope="module")
def compiled() -> None:
    """All kernels of the grid, compiled in parallel once."""
    backend = CpuBackend(activations="f32")
    built = [Built(p.values[0], p.values[1]) for p in GRID if not OPS[p.values[0]].view]
    library().prepare(backend.kernels([backend.plan(b.graph) for b in built]))


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name, case", GRID)
def test_cpu_backend(name: str, case: Case, threads: int):
    built = Built(name, case)
    if OPS[name].view:
        pytest.skip("a view has no kernel")
    backend = CpuBackend(built.file(), threads=threads, activations="f32")
    for key, (leaf, value) in built.states.items():
        if leaf.attrs["kind"] == "slots":
            backend.state(leaf)[:] = value.reshape(len(value), -1).view(np.uint8)
        else:
            backend.state(leaf)[:] = from_plain(value, leaf, _which(built, key))
    program = backend.bind(backend.plan(built.graph, guarded=True))
    program.poison()
    got = program.run(built.inputs, built.live())
    damaged = program.damaged()
    want, slots = _reference_and_slots(name, case, built)
    if name == "kv_write":
        leaf = built.states["x1"][0]
        got = [to_plain(backend.state(leaf), leaf, "k")]
    left = {key: backend.state(built.states[key][0]).copy() for key in slots}
    backend.close()
    assert not damaged, f"{name} wrote past the end of {damaged}"
    assert np.isfinite(got[0]).all(), f"{name} left results unwritten"
    if want.dtype.kind == "i":
        np.testing.assert_array_equal(got[0], want)
    else:
        assert _error(got[0], want) <= case.tolerance
    for key, value in slots.items():
        assert _error(left[key].view(np.float32).reshape(value.shape), value) <= case.tolerance


@pytest.mark.parametrize("kv", ["f32", "f16", "bf16", "q8_0"])
@pytest.mark.parametrize("which", ["k", "v"])
def test_pages_convert_exactly_both_ways(kv: str, which: str, rng: np.random.Generator):
    leaf = ops.state("cache", (3, ops.PAGE, 2, 64), ops.DTYPES[kv])
    plain = round_to(rng.standard_normal((3, ops.PAGE, 2, 64)).astype(np.float32), kv)
    memory = from_plain(plain, leaf, which)
    np.testing.assert_array_equal(to_plain(memory, leaf, which), plain)
    np.testing.assert_array_equal(from_plain(to_plain(memory, leaf, which), leaf, which), memory)


def _forgotten() -> dict[str, Op]:
    """An op that ops/elementwise.py might declare and that nothing else knows."""

    def cube(x: np.ndarray) -> np.ndarray:
        return x**3

    cube.__module__ = ops.add.reference.__module__
    return {"cube": Op("cube", ops.Kind.ELEMENTWISE, lambda x: x.shape, cube)}


def test_a_forgotten_place_of_a_new_op_is_named():
    with pytest.raises(
        OpError, match=r"'cube'.*@lowers\('cube'\) in backends/cpu/rules/elementwise.py"
    ):
        RULES.check(_forgotten())
    with pytest.raises(OpError, match=r"'cube' of ops/elementwise.py .* ops/__init__.py"):
        ops._check_exports(_forgotten())
    with pytest.raises(BackendError, match=r"write build_cube in a file of backends/cpu/kernels"):
        library().get(Kernel.of("cube"))
    with pytest.raises(BackendError, match=r"kernel cube takes x n; .* do not agree about n size"):
        Native(0, ("x", "n")).ordered(Kernel.of("cube"), {"x": 0, "size": 0})


def test_ops_declared_elsewhere_bring_their_own_rules():
    found = _forgotten()
    found["cube"].reference.__module__ = "notebook"
    RULES.check(found)
