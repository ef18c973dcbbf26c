"""Times of a decode step on a GPU, drawn: on a driver without one that makes the times up."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner
from fake_driver import FakeDriver
from fake_nodes import FakeLibrary

import runtime
from runtime import inspection
from runtime.backends.cuda.timeline import Bar, Timeline
from runtime.cli import main
from runtime.cli.bench_timeline import step
from runtime.report.timeline_svg import _pieces, picture

US = 1e-6


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeDriver:
    """A GPU on which every launch takes 10 µs and every event 1."""
    driver = FakeDriver(microseconds=10.0)
    monkeypatch.setattr("runtime.backends.cuda.opening.open_driver", lambda: driver)
    monkeypatch.setattr("runtime.backends.cuda.launcher.library", lambda target: FakeLibrary())
    monkeypatch.setenv("RUNTIME_CACHE_DIR", str(tmp_path))
    return driver


@pytest.fixture
def model(gpu: FakeDriver, small_model: Path) -> Iterator[runtime.Model]:
    with runtime.load(small_model, devices="cuda", context=128, progress=False) as model:
        yield model


def test_a_step_is_timed_launch_by_launch_and_as_a_graph(model: runtime.Model):
    found = step(model)
    count = len(list(model._engine.programs.of(1, 1).plan.calls()))
    assert len(found.bars) == count and all(bar.subject for bar in found.bars)
    assert [bar.seconds for bar in found.bars] == pytest.approx([11 * US] * count)
    starts = [(1 + 12 * n) * US for n in range(count)]  # behind the events before it
    assert [bar.start for bar in found.bars] == pytest.approx(starts)
    assert found.replayed == pytest.approx((10 * count + 1) * US)
    assert found.gap == pytest.approx((found.replayed - found.busy) / (count - 1))


def test_looking_leaves_the_model_as_it_was(model: runtime.Model):
    step(model)
    assert "_execute" not in vars(model._engine)
    with model.session() as session:
        assert len(session.eval([1, 2])) == 2


def _bars(svg: str) -> list[ElementTree.Element]:
    root = ElementTree.fromstring(svg)
    space = "{http://www.w3.org/2000/svg}"
    return [r for r in root.iter(f"{space}rect") if r.find(f"{space}title") is not None]


def test_the_picture_has_each_launch_to_scale():
    bars = [Bar("matvec", "a & b", 0.0, 30 * US), Bar("norm", "c", 40 * US, 10 * US)]
    svg = picture(Timeline(bars, 35 * US), "a step")
    first, second = _bars(svg)
    width, gap = (float(e.get("width")) for e in (first, second))
    assert width == pytest.approx(3 * gap, rel=1e-3)
    assert float(second.get("x")) - float(first.get("x")) == pytest.approx(4 * gap, rel=1e-3)
    assert first.get("fill") != second.get("fill")
    assert "2 launches, 40.0 µs in all; one by one 50.0 µs" in svg
    assert "35.0 µs as one graph, -5.0 µs" in svg and "a &amp; b" in svg
    assert "matvec: 1 x, 30.0 µs, 75 %" in svg and "norm: 1 x, 10.0 µs, 25 %" in svg


def test_a_bar_goes_on_in_the_next_line():
    pieces = list(_pieces(8 * US, 14 * US, 10 * US))
    assert [line for line, _, _ in pieces] == [0, 1, 2]
    assert [width for *_, width in pieces] == pytest.approx([200, 1000, 200])


def test_many_launches_are_in_lines_and_rare_kernels_one_entry():
    bars = [Bar(f"kernel{n % 13}", f"{n}", n * 11 * US, 10 * US) for n in range(300)]
    svg = picture(Timeline(bars, math.nan), "t")
    lines = {float(bar.get("y")) for bar in _bars(svg)}
    assert 5 <= len(lines) <= 14 and "3 others" in svg and "not timed" in svg
    assert all(0 <= float(b.get("x")) <= 1024.1 for b in _bars(svg))


@pytest.mark.parametrize("bars", [[], [Bar("a", "b", math.nan, math.nan)]])
def test_no_times_are_a_picture_without_bars(bars: list[Bar]):
    assert _bars(picture(Timeline(bars, math.nan), "t")) == []


def _bench(*args: str) -> Any:
    sizes = ("-p", "4", "-n", "2", "-r", "1", "--no-warmup")
    return CliRunner().invoke(main, ["bench", *args, *sizes])


def test_bench_says_shares_of_the_gpu_and_draws(gpu: FakeDriver, small_model: Path, tmp_path: Path):
    svg = tmp_path / "step.svg"
    args = str(small_model), "--devices", "cuda:0", "-o", "json", "--timeline", str(svg)
    result = _bench(*args)
    assert result.exit_code == 0, result.output
    prompt, decode = json.loads(result.stdout)
    assert prompt["backends"] == "CUDA" and prompt["gpu_info"] == "cuda:0 (fake H100)"
    peaks = next(iter(json.loads((tmp_path / "gpu-peaks.json").read_text()).values()))
    wanted = 2e9 * prompt["gmac_per_s"] / peaks["int8"]
    assert prompt["tensor_share"] == pytest.approx(wanted)
    assert decode["bandwidth_share"] > 0 and decode["tensor_share"] is None
    bars = len(_bars(svg.read_text()))
    assert decode["gap_us"] == pytest.approx((1 - bars) / (bars - 1), abs=0.01)
    assert decode["idle_us"] == pytest.approx(2)  # events: of the step, and behind its inputs
    assert prompt["gap_us"] is None and prompt["idle_us"] is None
    assert len(_bars(svg.read_text())) > 10
    table = _bench(str(small_model), "--devices", "cuda:0")
    assert re.search(r"\| +CUDA +\|", table.stdout.replace("CUDA ", " CUDA ")), table.output
    assert "tensor_share" in table.stdout and re.search(r" 2\.00 \|$", table.stdout, re.MULTILINE)


def test_a_timeline_of_a_cpu_is_refused(small_model: Path, tmp_path: Path):
    result = _bench(str(small_model), "--devices", "null", "--timeline", str(tmp_path / "x.svg"))
    assert result.exit_code != 0 and "--timeline is of a model on one GPU" in result.stderr


def test_debug_shows_the_share_of_the_gpus_bandwidth(
    model: runtime.Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setenv("DEBUG", "2")
    with model.session() as session:
        session.eval([1])
    said = capsys.readouterr().err
    best = model.backend.bandwidth()
    assert f"{best / 1e9:.1f} GB/s measured" in said
    assert inspection._bandwidth_of(model.backend) == best
