"""What bounds a model's phases: classes of instructions, their sums, and the picture."""

from __future__ import annotations

import math
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from click.testing import CliRunner
from small_models import Sizes

import runtime
from runtime.backends.cpu.compile.isa import selected
from runtime.backends.cpu.run import raw_rates
from runtime.cli import bandwidth, bench_roofline, main
from runtime.report.roofline import CLASSES, Point, Roofline, points_of
from runtime.report.roofline_svg import picture
from runtime.traffic import of_token, seen_by

HIDDEN = Sizes().hidden
UNITS = {"int8 tiles": 4e12, "f32": 1e11}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch):
    """No measurement of the machine."""
    monkeypatch.setattr(bandwidth, "measured", lambda n: 1e10 * (1 + n))
    monkeypatch.setattr(raw_rates, "unit_rates", lambda threads: UNITS)


def steps(model: runtime.Model) -> tuple[list[Point], np.ndarray, object]:
    """The points of one decode, its nanoseconds, and what the step saw."""
    seen: list = []
    engine = model._engine

    def execute(program, inputs, live):
        results, nanoseconds = program.profile(inputs, live)
        sees = seen_by(inputs, dict(live), model.backend.page_nbytes)
        seen.append((points_of("x", program.plan, nanoseconds, sees), nanoseconds, sees))
        return results

    engine._execute = execute  # type: ignore[method-assign, assignment]
    model.eval([1], logits="last")
    return seen[-1]


@pytest.mark.parametrize("kind", ["small_model", "hybrid_model"])
def test_a_step_by_class(kind: str, request: pytest.FixtureRequest):
    """All its time is there, and of its products and cache as much as a forecast says."""
    with runtime.load(request.getfixturevalue(kind), threads=1, progress=False) as model:
        points, nanoseconds, _ = steps(model)
        traffic = of_token(model.graph(1), 1)
    found = {point.kind: point for point in points}
    wanted = {"matmul", "attention", "rest"} | ({"delta-net"} if kind == "hybrid_model" else set())
    assert set(found) == wanted <= set(CLASSES)
    assert math.isclose(sum(p.seconds for p in points), nanoseconds.sum() / 1e9)
    output = model.vocab_size * HIDDEN
    assert traffic.macs + output == pytest.approx(found["matmul"].macs, rel=0.01)
    assert found["matmul"].nbytes > 0.8 * traffic.weights
    assert found["attention"].macs < found["matmul"].macs / 10
    if "delta-net" in found:
        assert found["delta-net"].nbytes >= traffic.state


def roofline(*points: Point) -> Roofline:
    return Roofline("a <model>", "how", {1: 1e10, 2: 2e10}, UNITS, points)


def test_shares_of_memory_and_units():
    found = roofline(Point("decode", "matmul", 1.0, 1e10, 2e10))
    assert found.bandwidth == 2e10 and found.peak == 4e12
    assert found.shares(found.points[0]) == (0.5, 0.005)
    assert found.points[0].intensity == 2 and found.points[0].rate == 2e10
    nothing = Point("decode", "rest", 0.0, 0.0, 0.0)
    assert nothing.intensity == nothing.rate == 0 and found.shares(nothing) == (0, 0)


def test_the_picture_puts_points_where_they_belong():
    fast, slow = (Point("p", "matmul", 1.0, 1e10, macs) for macs in (2e12, 1e10))
    tiny = Point("p", "rest", 0.5, 1e9, 10.0)  # far below: in the table alone
    svg = picture(roofline(fast, slow, tiny, Point("q", "delta-net", 0.1, 1e9, 1e9)))
    root = ElementTree.fromstring(svg)
    marks = [e for e in root.iter() if e.tag.endswith("path") and e.find("{*}title") is not None]
    assert len(marks) == 3
    at = {e.find("{*}title").text: re.findall(r"-?[\d.]+", e.attrib["d"])[:2] for e in marks}  # type: ignore[union-attr]
    (x1, y1), (x2, y2) = (
        map(float, next(place for told, place in at.items() if f"{rate} GMAC/s" in told))  # type: ignore[operator]
        for rate in ("2000.0", "10.0")
    )
    assert x1 > x2 and y1 < y2
    texts = [e.text for e in root.iter() if e.tag.endswith("text")]
    assert {"a <model> ", "a <model>"} & set(texts) and "delta-net" in texts and "rest" in texts
    assert "int8 tiles 4,000" in texts and "2 threads read 20.0 GB/s" in texts
    width = float(root.attrib["width"])
    assert all(float(e.attrib.get("x", 0)) <= width for e in root.iter())


def written(svg: str) -> dict[str, dict[str, str]]:
    """The attributes of each text."""
    texts = (e for e in ElementTree.fromstring(svg).iter() if e.tag.endswith("text"))
    return {str(e.text): e.attrib for e in texts}


def test_labels_stand_where_no_mark_is():
    """A mark where a label would be: it moves along its line, a ceiling's also below it."""
    far = Point("q", "matmul", 1.0, 1e11, 1e8), Point("q", "matmul", 1.0, 1e6, 4.9e9)

    def at(*points: Point) -> dict[str, dict[str, str]]:
        found = roofline(*far, *points)
        return written(picture(found))

    before = at()
    for name, rate in (("int8 tiles 4,000", 4e12), ("f32 100", 1e11)):
        on_it = at(Point("p", "matmul", 1.0, rate / 4000, rate))[name]
        assert (on_it["x"], on_it["y"]) != (before[name]["x"], before[name]["y"])
    slope = "1 thread read 10.0 GB/s"
    below = at(*(Point("p", "matmul", 1.0, rate / 0.01, rate) for rate in (3e7, 5e7)))[slope]
    assert below["x"] != before[slope]["x"]
    assert "how; memory is read at 10.0 GB/s by 1 thread, 20.0 GB/s by 2 threads" in before


def test_a_mark_on_another_has_a_ring():
    two = [Point(phase, "matmul", 1.0, 1e10, 2e10) for phase in "pq"]
    alone = picture(roofline(two[0]))
    ring = 'fill="none" stroke="#4e79a7"'
    assert ring not in alone and picture(roofline(*two)).count(ring) == 1


def test_nothing_to_draw_is_drawn():
    ElementTree.fromstring(picture(roofline(Point("p", "rest", 0.0, 0.0, 0.0))))


def bench(*words: object) -> tuple[int, str]:
    line = ["bench", "-p", "0", "-n", "1", "-r", "1", "-t", "1", *map(str, words)]
    done = CliRunner().invoke(main, line)
    return done.exit_code, done.output


def test_the_command(small_model: Path, tmp_path: Path):
    code, said = bench(small_model, "--roofline", tmp_path / "r.svg", "-d", 40)
    assert code == 0, said
    svg = (tmp_path / "r.svg").read_text()
    for phase in ("prompt of 512", "decode", "decode after 40", "16 sequences"):
        assert f">{phase}<" in svg
    code, said = bench(small_model, "--roofline", tmp_path / "x.svg", "--devices", "cpu:0,cpu:1")
    assert code == 2 and "one CPU device" in said and not (tmp_path / "x.svg").exists()


def test_the_prompt_is_the_one_asked_for(small_model: Path, tmp_path: Path):
    code, said = bench(small_model, "--roofline", tmp_path / "r.svg", "-p", 24, "-n", 0, "-d", 8)
    assert code == 0 and ">prompt of 24<" in (tmp_path / "r.svg").read_text(), said
    assert "pp24 @ d8, 1 thread ..." in said


@pytest.mark.parametrize("option", ["--roofline", "--timeline"])
def test_a_picture_that_cannot_be_written(
    small_model: Path, tmp_path: Path, option: str, monkeypatch: pytest.MonkeyPatch
):
    """Refused before a model is loaded; a model's own file is not written over."""
    monkeypatch.setattr("runtime.cli.bench.load", None)
    code, said = bench(small_model, option, tmp_path / "no" / "r.svg")
    assert code == 1 and "no folder" in said and "..." not in said
    code, said = bench(small_model, option, small_model)
    assert code == 1 and "a file that is read" in said


def test_a_small_context_is_enough(small_model: Path):
    with runtime.load(small_model, threads=1, context=40, sequences=16, progress=False) as model:
        found = bench_roofline.roofline(model)
    assert found.phases()[0] == "prompt of 33" and found.phases()[2] == "decode after 33"


def test_raw_rates_of_every_unit():
    """Work over seconds, by unit; the seconds are made up, the loops are compiled and run."""
    runs: list[int] = []

    def timed(kernel):
        place = np.zeros(8, np.int64)
        kernel(place.ctypes.data, 0, 1)
        runs.append(1)
        return 2.0

    found = raw_rates.raw_rates(selected(), timed)
    assert len(runs) == len(found) and "f32" in found
    assert all(rate > 0 for rate in found.values())
