"""`runtime bench --parallel`: a row for each number of requests, and who was in which step."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from click.testing import CliRunner
from fake_model import DEMO, needs_demo

from runtime.cli import main

pytestmark = needs_demo
SIZES = ["-p", "40", "-n", "6", "-r", "1"]


def run(*options: str) -> str:
    done = CliRunner().invoke(main, ["bench", str(DEMO), *SIZES, *options])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_a_row_for_each_number_and_a_picture(tmp_path: Path):
    picture = tmp_path / "steps.svg"
    lines = run("--parallel", "1,3", "--timeline", str(picture)).splitlines()
    assert len(lines) == 4 and len(set(map(len, lines))) == 1
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert rows[0][:4] == ["PP", "TG", "B", "N_KV"]
    assert rows[3][:4] == ["40", "6", "3", "138"] and all(float(c) > 0 for c in rows[3])
    boxes = [
        e.get("fill") for e in ET.fromstring(picture.read_text()).iter() if e.tag[-4:] == "rect"
    ]
    assert boxes.count("#59a14f") == 1 + 3 * 5, "a box for each token but the prompts'"
    assert boxes.count("#4e79a7") >= 1 + 3


def test_as_lines_of_json():
    (row,) = map(json.loads, run("--parallel", "2", "-o", "jsonl").splitlines())
    assert row["pl"] == 2 and row["speed_tg"] > 0 and row["t"] >= row["t_pp"]


@pytest.mark.parametrize("options", [["-d", "5"], ["-pg", "4,4"], ["-o", "csv"], ["-n", "0"]])
def test_what_is_not_measured_of_several(options: list[str]):
    done = CliRunner().invoke(main, ["bench", str(DEMO), *SIZES, *options, "--parallel", "2"])
    assert done.exit_code and "--parallel" in done.output and "Traceback" not in done.output
