"""Every op on every backend: outputs poisoned and fenced, float64 numpy as the reference."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import pytest
from guarded import damaged, poison
from op_grid import INPUTS, VIEWS, Built, grid
from oracles import ORACLES

from runtime import ops
from runtime.backends.base import Backend
from runtime.backends.cpu import CpuBackend
from runtime.backends.cpu.compile.library import Native, library
from runtime.backends.cpu.pages import from_plain, from_rows, to_plain, to_rows
from runtime.backends.cpu.rules import RULES
from runtime.backends.plan.kernel import Kernel
from runtime.backends.reference import ReferenceBackend
from runtime.ops.dtypes import BF16, F32, I32
from runtime.ops.errors import BackendError, OpError
from runtime.ops.kv_formats import KV_FORMATS, kv_format
from runtime.ops.quants import dequantize
from runtime.ops.registry import OPS, Kind, Op, op

GRID = [pytest.param(*point, id="-".join(map(str, point))) for point in grid()]
WHOLE = [point for point in GRID if point.values[2].split()[0] not in VIEWS]
# Forms of arguments that the rules of the CPU refuse by name, with the numbers of the cases: a
# kernel that would take them wrongly is worse than none; "*": all cases. It refuses floats of a
# step but f32 too, and of elementwise ops rows whose elements lie apart.
REFUSED: dict[str, dict[str, str]] = {
    **{name: {"permuted 0": "01"} for name in ("softmax", "top_k", "select_rows", "short_conv")},
    **{name: {"permuted 0": "0"} for name in ("normalize", "take")},
    "expert_bias": dict.fromkeys(("heads 0", "permuted 0", "repeated 0"), "0"),
    "expert_sum": dict.fromkeys(
        (*(f"{form} 0" for form in VIEWS), "sliced 1", "permuted 1", "repeated 1"), "01"
    ),
    "gated_delta": {
        **{f"permuted {i}": "012" for i in range(5)},
        **{f"sliced {i}": "012" for i in range(3)},
    },
    "kv_write": {"sliced 0": "*", "permuted 0": "*"},
    "l2_norm": {"permuted 0": "1"},
    "matmul": {"permuted 0": "01234"},
    "matmul_id": {"permuted 0": "0123", "heads 0": "2", "repeated 0": "2"},
    "rms_norm": {"permuted 0": "012", "heads 0": "1", "repeated 0": "1"},
    "rope": {f"{form} 1": "012" for form in VIEWS},
}


def _refused(name: str, n: int, variant: str) -> bool:
    if name == "copy":
        return False
    form, *place = variant.split()
    if OPS[name].kind is Kind.ELEMENTWISE and form == "permuted":
        return OPS[name].cases[n].arguments()[int(place[0])].shape[-1] > 1
    cases = REFUSED.get(name, {}).get(variant, "")
    return form in INPUTS or cases == "*" or str(n) in cases


RUN = [point for point in GRID if not _refused(*point.values)]


def _built(name: str, n: int, variant: str) -> Built:
    return Built(name, OPS[name].cases[n], variant)


def _wanted(built: Built) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
    """The results by the op's oracle, and what is left in each state."""
    values = [v.copy() for v in built.values]
    assert built.name in ORACLES, f"write @oracle {built.name} in tests/oracles.py"
    result = ORACLES[built.name](*values, **built.case.attrs)
    results = [] if built.name == "kv_write" else [result]
    if built.variant == "base":
        results.append(ORACLES["slice"](result, **built.part))
    return results, {key: values[int(key[1:])] for key in built.states}


def _error(got: np.ndarray, want: np.ndarray) -> float:
    want = want.reshape(got.shape)
    return float(((got - want) ** 2).sum() / max(1e-300, float((want**2).sum())))


def _check(got: np.ndarray, want: np.ndarray, tolerance: float) -> None:
    assert got.shape == want.shape
    if want.dtype.kind == "i":
        np.testing.assert_array_equal(got, want)
    elif got.size:
        assert np.isfinite(got).all(), "results are unwritten"
        assert _error(got, want) <= tolerance


def _fill(backend: Backend, built: Built) -> None:
    """States as the case has them."""
    for name, (leaf, value) in built.states.items():
        coded = name in built.kept and kv_format(leaf.dtype.name).coding
        bits = coded and not isinstance(backend, ReferenceBackend)
        backend.write_state(leaf, range(len(value)), built.kept[name] if bits else value)


def _left(backend: Backend, built: Built, key: str) -> np.ndarray:
    """What a state holds."""
    leaf, value = built.states[key]
    found = backend.read_state(leaf, range(len(value)))
    return (
        kv_format(leaf.dtype.name).plain(found, value.shape[-1]) if found.dtype == "u1" else found
    )


def test_unknown_and_duplicate_ops_are_refused():
    with pytest.raises(OpError, match="did you mean 'rms_norm'"):
        ops.registry.find("rms_nrom")
    with pytest.raises(OpError, match="already declared"):
        op("add", shape=lambda x: x.shape, cases=[])(lambda x: x)


def test_every_op_has_an_oracle():
    """So tests/oracles.py is the list of what ops there are; it should stay small."""
    assert sorted(ORACLES) == sorted(OPS) and len(OPS) <= 45


@pytest.mark.parametrize("name, n, variant", WHOLE)
def test_reference_backend(name: str, n: int, variant: str):
    """The op's reference against its oracle, and its shape rule against both."""
    built = _built(name, n, variant)
    backend = ReferenceBackend(built.file())
    _fill(backend, built)
    results, left = _wanted(built)
    got = backend.program(built.graph).run(built.inputs, built.live)
    for found, want in zip(got, results, strict=True):
        _check(found, want, 1e-24)
        if variant == "whole":
            assert tuple(built.node.shape) == want.shape
            assert (built.node.dtype is I32) == (want.dtype.kind == "i")
    for key, value in left.items():
        _check(_left(backend, built, key), value, 1e-14)


@pytest.fixture(scope="module")
def compiled() -> None:
    """All kernels of the grid, compiled in parallel once."""
    backend = CpuBackend(activations="f32")
    plans = []
    for point in RUN:
        with suppress(BackendError):  # the test of that point says what is refused
            plans.append(backend.plan(_built(*point.values).graph))
    library().prepare(backend.kernels(plans))


@pytest.mark.parametrize("name, n, variant", [p for p in GRID if p not in RUN])
def test_cpu_backend_refuses(name: str, n: int, variant: str):
    reason = "(not contiguous|do not merge into rows|neither f32 nor i32)"
    with pytest.raises(BackendError, match=f"cpu backend cannot run .*{reason}"):
        CpuBackend(activations="f32").plan(_built(name, n, variant).graph)


def test_cpu_backend_refuses_vectors_that_are_no_row():
    """Whose live elements are fewer than those it has, or lie apart."""
    alive = ops.step_input("x", (ops.Dim("tokens", 8), 4), F32)
    fixed = ops.step_input("y", (8, 4), F32)

    def column(x: ops.Tensor) -> ops.Tensor:
        return ops.reshape(ops.slice_(x, axis=1, start=1, stop=2), shape=x.shape[:1])

    for x in (column(alive), column(fixed), ops.permute(alive, axes=(1, 0))):
        with pytest.raises(BackendError, match=r"cannot run silu .*(live elements|not contiguous)"):
            CpuBackend().plan(ops.Graph((ops.silu(x),)))


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("name, n, variant", RUN)
def test_cpu_backend(name: str, n: int, variant: str):
    """Against the oracle; nothing behind the live rows or past a buffer is written."""
    built = _built(name, n, variant)
    results, left = _wanted(built)
    for threads in (1, 3):
        backend = CpuBackend(built.file(), threads=threads, activations="f32")
        program = backend.bind(backend.plan(built.graph, guarded=True))
        _fill(backend, built)
        poison(program)
        got = program.run(built.inputs, built.live)
        for found, room, want in zip(got, program._outputs, results, strict=True):
            if built.node.dtype is BF16:
                found = dequantize(found, BF16, found.shape)
            _check(found, want, built.case.tolerance)
            behind = np.ascontiguousarray(room[len(found) :]).view(np.uint8)
            assert (behind == 0xFF).all(), "rows behind the live ones were written"
        for key, value in left.items():
            _check(_left(backend, built, key), value, built.case.tolerance)
        assert not damaged(program)
        backend.close()


@pytest.mark.parametrize("kv", KV_FORMATS)
@pytest.mark.parametrize("which", ["k", "v"])
def test_pages_convert_exactly_both_ways(kv: str, which: str, rng: np.random.Generator):
    leaf = ops.state("cache", (3, ops.PAGE, 2, 64), kv_format(kv).dtype, which)
    plain = kv_format(kv).rounded(rng.standard_normal((3, ops.PAGE, 2, 64)).astype(np.float32))
    memory = from_plain(plain, leaf)
    np.testing.assert_array_equal(to_plain(memory, leaf), plain)
    np.testing.assert_array_equal(from_rows(to_rows(memory, leaf), leaf), memory)


def _forgotten(kind: ops.Kind) -> dict[str, Op]:
    """An op that ops/elementwise.py might declare and that nothing else knows."""

    def cube(x: np.ndarray) -> np.ndarray:
        return x**3

    cube.__module__ = ops.add.reference.__module__
    return {"cube": Op("cube", kind, lambda x: x.shape, cube)}


def test_a_forgotten_place_of_a_new_op_is_named():
    with pytest.raises(
        OpError, match=r"'cube'.*@lowers\('cube'\) in backends/cpu/rules/elementwise.py"
    ):
        RULES.check(_forgotten(ops.Kind.ROWWISE))
    RULES.check(_forgotten(ops.Kind.ELEMENTWISE))  # its kernel is enough
    with pytest.raises(BackendError, match=r"write build_cube in a file of backends/cpu/kernels"):
        library().get(Kernel.of("cube"))
    with pytest.raises(BackendError, match=r"kernel cube takes x n; .* do not agree about n size"):
        Native(0, ("x", "n")).ordered(Kernel.of("cube"), {"x": 0, "size": 0})


def test_ops_declared_elsewhere_bring_their_own_rules():
    found = _forgotten(ops.Kind.ROWWISE)
    found["cube"].reference.__module__ = "notebook"
    RULES.check(found)
