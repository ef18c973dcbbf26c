"""NUMA nodes: which processors each has, and that a device's threads write its memory first."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from fake_model import DEMO, needs_demo

import runtime
from runtime import ops
from runtime.backends.cpu import CpuBackend
from runtime.backends.cpu.run import cores, forms
from runtime.gguf.reader import open_gguf

needs_pins = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cannot pin threads")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A function that makes a machine of nodes (cpulist of each) and cores (that of each)."""

    def make(nodes: Iterable[str], siblings: Iterable[str], allowed: str | None = None) -> None:
        for n, listed in enumerate(nodes):
            _write(tmp_path / f"node/node{n}/cpulist", listed)
        every = set()
        for listed in siblings:
            _write(tmp_path / "core", listed)
            for cpu in (shared := cores._listed(tmp_path / "core")):
                _write(tmp_path / f"cpu/cpu{cpu}/topology/thread_siblings_list", listed)
            every |= shared
        monkeypatch.setattr(cores, "_SYSTEM", tmp_path)
        monkeypatch.setattr(cores, "_CAN_PIN", True)
        if allowed is not None:
            _write(tmp_path / "allowed", allowed)
            every = cores._listed(tmp_path / "allowed")
        monkeypatch.setattr(cores, "_allowed", lambda: frozenset(every))

    return make


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


def told(found: Iterable[Iterable[int] | None]) -> list[list[int] | None]:
    return [None if one is None else sorted(one) for one in found]


FOUR = ("0,4", "1,5", "2,6", "3,7")  # cores of two threads each


def test_nodes_are_read_from_the_system(machine):
    machine(["0-1,4-5", "2-3,6-7"], FOUR)
    assert told(cores.numa_nodes()) == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert told(cores.shared_out(2)) == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert cores.physical_cores() == 4
    assert cores.physical_cores(cores.numa_nodes()[0]) == 2


def test_there_are_more_than_ten_nodes_in_their_order(machine):
    machine([str(n) for n in range(12)], [str(n) for n in range(12)])
    assert told(cores.numa_nodes()) == [[n] for n in range(12)]


def test_a_node_of_memory_alone_and_one_that_is_not_allowed_are_left_out(machine):
    machine(["0-1,4-5", "", "2-3,6-7"], FOUR)
    assert told(cores.numa_nodes()) == [[0, 1, 4, 5], [2, 3, 6, 7]]
    machine(["0-1,4-5", "", "2-3,6-7"], FOUR, allowed="1,5")
    assert told(cores.numa_nodes()) == [[1, 5]] and cores.physical_cores() == 1


def test_virtual_nodes_share_out_whole_cores(machine):
    machine(["0-1,4-5", "2-3,6-7"], FOUR)
    assert told(cores.shared_out(1)) == [[0, 1, 2, 3, 4, 5, 6, 7]]
    assert told(cores.shared_out(4)) == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert told(cores.shared_out(3)) == [[0, 4], [1, 5], [2, 3, 6, 7]]
    assert told(cores.shared_out(8))[:4] == [[0, 4], [0, 4], [1, 5], [1, 5]]


def test_one_node_where_the_system_tells_nothing(machine):
    machine([], [], allowed="0-2")
    assert told(cores.numa_nodes()) == [[0, 1, 2]] and cores.physical_cores() == 3
    assert told(cores.shared_out(2)) == [[0], [1, 2]]


def test_where_threads_cannot_be_kept_to_processors(machine, monkeypatch: pytest.MonkeyPatch):
    machine(["0", "1"], ["0", "1"])
    monkeypatch.setattr(cores, "_CAN_PIN", False)
    assert cores.numa_nodes() == [] and cores.shared_out(3) == [None, None, None]


def test_this_machine_has_a_node():
    if hasattr(os, "sched_setaffinity"):
        nodes = cores.numa_nodes()
        assert nodes and frozenset().union(*nodes) <= os.sched_getaffinity(0)
        assert len(cores.shared_out(5)) == 5


@needs_demo
@needs_pins
def test_memory_is_first_written_by_the_devices_own_threads(monkeypatch: pytest.MonkeyPatch):
    """Weights by whoever makes them, the caller among them; pages that are copied or restored."""
    one = frozenset({max(os.sched_getaffinity(0))})
    seen: list[tuple[str, frozenset[int]]] = []

    def watched(name: str, made):
        def make(*args):
            seen.append((name, frozenset(os.sched_getaffinity(0))))
            return made(*args)

        return make

    before = os.sched_getaffinity(0)
    for name in ("raw", "vector", "repacked"):
        monkeypatch.setattr(forms, name, watched(name, getattr(forms, name)))
    backend = CpuBackend(open_gguf(DEMO), threads=2, cores=one)
    with runtime.load(DEMO, devices="null", context=64, sequences=1) as model:
        graph = model.graph(1)
    backend.load([graph])
    backend.program(graph)
    assert {name for name, _ in seen} == {"raw", "vector", "repacked"}
    assert {where for _, where in seen} == {one} and os.sched_getaffinity(0) == before
    leaf = ops.state("pages", (5, ops.PAGE, 2, 40), ops.DTYPES["f16"])
    state = watched("state", backend.memory.state)

    class Watched(np.ndarray):
        def __setitem__(self, *args):
            seen.append(("written", frozenset(os.sched_getaffinity(0))))
            super().__setitem__(*args)

    monkeypatch.setattr(backend.memory, "state", lambda leaf: state(leaf).view(Watched))
    backend.write_state(leaf, [1], np.ones((1, ops.PAGE, 2, 40), np.float32))
    backend.copy_pages([leaf], [1], [2])
    assert [where for name, where in seen if name == "written"] == [one, one]
    assert backend.read_state(leaf, [2]).all() and os.sched_getaffinity(0) == before
    backend.close()
