"""Several CUDA devices that compute a step together: their launches are one graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cuda_models import fake_cuda
from fake_driver import H100, FakeDriver
from stored_tensors import Stored, file_of

from runtime import ops
from runtime.backends.cuda.backend import CudaBackend
from runtime.backends.cuda.joint import merged
from runtime.ops.collective import all_gather, all_sum, joined, with_all
from runtime.ops.dtypes import F32
from runtime.ops.errors import BackendError
from runtime.ops.graph import Graph

ROWS, N = 2, 12
CARDS = {"one card": 1, "a card each": 5}


def opened(count: int, cards: int, file: Any = None, **options: Any) -> list[CudaBackend]:
    """Virtual devices that go round as many cards."""
    each = [replace(H100, index=n) for n in range(cards)]
    driver = options.pop("driver", None) or FakeDriver(each, execute=True, seed=count)
    return [
        fake_cuda(file, driver=driver, index=n % cards, activations="f32", **options)
        for n in range(count)
    ]


def parts_of(widths: Sequence[int], rng: np.random.Generator) -> list[np.ndarray | None]:
    """float32 [ROWS, width] each, None for a device that has none."""
    return [rng.standard_normal((ROWS, n)).astype(np.float32) if n else None for n in widths]


def ran(devices: list[CudaBackend], graphs: list[Graph], inputs: dict) -> list[np.ndarray]:
    """What the first device has; its program twice, so that a replay finds its memory used."""
    program = (
        devices[0].joined(devices).bind([d.plan(g) for d, g in zip(devices, graphs, strict=True)])
    )
    first = [np.array(x) for x in program.run(inputs, {"tokens": ROWS})]
    again = program.run(inputs, {"tokens": ROWS})
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, other)
    profiled, times = program.profile(inputs, {"tokens": ROWS})
    np.testing.assert_array_equal(profiled[0], first[0])
    assert len(times) == len(program.plan.instructions)
    program.close()
    for device in devices:
        device.close()
    return first


@pytest.mark.parametrize("graphs", [True, False], ids=["graph", "eager"])
@pytest.mark.parametrize("cards", CARDS.values(), ids=CARDS)
@pytest.mark.parametrize("holders", [(0,), (1,), (0, 1), (0, 2, 3), (0, 1, 2, 3, 4)])
def test_sums(holders: tuple[int, ...], cards: int, graphs: bool):
    """Two, one behind the other, so that places are used again; of one the residual is taken in."""
    count, rng = max(2, holders[-1] + 1), np.random.default_rng(5)
    widths = [N if d in holders else 0 for d in range(count)]
    first, second = parts_of(widths, rng), parts_of(widths, rng)
    residual = rng.standard_normal((ROWS, N)).astype(np.float32)
    found, inputs = [], {"residual": residual}
    tokens = ops.Dim("tokens", ROWS)
    for device in range(count):
        common: dict[str, Any] = {"holders": holders, "device": device, "devices": count}
        nodes, sums = [], []
        more = ops.step_input("residual", (tokens, N), F32)
        for number, each in enumerate((first, second)):
            own = ()
            if each[device] is not None:
                name = f"part {number} {device}"
                inputs[name] = each[device]
                x = ops.step_input(name, (tokens, N), F32)
                own = (ops.add(x, nodes[-1] if nodes else x),)
            node = all_sum(*own, shape=(tokens, N), number=number, **common)
            node = node.with_(inputs=(*own, more), attrs={**node.attrs, "residual": True})
            sums.append(node)
            nodes.append(node if number else ops.add(node, node))
        found.append(Graph(with_all([nodes[-1]], sums), "sums"))
    (got,) = ran(opened(count, min(cards, count), graphs=graphs), found, inputs)
    one = _summed([None if x is None else x + x for x in first], holders) + residual
    one = one + one
    two = _summed([None if x is None else x + one for x in second], holders) + residual
    np.testing.assert_array_equal(got, two)


def _summed(parts: list[np.ndarray | None], holders: tuple[int, ...]) -> np.ndarray:
    node = all_sum(
        ops.step_input("x", (ROWS, N), F32), shape=(ROWS, N), holders=holders, device=holders[0],
        devices=len(parts), number=0,
    )  # fmt: skip
    return joined(node, parts)


RUNS = {
    "a stretch each": ((((0,), 5), ((1,), 7), ((2,), 4)), 1, ()),
    "one has none": ((((0,), 8), ((2,), 8)), 1, ()),
    "several each": ((((1,), 2), ((0,), 3), ((1,), 1), ((2,), 2)), 2, ()),
    "some have the same": ((((0, 1), 4), ((2,), 4)), 2, ()),
    "of heads": ((((0,), 1), ((1,), 1), ((2,), 1)), 1, (4,)),
}


@pytest.mark.parametrize("cards", [1, 3])
@pytest.mark.parametrize("form", RUNS)
def test_gathers(form: str, cards: int):
    runs, repeat, inner = RUNS[form]
    rng, tokens = np.random.default_rng(6), ops.Dim("tokens", ROWS)
    n = repeat * sum(length for _, length in runs)
    whole = rng.standard_normal((ROWS, n, *inner)).astype(np.float32)
    owners = [owners for owners, length in runs * repeat for _ in range(length)]
    found, inputs, parts = [], {}, []
    for device in range(3):
        places = [at for at, each in enumerate(owners) if device in each]
        own = ()
        parts.append(whole[:, places] if places else None)
        if places:
            inputs[f"x{device}"] = whole[:, places]
            x = ops.step_input(f"x{device}", (tokens, len(places), *inner), F32)
            own = (ops.add(x, x),)
        node = all_gather(
            *own, shape=(tokens, n, *inner), axis=1, runs=runs, repeat=repeat, device=device,
            devices=3, number=0,
        )  # fmt: skip
        found.append(Graph((ops.add(node, node),), "gather"))
    (got,) = ran(opened(3, cards), found, inputs)
    np.testing.assert_array_equal(got, 4 * whole)


def test_cards_that_cannot_reach_each_other():
    driver = FakeDriver([H100, replace(H100, index=1)], execute=True, unreachable=[(1, 0)])
    devices = opened(2, 2, driver=driver)
    with pytest.raises(BackendError, match=r"cuda:1 cannot read .* layers\(cuda:1,cuda:0\)"):
        devices[0].joined(devices)


def test_a_collective_stands_behind_what_all_compute_for_it():
    tokens = ops.Dim("tokens", ROWS)
    plans = []
    for device in range(2):
        x = ops.step_input("x", (tokens, N), F32)
        own = x
        for _ in range(1 + 3 * device):
            own = ops.add(own, x)
        node = all_sum(
            own, shape=(tokens, N), holders=(0, 1), device=device, devices=2, number=0
        )  # fmt: skip
        plans.append(fake_cuda(file_of({"": Stored(np.zeros(1, np.float32))}), False).plan(
            Graph((ops.add(node, x),), "g")
        ))  # fmt: skip
    order = list(merged(plans))
    assert len(order) == sum(len(plan.calls()) for plan in plans) == len(set(order))
    meets = [at for at, (n, m) in enumerate(order) if plans[n].calls()[m].meets]
    assert meets == [5, 6]
