"""`scripts/gpu_probe.py` on a driver without a GPU: all runs, nothing is timed, faults are seen."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

pytest.importorskip("greenlet", reason="the CUDA simulator needs greenlet")
sys.path.append(str(Path(__file__).resolve().parent.parent / "scripts"))

import gpu_probe
import gpu_probe_cases
import gpu_probe_step

from runtime.backends.cuda.catalogue import KERNELS
from runtime.backends.cuda.graphs import chain

SLOW = "tile", "attention-dim=128"  # on the simulator; tests of their own run them
TIMES = {
    "us", "seconds", "plain_s", "gb_per_s", "share", "tflops", "took_s", "prepare_s", "load_s",
    "copy_gb_per_s", "int8_peak_tflops", "plain_us_per_node", "programmatic_us_per_node",
}  # fmt: skip


def _quick_cases(rng: np.random.Generator, sizes: Any) -> Iterator[gpu_probe_cases.Case]:
    every = gpu_probe_cases.cases(rng, sizes)
    return (case for case in every if not case.name.startswith(SLOW))


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """A whole run."""
    with pytest.MonkeyPatch.context() as patch:
        quick = {**vars(gpu_probe_cases), "cases": _quick_cases}
        patch.setattr(gpu_probe, "cases", type("Cases", (), quick))
        return gpu_probe.probe(gpu_probe.opened(True, 0))


def test_every_part_runs(report):
    assert report["fake"] and set(report["parts"]) == set(gpu_probe.PARTS)
    assert not {name: part for name, part in report["parts"].items() if "error" in part}
    assert all(row["right"] for row in report["parts"]["numerics"]["rows"])
    assert report["parts"]["replays"]["differing"] == {"plain": 0, "programmatic": 0}
    assert report["parts"]["shared memory"]["right"]


def test_no_time_is_invented(report):
    found = dict(_leaves(report))
    times = {path: value for path, value in found.items() if set(path) & TIMES}
    assert len(times) > 30
    assert set(times.values()) == {None}
    json.dumps(report, allow_nan=False)


def _leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        here = (*path, str(key))
        if isinstance(inner, dict | list):
            yield from _leaves(inner, here)
        else:
            yield here, inner


@pytest.mark.parametrize("sizes", ["SMALL", "LARGE"])
def test_every_kernel_is_a_case_with_its_declared_arguments(sizes: str, monkeypatch):
    monkeypatch.setattr(gpu_probe_cases, "LARGE", gpu_probe_cases.Sizes(512, 9, 4, 3, 2, 4, 99, 99))
    cases = list(gpu_probe_cases.cases(np.random.default_rng(1), getattr(gpu_probe_cases, sizes)))
    assert {step[0] for case in cases for step in case.steps} == set(KERNELS.every())
    for case in cases:
        gpu = gpu_probe.Gpu(gpu_probe.opened(True, 0))
        with gpu.device.arena(1 << 24) as arena:
            gpu_probe.timing.placed(gpu, arena, case)


def test_wrong_numbers_are_an_error_that_names_the_kernel(monkeypatch):
    def broken(rng: np.random.Generator, sizes: Any) -> Iterator[gpu_probe_cases.Case]:
        case = gpu_probe_cases.rms_norm(rng, sizes, packed=False)
        case.arrays["w"][3] += 1
        yield case
        yield gpu_probe_cases.argmax(rng, sizes)

    monkeypatch.setattr(gpu_probe.cases, "cases", broken)
    found = gpu_probe.numerics(gpu_probe.Gpu(gpu_probe.opened(True, 0)))
    assert found["error"] == "wrong: norm-warps=1-wide=True"
    assert [row["right"] for row in found["rows"]] == [False, True]


def test_outputs_that_stay_unset_are_wrong():
    case = gpu_probe_cases.swiglu(np.random.default_rng(1), gpu_probe_cases.SMALL, packed=True)
    assert not case.check(case.arrays["out"], case.arrays["meta"]) <= case.tolerance
    case = gpu_probe_cases.rms_norm(np.random.default_rng(1), gpu_probe_cases.SMALL, packed=False)
    assert not case.check(case.arrays["out"]) <= case.tolerance


def test_a_graph_without_an_edge_is_noticed(monkeypatch):
    monkeypatch.setattr(gpu_probe_step, "dependencies", lambda found, _: chain(len(found))[1:])
    device = gpu_probe.opened(True, 0)
    monkeypatch.setattr(gpu_probe, "PARTS", {"replays": gpu_probe.replays, "none": lambda _: {}})
    parts = gpu_probe.probe(device)["parts"]
    assert "no edges lead from" in parts["replays"]["error"]
    assert "error" not in parts["none"]


def test_no_part_begins_after_the_time():
    parts = gpu_probe.probe(gpu_probe.opened(True, 0), seconds=-1)["parts"]
    assert {part["error"] for part in parts.values()} == {"not begun: -1 s were over"}


def test_the_command_prints_and_saves(report, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_probe, "DATA", tmp_path / "kept")
    monkeypatch.setattr(gpu_probe, "probe", lambda *_: report)
    result = CliRunner().invoke(gpu_probe.main, ["--fake", "--out", str(tmp_path / "a.json")])
    assert result.exit_code == 0, result.output
    assert "FAKE DRIVER: no GPU was used, nothing was timed" in result.output
    assert "attention-dim=64" in result.output and "GB/s" in result.output
    assert json.loads((tmp_path / "a.json").read_text()) == report
    CliRunner().invoke(gpu_probe.main, ["--fake"])
    assert not gpu_probe.DATA.exists()  # what a fake says is not kept
    assert gpu_probe.default_path(report).name == f"fake-h100-{report['date']}.json"


def test_the_command_fails_with_its_parts_and_without_a_gpu(report, monkeypatch):
    bad = report | {"parts": report["parts"] | {"tile": {"error": "no such thing"}}}
    monkeypatch.setattr(gpu_probe, "probe", lambda *_: bad)
    result = CliRunner().invoke(gpu_probe.main, ["--fake"])
    assert result.exit_code == 1 and "tile: no such thing" in result.output
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    result = CliRunner().invoke(gpu_probe.main, [])
    assert result.exit_code == 1 and "pip install 'graph-runtime[cuda]'" in result.output
