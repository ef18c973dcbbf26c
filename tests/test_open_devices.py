"""What a device expression opens: which devices, their threads and cores, and how they nest."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from fractions import Fraction
from types import ModuleType
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.backends import devices
from runtime.backends.cpu.run import cores
from runtime.ops.errors import OptionError


class Made(NamedTuple):
    """Stands for a backend of several: what it was made of."""

    kind: str
    parts: list[Any]
    shares: list[float]


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch):
    """Eight cores on two nodes that take any pinning, and backends that only tell their parts."""
    monkeypatch.setattr(cores, "physical_cores", lambda kept=None: 4 if kept else 8)
    monkeypatch.setattr("runtime.backends.cpu.physical_cores", cores.physical_cores)
    monkeypatch.setattr("runtime.backends.cpu.checked", frozenset)
    monkeypatch.setattr(cores, "numa_nodes", lambda: [frozenset(range(4)), frozenset(range(4, 8))])
    for kind in ("Tensor", "Layers"):
        module = ModuleType(f"runtime.backends.meta.{kind.lower()}")
        made = lambda parts, shares, kind=kind: Made(kind, parts, shares)  # noqa: E731
        setattr(module, f"{kind}Backend", made)
        monkeypatch.setitem(sys.modules, module.__name__, module)


def opened(expression: str, threads: int | None = None, **options: Any) -> Any:
    return devices.open_backend(expression, None, threads, "int8", **options)


def told(backend: Any) -> str:
    """Threads of each device, within what it is a part of."""
    if isinstance(backend, Made):
        inner = ", ".join(
            f"{share:.3g}*{told(part)}"
            for share, part in zip(backend.shares, backend.parts, strict=True)
        )
        return f"{backend.kind}({inner})"
    return str(backend.threads)


@pytest.mark.parametrize(
    ("expression", "threads", "want"),
    [
        ("cpu", None, "8"),
        ("cpu:3", 2, "2"),
        ("tensor(cpu:0)", None, "8"),
        ("tensor(cpu:0,cpu:1)", None, "Tensor(0.5*4, 0.5*4)"),
        ("tensor(3*cpu:0,cpu:1)", None, "Tensor(0.75*6, 0.25*2)"),
        ("tensor(1000*cpu:0,cpu:1)", None, "Tensor(0.999*7, 0.000999*1)"),
        ("cpu:0,cpu:1,cpu:2", None, "Layers(0.333*3, 0.333*3, 0.333*2)"),
        ("cpu:0,0*cpu:1", None, "8"),
        ("layers(tensor(cpu:0,cpu:1),2*cpu:2)", 6,
         "Layers(0.333*Tensor(0.5*1, 0.5*1), 0.667*4)"),
        ("tensor(cpu:0,cpu:1,cpu:2)", 2, "Tensor(0.333*1, 0.333*1, 0.333*1)"),
        ("layers(cpu:0,cpu:1,2*cpu:0)", None, "Layers(0.25*6, 0.25*2, 0.5*6)"),
        ("tensor(layers(cpu:0,3*cpu:1),layers(3*cpu:2,cpu:3))", None,
         "Layers(0.25*Tensor(0.5*1, 0.5*3), 0.5*Tensor(0.5*3, 0.5*3), 0.25*Tensor(0.5*3, 0.5*1))"),
        ("numa", None, "Layers(0.5*4, 0.5*4)"),
        ("tensor(3*numa:0/2,numa:1/2)", 8, "Tensor(0.75*6, 0.25*2)"),
        ("numa:1", None, "4"),
    ],
)  # fmt: skip
def test_threads_are_shared_out_as_the_work_is(expression: str, threads: int | None, want: str):
    assert told(opened(expression, threads)) == want


def test_options_reach_the_expression():
    assert told(opened("cpu,cpu", split_mode="tensor", tensor_split="3,1")) == (
        "Tensor(0.75*6, 0.25*2)"
    )
    assert told(opened("cpu,cpu", split_mode="none", main_device=1)) == "8"


@pytest.mark.parametrize("activations", ["int8", "f32"])
def test_every_device_computes_as_exactly_as_asked(activations: str):
    made = devices.open_backend("tensor(cpu:0,numa:2)", None, None, activations)
    assert [part.planner.options.activations for part in made.parts] == [activations] * 3


def test_nodes_keep_to_their_cores():
    first, second = opened("tensor(numa)").parts
    assert first.team.cores == [frozenset(range(4))] * 4
    assert second.team.cores == [frozenset(range(4, 8))] * 4
    assert opened("cpu").team.cores == [None] * 8


@given(st.integers(1, 300), st.lists(st.fractions(0.01, 1), min_size=1, max_size=9))
def test_threads_are_given_where_the_work_would_take_longest(total: int, weights: list[Fraction]):
    found = devices.allotted(total, weights)
    assert min(found) >= 1 and sum(found) == max(total, len(weights))
    last = max(weight / n for weight, n in zip(weights, found, strict=True))
    for weight, n in zip(weights, found, strict=True):
        assert n == 1 or weight / (n - 1) >= last, "with one less it would be done last"


@pytest.mark.parametrize(
    ("expression", "threads"),
    [("tensor(cpu:0,cpu:1,cpu:2)", 2), ("tensor(cpu:0,cpu:1)", None)],
)
def test_more_devices_than_threads_are_told_to_who_debugs(
    expression: str, threads: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    opened(expression, threads)
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("DEBUG", "1")
    opened(expression, threads)
    said = "3 devices for 2 threads: each has one\n" if threads else ""
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    ("expression", "says"),
    [
        (
            "tensor(cuda:0,cpu)",
            r"tensor.* would split .*: split by layers, as layers\(cuda:0,cpu\)",
        ),
        ("cpu:64GiB", "sizes of memory are for 'runtime plan'; leave them out"),
        ("cuda:24GB", "sizes of memory are for 'runtime plan'"),
        ("layers(mpi:2)", r"mpi is all processes of this run, .*: tensor\(mpi\)"),
        ("tensor(cpu,null)", "null and reference stand alone, and not beside cpu, null"),
        ("reference,numa", "null and reference stand alone, and not beside numa, reference"),
    ],
)
def test_devices_that_can_be_named_and_not_used(expression: str, says: str):
    with pytest.raises(OptionError, match=f"^devices=.*: {says}"):
        opened(expression)


def test_more_threads_than_a_device_can_have_are_refused_as_they_were_given():
    with pytest.raises(OptionError, match=r"^threads=2000 must be from 1 to 1024$"):
        opened("tensor(cpu:0,cpu:1)", 2000)


@pytest.mark.parametrize(
    ("expression", "name"),
    [
        ("null", "null (1 device)"),
        ("null:3", "null (3 devices)"),
        ("tensor(null,layers(null,null))", "null (3 devices)"),
        ("reference", "reference (numpy, float64)"),
        ("layers(reference)", "reference (numpy, float64)"),
    ],
)
def test_devices_that_stand_alone(expression: str, name: str):
    assert opened(expression).name == name


def test_each_stage_has_devices_of_its_own():
    """Stages run at the same time, and a device runs one plan after the other in one memory."""
    first, _, third = opened("layers(cpu:0,cpu:1,cpu:0)").parts
    assert first is not third and first.memory is not third.memory


def test_this_machine_opens_nodes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()
    shares: Sequence[int] = [1, 2, 5]
    assert [n >= 1 for n in devices.allotted(os.cpu_count() or 1, shares)] == [True] * 3
    backend = opened("numa:1")
    assert backend.threads == cores.physical_cores()
