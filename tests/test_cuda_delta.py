"""Delta-net layers on the CUDA backend: against float64, and one prompt in any pieces."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from cuda_models import fake_cuda
from stored_tensors import Stored, file_of
from test_delta_kernels import EPS, SIZES, SLOTS, Sizes, error, expected, tokens, weights
from tile_calls import random_rows

from runtime import ops
from runtime.backends.cuda import planner
from runtime.ops.dtypes import DTYPES, F32
from runtime.ops.quants import dequantize

WIDE = Sizes(1, 2, 128, 128, 4, "grouped")
OUT = 32  # rows of the projection behind a layer


def layer(size: Sizes, room: int, whole: bool) -> ops.Graph:
    """From the projections to the read-out, or to the gated norm's projection, of a step."""
    T, S = ops.Dim("tokens", room), ops.Dim("sequences", room)
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
    alpha, b = (
        ops.slice_(gates, axis=1, start=i * size.heads, stop=(i + 1) * size.heads) for i in (0, 1)
    )
    pace = ops.softplus(ops.add(alpha, ops.weight("dt", (size.heads,), F32)))
    decay = ops.mul(pace, ops.weight("a", (size.heads,), F32))
    out = ops.gated_delta(
        q, k, ops.split_heads(parts[2], size.heads), decay, ops.sigmoid(b), delta, *step,
        scale=size.dk**-0.5, order=size.order,
    )  # fmt: skip
    if not whole:
        return ops.Graph((out,))
    z = ops.step_input("z", (T, size.heads * size.dv), F32)
    out = ops.rms_norm(out, ops.weight("norm", (size.dv,), F32), eps=EPS)
    out = ops.merge_heads(ops.mul(out, ops.silu(ops.split_heads(z, size.heads))))
    projection = ops.weight("out", (OUT, size.heads * size.dv), DTYPES["q8_0"])
    return ops.Graph((ops.matmul(out, projection),))


def stored(size: Sizes) -> dict[str, Stored]:
    rng, n = np.random.default_rng(7), size.heads * size.dv
    found = {name: Stored(x) for name, x in weights(size).items()}
    found["norm"] = Stored(rng.random(size.dv).astype(np.float32))
    if n % 32 == 0:
        rows = random_rows("Q8_0", OUT, n)
        kind = DTYPES["q8_0"]
        found["out"] = Stored(dequantize(rows.reshape(-1), kind, (OUT, n)), rows, kind)
    return found


class Device:
    """A layer on the backend, programs of several capacities, slots that nobody wrote."""

    def __init__(self, size: Sizes, whole: bool = True, quick: bool = True) -> None:
        self.size, self._whole = size, whole
        self.backend = fake_cuda(file_of(stored(size)), quick=quick)
        self.leaves = {leaf.name: leaf for leaf in layer(size, 1, whole).leaves("state")}
        for leaf in self.leaves.values():
            nothing = np.full([int(n) for n in leaf.shape], np.nan)
            self.backend.write_state(leaf, range(SLOTS), nothing)

    def program(self, room: int) -> Any:
        return self.backend.program(layer(self.size, room, self._whole))

    def step(
        self, given: dict[str, np.ndarray], *pieces: tuple[int, int, int], room: int = 0
    ) -> np.ndarray:
        """Results of the rows of some sequences: (count, slot_in, slot_out) of each."""
        counts = [p[0] for p in pieces]
        starts = np.cumsum([0, *counts[:-1]])
        inputs = given | {
            "spans": np.stack([starts, counts], 1).astype(np.int32),
            "slot_i": np.array([p[1] for p in pieces], np.int32),
            "slot_o": np.array([p[2] for p in pieces], np.int32),
        }
        live = {"tokens": sum(counts), "sequences": len(pieces)}
        return self.program(room or live["tokens"]).run(inputs, live)[0].copy()

    def slot(self, n: int) -> list[np.ndarray]:
        """What a slot holds: inputs of the convolution, state of the heads."""
        return [self.backend.read_state(leaf, [n])[0].ravel() for leaf in self.leaves.values()]

    def prompt(self, given: dict[str, np.ndarray], cuts: Sequence[int]) -> list[bytes]:
        """A prompt in pieces, slot 0 and slot 1 in turn; bits of results and last slots."""
        at, slot, found = 0, -1, []
        for n in cuts:
            part = {key: x[at : at + n] for key, x in given.items()}
            found.append(self.step(part, (n, slot, 0 if slot < 0 else 1 - slot)))
            at, slot = at + n, 0 if slot < 0 else 1 - slot
        return [x.tobytes() for x in (np.concatenate(found), *self.slot(slot))]


def inputs(size: Sizes, count: int) -> dict[str, np.ndarray]:
    z = np.random.default_rng(8).standard_normal((count, size.heads * size.dv))
    return tokens(size, count) | {"z": z.astype(np.float32)}


@pytest.mark.parametrize("size", SIZES[:2], ids=str)
def test_layer_against_float64(size: Sizes):
    given, device = tokens(size, 50), Device(size, whole=False)
    out = device.step(given, (50, -1, 3), room=64)
    wanted, state = expected(size, given)
    assert error(out, wanted) < 2e-6
    assert error(device.slot(3)[1], state) < 2e-6
    assert np.array_equal(device.slot(3)[0], given["qkv"][50 - size.taps + 1 :].ravel())
    device.backend.close()


@pytest.mark.parametrize("size", [Sizes(dv=32), Sizes(1, 2, 64, 64, 4, "grouped"), WIDE], ids=str)
def test_bits_in_any_pieces(size: Sizes):
    """Steps of up to 16 tokens have all in one launch, longer ones in three."""
    given, device = inputs(size, 21), Device(size)
    names = [str(call.kernel) for call in device.program(1).plan.calls()]
    assert names[0] == f"delta_layer-dim={size.dk}" and names[1].startswith("matvec")
    wanted = device.prompt(given, [21])
    for cuts in ([1] * 4 + [17], [7, 9, 5]):
        assert device.prompt(given, cuts) == wanted, cuts
    device.backend.close()


def test_odd_heads_in_any_pieces():
    size = SIZES[1]
    given, device = tokens(size, 20), Device(size, whole=False)
    wanted = device.prompt(given, [20])
    for cuts in ([1, 1, 1, 17], [2, 9, 9]):
        assert device.prompt(given, cuts) == wanted, cuts
    device.backend.close()


@pytest.mark.parametrize("room", [8, 32])
def test_forks_and_batches_have_the_bits_of_sequences_alone(room: int):
    size = Sizes(1, 2, 32, 32)
    given, device = inputs(size, 12), Device(size)

    def part(first: int, last: int) -> dict[str, np.ndarray]:
        return {key: x[first:last] for key, x in given.items()}

    device.step(part(0, 2), (2, -1, 0), room=room)
    alone = []
    for first, last in ((2, 3), (3, 7)):
        out = device.step(part(first, last), (last - first, 0, 5), room=room)
        alone.append([out.tobytes(), *(x.tobytes() for x in device.slot(5))])
    new = device.step(part(7, 9), (2, -1, 5), room=room).tobytes()
    before = [x.tobytes() for x in device.slot(0)]
    together = device.step(part(2, 9), (1, 0, 1), (4, 0, 2), (2, -1, 4), room=room)
    rows = np.split(together, [1, 5])
    for n, wanted in enumerate(alone):
        assert [rows[n].tobytes(), *(x.tobytes() for x in device.slot(n + 1))] == wanted
    assert rows[2].tobytes() == new
    assert [x.tobytes() for x in device.slot(0)] == before, "a fork leaves its parent as it was"
    assert all(np.isnan(x).all() for x in device.slot(3)), "nobody writes other slots"
    copied = device.step(part(9, 10), (1, 1, 5), room=room).tobytes(), *map(bytes, device.slot(5))
    in_place = device.step(part(9, 10), (1, 1, 1), room=room).tobytes(), *map(bytes, device.slot(1))
    assert in_place == copied
    device.backend.close()


def test_one_kernel_or_three_give_the_same_bits(monkeypatch: pytest.MonkeyPatch):
    """On the simulator, which runs blocks one after another and finds races; a slot in place."""
    size, found = Sizes(1, 2, 32, 32), []
    given = inputs(size, 3)
    for most in (planner.DELTA_LAYER, 0):
        monkeypatch.setattr(planner, "DELTA_LAYER", most)
        device = Device(size, quick=False)
        results = [
            device.step({key: x[:2] for key, x in given.items()}, (2, -1, 0)),
            device.step({key: x[2:] for key, x in given.items()}, (1, 0, 0)),
        ]
        found.append([x.tobytes() for x in (*results, *device.slot(0))])
        device.backend.close()
    assert found[0] == found[1]
