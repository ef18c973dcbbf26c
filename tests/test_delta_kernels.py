"""Delta-net kernels: against float64, fused against plain, and one prompt in any pieces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from chunked_delta import chunked
from guarded import damaged, poison
from kernel_calls import ISAS, Fenced, library, run
from stored_tensors import Stored, file_of

from runtime import ops
from runtime.backends.cpu import CpuBackend
from runtime.backends.cpu.compile.library import library as kept_library
from runtime.backends.cpu.sizes import delta_scratch_nbytes
from runtime.backends.plan.kernel import Kernel
from runtime.ops.dtypes import F32
from runtime.ops.registry import OPS

EPS, SLOTS, ROOM = 1e-6, 6, 160  # ROOM: tokens of a step


@dataclass(frozen=True)
class Sizes:
    key_heads: int = 2
    heads: int = 4
    dk: int = 32
    dv: int = 48
    taps: int = 4
    order: str = "tiled"

    @property
    def keys(self) -> int:
        return self.key_heads * self.dk

    @property
    def channels(self) -> int:
        return 2 * self.keys + self.heads * self.dv


SIZES = (
    Sizes(),
    Sizes(1, 3, 20, 20, 3, "grouped"),
    Sizes(2, 2, 128, 128, 4, "grouped"),
)


def weights(size: Sizes) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    values = {
        "filters": rng.standard_normal((size.channels, size.taps)) / 2,
        "dt": rng.standard_normal(size.heads),
        "a": -rng.random(size.heads) - 0.05,
    }
    return {name: value.astype(np.float32) for name, value in values.items()}


def tokens(size: Sizes, count: int, seed: int = 5) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    qkv = rng.standard_normal((count, size.channels)).astype(np.float32)
    return {"qkv": qkv, "gates": rng.standard_normal((count, 2 * size.heads)).astype(np.float32)}


def layer(size: Sizes, spy: bool = False) -> ops.Graph:
    """From the projections to the read-out, as a model file writes it."""
    T, S = ops.Dim("tokens", ROOM), ops.Dim("sequences", 4)
    qkv = ops.step_input("qkv", (T, size.channels), F32)
    gates = ops.step_input("gates", (T, 2 * size.heads), F32)
    step = [ops.step_input("spans", (S, 2)), *(ops.step_input(f"slot_{x}", (S,)) for x in "io")]
    conv = ops.state("conv", (SLOTS, size.taps - 1, size.channels), F32, "slots")
    delta = ops.state("delta", (SLOTS, size.heads, size.dk, size.dv), F32, "slots")
    filters = ops.weight("filters", (size.channels, size.taps), F32)
    y = ops.silu(ops.short_conv(qkv, filters, conv, *step))
    cuts = (0, size.keys, 2 * size.keys, size.channels)
    parts = [ops.slice_(y, axis=1, start=a, stop=b) for a, b in pairwise(cuts)]
    q, k = (ops.l2_norm(ops.split_heads(x, size.key_heads), eps=EPS) for x in parts[:2])
    v = ops.split_heads(parts[2], size.heads)
    alpha, b = (
        ops.slice_(gates, axis=1, start=i * size.heads, stop=(i + 1) * size.heads) for i in (0, 1)
    )
    pace = ops.softplus(ops.add(alpha, ops.weight("dt", (size.heads,), F32)))
    decay = ops.mul(pace, ops.weight("a", (size.heads,), F32))
    out = ops.gated_delta(
        q, k, v, decay, ops.sigmoid(b), delta, *step, scale=size.dk**-0.5, order=size.order
    )
    return ops.Graph((out, ops.scale(y, factor=2.0)) if spy else (out,))


class Device:
    """One delta-net layer on the CPU backend, with its slots."""

    def __init__(self, size: Sizes, threads: int = 1, fuse: bool = True) -> None:
        file = file_of({name: Stored(x) for name, x in weights(size).items()})
        self.size, graph = size, layer(size)
        self.backend = CpuBackend(file, threads, fuse=fuse)
        self.plan = self.backend.plan(graph, guarded=True)
        self.program = self.backend.bind(self.plan)
        self.leaves = {leaf.name: leaf for leaf in graph.leaves("state")}
        for leaf in self.leaves.values():
            nothing = np.full([int(n) for n in leaf.shape], np.nan)  # slots nobody wrote
            self.backend.write_state(leaf, range(SLOTS), nothing)

    def step(self, given: dict[str, np.ndarray], *pieces: tuple[int, int, int]) -> np.ndarray:
        """Read-outs of the rows of some sequences: (count, slot_in, slot_out) of each."""
        counts = [p[0] for p in pieces]
        starts = np.cumsum([0, *counts[:-1]])
        inputs = given | {
            "spans": np.stack([starts, counts], 1).astype(np.int32),
            "slot_i": np.array([p[1] for p in pieces], np.int32),
            "slot_o": np.array([p[2] for p in pieces], np.int32),
        }
        poison(self.program)
        live = {"tokens": sum(counts), "sequences": len(pieces)}
        found = self.program.run(inputs, live)[0].copy()
        assert not damaged(self.program)
        return found

    def slot(self, n: int) -> list[np.ndarray]:
        """What a slot holds: inputs of the convolution, state of the heads."""
        return [self.backend.read_state(leaf, [n])[0].ravel() for leaf in self.leaves.values()]

    def prompt(self, given: dict[str, np.ndarray], cuts: Sequence[int]) -> list[bytes]:
        """A prompt in pieces, slot 0 and slot 1 in turn; bits of read-outs and last slots."""
        at, slot, found = 0, -1, []
        for n in cuts:
            part = {key: x[at : at + n] for key, x in given.items()}
            found.append(self.step(part, (n, slot, 0 if slot < 0 else 1 - slot)))
            at, slot = at + n, 0 if slot < 0 else 1 - slot
        return [x.tobytes() for x in (np.concatenate(found), *self.slot(slot))]

    def close(self) -> None:
        self.backend.close()


@pytest.fixture(scope="module", autouse=True)
def compiled():
    backend = CpuBackend()
    plans = [
        CpuBackend(fuse=fuse, threads=1).plan(layer(size))
        for size in SIZES
        for fuse in (True, False)
    ]
    kept_library().prepare(backend.kernels(plans))
    backend.close()


def expected(size: Sizes, given: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Read-outs and state of one sequence in float64."""
    w = {name: x.astype(np.float64) for name, x in weights(size).items()}
    x = {name: value.astype(np.float64) for name, value in given.items()}
    count = len(x["qkv"])
    step = (np.array([[0, count]]), np.array([-1]), np.array([0]))
    past = np.zeros((1, size.taps - 1, size.channels))
    y = OPS["silu"].reference(OPS["short_conv"].reference(x["qkv"], w["filters"], past, *step))
    q, k, v = np.split(y, [size.keys, 2 * size.keys], 1)
    q, k = (OPS["l2_norm"].reference(z.reshape(count, size.key_heads, -1), eps=EPS) for z in (q, k))
    alpha, b = np.split(x["gates"], 2, 1)
    decay = w["a"] * np.logaddexp(0, alpha + w["dt"])
    state = np.zeros((1, size.heads, size.dk, size.dv))
    out = OPS["gated_delta"].reference(
        q, k, v.reshape(count, size.heads, -1), decay, 1 / (1 + np.exp(-b)), state, *step,
        scale=size.dk**-0.5, order=size.order,
    )  # fmt: skip
    return out, state[0]


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    wanted = wanted.reshape(found.shape)
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_layer_against_float64(size: Sizes):
    given, device = tokens(size, 150), Device(size, threads=2)
    out = device.step(given, (150, -1, 3))
    wanted, state = expected(size, given)
    assert error(out, wanted) < 2e-6
    assert error(device.slot(3)[1], state) < 2e-6
    assert np.array_equal(device.slot(3)[0], given["qkv"][150 - size.taps + 1 :].ravel())
    device.close()


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_bits_of_plain_parts_in_any_pieces_on_any_threads(size: Sizes):
    given, plain = tokens(size, 150), Device(size, fuse=False)
    wanted = plain.prompt(given, [150])
    plain.close()
    for threads in (1, 2, 3):
        device = Device(size, threads)
        for cuts in ([150], [64, 64, 22], [7] * 21 + [3], [1] * 20 + [2, 128], [149, 1]):
            assert device.prompt(given, cuts) == wanted, (threads, cuts)
        device.close()
    plain = Device(size, 2, fuse=False)
    assert plain.prompt(given, [1, 2, 70, 77]) == wanted
    plain.close()


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_fused_kernels_of_a_layer(size: Sizes):
    device = Device(size)
    names = [str(kernel) for kernel in device.plan.kernels()]
    assert names == ["conv_post", "gated_delta-gates=raw"]
    shared = device.backend.plan(layer(size, spy=True))
    assert "short_conv" in map(str, shared.kernels()), "others read what the convolution leaves"
    device.close()


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("fuse", [True, False])
def test_forks_and_batches_have_the_bits_of_sequences_alone(size: Sizes, fuse: bool):
    given, device = tokens(size, 100), Device(size, 2, fuse)

    def part(first: int, last: int) -> dict[str, np.ndarray]:
        return {key: x[first:last] for key, x in given.items()}

    alone = []
    device.step(part(0, 20), (20, -1, 0))
    for first, last in ((20, 50), (50, 51), (51, 97)):
        out = device.step(part(first, last), (last - first, 0, 5))
        alone.append([out.tobytes(), *(x.tobytes() for x in device.slot(5))])
    new = device.step(part(97, 100), (3, -1, 5)).tobytes()
    before = [x.tobytes() for x in device.slot(0)]
    together = device.step(part(20, 100), (30, 0, 1), (1, 0, 2), (46, 0, 3), (3, -1, 4))
    rows = np.split(together, [30, 31, 77])
    for n, wanted in enumerate(alone):
        assert [rows[n].tobytes(), *(x.tobytes() for x in device.slot(n + 1))] == wanted
    assert rows[3].tobytes() == new
    assert [x.tobytes() for x in device.slot(0)] == before, "a fork leaves its parent as it was"
    copied = device.step(part(97, 98), (1, 1, 5)).tobytes(), *map(bytes, device.slot(5))
    in_place = device.step(part(97, 98), (1, 1, 1)).tobytes(), *map(bytes, device.slot(1))
    assert in_place == copied
    device.close()


@pytest.mark.parametrize("shift", [0, -9], ids=["decay", "hardly any decay"])
def test_state_does_not_drift_in_512_steps(shift: int):
    size = Sizes(2, 2, 128, 128)
    given, device = tokens(size, 512), Device(size, 2)
    given["gates"][:, : size.heads] += shift
    slot = -1
    for t in range(512):
        device.step({key: x[t : t + 1] for key, x in given.items()}, (1, slot, 0))
        slot = 0
        if t % 64 == 63:
            wanted = expected(size, {key: x[: t + 1] for key, x in given.items()})[1]
            assert error(device.slot(0)[1], wanted) < 1e-6, f"after {t + 1} steps"
    device.close()


def alone(isa: str, threads: int, dv: int) -> tuple[np.ndarray, np.ndarray]:
    """`gated_delta` on fenced memory, 9 tokens of 3 heads of [20, dv]; read-outs and state."""
    rng = np.random.default_rng(2)
    count, heads, dk = 9, 3, 20
    q, k = (rng.standard_normal((count, heads * dk)).astype(np.float32) / 4 for _ in range(2))
    v = Fenced.of(rng.standard_normal((count, heads * dv)).astype(np.float32), heads * dv + 5)
    decay, beta = (rng.random((count, heads)).astype(np.float32) for _ in range(2))
    state, out = Fenced(2, heads * dk * dv), Fenced(count, heads * dv)
    state.values[:] = rng.standard_normal(state.values.shape)
    n = heads * dk
    nbytes = delta_scratch_nbytes(dk)
    run(
        Kernel.of("gated_delta", gates="given"), isa, threads, q=Fenced.of(q, n + 1),
        k=Fenced.of(k), v=v, decay=Fenced.of(-decay), beta=Fenced.of(beta, heads + 2),
        q_stride=n + 1, k_stride=n, v_stride=heads * dv + 5, decay_stride=heads,
        beta_stride=heads + 2, dt=0, a=0, state=state, slot_bytes=4 * heads * dk * dv,
        spans=np.array([[0, count]], np.int32), slot_in=np.zeros(1, np.int32),
        slot_out=np.ones(1, np.int32), out=out, live=1, heads=heads, key_heads=heads, dk=dk,
        dv=dv, tiled=0, scale=0.5, scratch=np.zeros(threads * nbytes, np.uint8),
        scratch_bytes=nbytes,
    )  # fmt: skip
    assert out.strays(count) == 0 and state.strays(2) == 0
    return out.values.copy(), state.values[1].copy()


@pytest.mark.parametrize("dv", [5, 16, 100, 128])
def test_columns_have_the_same_bits_on_any_threads(dv: int):
    library(ISAS[0]).prepare([Kernel.of("gated_delta", gates="given")])
    wanted = [x.tobytes() for x in alone(ISAS[0], 1, dv)]
    for threads in (2, 3, 5, 40):
        assert [x.tobytes() for x in alone(ISAS[0], threads, dv)] == wanted


def test_without_fused_multiply_add():
    library("generic").prepare([Kernel.of("gated_delta", gates="given")])
    for found, wanted in zip(alone("generic", 2, 100), alone(ISAS[0], 1, 100), strict=True):
        assert error(found, wanted) < 1e-6


def test_softplus_is_exact_at_both_ends():
    x = np.concatenate([np.linspace(-80, 80, 4001), [-1e30, -0.0, 1e30]]).astype(np.float32)
    out = Fenced(1, len(x))
    library(ISAS[0]).prepare([Kernel.of("softplus")])
    run(
        Kernel.of("softplus"), x=Fenced.of(x[None]), out=out, live=1, n=len(x), x_stride=0,
        out_stride=0,
    )  # fmt: skip
    np.testing.assert_allclose(out.values[0], np.logaddexp(0, x.astype(np.float64)), rtol=5e-7)


@pytest.mark.parametrize("order", ["grouped", "tiled"])
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunked_form_agrees_with_the_recurrence(order: str, chunk: int):
    rng = np.random.default_rng(4)
    count, key_heads, heads, dk, dv = 150, 2, 4, 16, 24
    q, k = (rng.standard_normal((count, key_heads, dk)) for _ in range(2))
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    v = rng.standard_normal((count, heads, dv))
    decay, beta = -3 * rng.random((count, heads)), rng.random((count, heads))
    first = rng.standard_normal((4, heads, dk, dv))
    step = (np.array([[0, 130], [130, 20]]), np.array([2, -1]), np.array([1, 3]))

    def found(form: Any, **more: Any) -> tuple[np.ndarray, np.ndarray]:
        state = first.copy()
        return form(q, k, v, decay, beta, state, *step, scale=0.3, order=order, **more), state

    wanted = found(OPS["gated_delta"].reference)
    for got, want in zip(found(chunked, chunk=chunk), wanted, strict=True):
        assert error(got, want) < 1e-10
