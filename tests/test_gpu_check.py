"""`scripts/gpu_check.py` on a driver without a GPU: every part runs, no time is made up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

pytest.importorskip("greenlet", reason="the CUDA simulator needs greenlet")
sys.path.append(str(Path(__file__).resolve().parent.parent / "scripts"))

import gpu_check
import gpu_check_models
import gpu_check_ops
import gpu_check_scratch
import gpu_check_setup
from fake_driver import FakeDriver
from gpu_check_setup import Check, Row

from runtime.errors import BackendError, Error

COUNTS = {"launches", "memory_bytes_per_node", "gb", "clock_mhz", "l2_mb", "memory_gb", "free_gb"}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A whole run."""
    return gpu_check.run(Check(True), gpu_check.PARTS, 1e9)


def test_every_part_runs(report: dict[str, Any]):
    parts = report["parts"]
    assert report["dry"] and list(parts) == list(gpu_check.PARTS)
    assert {name: part["error"] for name, part in parts.items() if "error" in part} == {}
    (grid,) = parts["ops"]["rows"]
    assert grid["equal"] >= 4 and grid["equal"] + grid["declined"] == grid["points"]
    assert parts["golden"]["rows"][0]["nmse"] < 1e-6
    assert parts["replays"]["rows"][0]["differing"] == 0
    assert parts["splits"]["rows"][0]["equal"]


def test_no_time_is_made_up(report: dict[str, Any]):
    for name in ("machine", "loading", "launches", "replays", "speed"):
        for row in report["parts"][name]["rows"]:
            numbers = {k: v for k, v in row.items() if isinstance(v, float) and k not in COUNTS}
            assert numbers == {}, f"{name} {row['name']}"
    json.dumps(report, allow_nan=False)


def test_a_part_that_fails_keeps_what_it_found_and_costs_no_other():
    def broken(check: Check) -> Iterator[Row]:
        yield {"name": "first", "right": True}
        raise ValueError("no such thing")

    def wrong(check: Check) -> Iterator[Row]:
        yield {"name": "one", "right": False}

    parts = {name: gpu_check.Part(run, 9) for name, run in (("a", broken), ("b", wrong))}
    found = gpu_check.run(Check(True), parts, 1e9)["parts"]
    assert found["a"]["error"] == "ValueError: no such thing" and len(found["a"]["rows"]) == 1
    assert found["b"]["error"] == "wrong: one"


def test_a_part_apart_is_ended_in_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Of a process that hangs what it wrote is kept."""
    program = tmp_path / "part.py"
    program.write_text(
        "import json, sys, time; from pathlib import Path\n"
        "path = Path(sys.argv[sys.argv.index('--out') + 1])\n"
        "path.write_text(json.dumps({'rows': [{'name': 'kept'}]})); time.sleep(60)\n"
    )
    monkeypatch.setattr(gpu_check, "__file__", str(program))
    start = time.monotonic()
    found = gpu_check.apart("machine", Check(True), 3)
    assert found == {"rows": [{"name": "kept"}], "error": "ended after 3 s"}
    program.write_text("import sys; sys.exit(3)")
    assert gpu_check.apart("ops", Check(True), 9) == {"rows": [], "error": "ended with 3"}
    assert time.monotonic() - start < 20


def test_no_part_begins_after_the_time():
    found = gpu_check.run(Check(True), gpu_check.PARTS, 1)["parts"]
    assert {part["error"] for part in found.values()} == {"not begun: 1 s were over"}


def test_a_wrong_kernel_is_named(monkeypatch: pytest.MonkeyPatch):
    import test_ops

    monkeypatch.setattr(test_ops, "_error", lambda got, want: 1.0)
    says = gpu_check_ops._says(Check(True), "add", 0, "whole")
    assert says is not None and says.startswith("AssertionError")


def test_rows_that_differ_in_bits_are_counted(monkeypatch: pytest.MonkeyPatch):
    """A digest sees every bit of a row."""
    seen: list[list[bytes]] = []

    class Session:
        def __init__(self, flip: bool) -> None:
            self.flip, self.n = flip, 0

        def eval(self, ids: list[int]) -> Any:
            import numpy as np

            self.n += 1
            row = np.zeros((1, 4), np.float32)
            if self.flip and self.n == 2:
                row.view(np.uint32)[0, 3] = 1
            return row

    for flip in (False, True):
        seen.append(gpu_check_models._digests(Session(flip), [1], 3))  # type: ignore[arg-type]
    assert [a == b for a, b in zip(*seen, strict=True)] == [True, False, True]


def test_the_command_prints_and_saves(
    report: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(gpu_check, "run", lambda *_: report)
    monkeypatch.setattr(gpu_check, "DATA", tmp_path / "kept")
    path = tmp_path / "a.json"
    result = CliRunner().invoke(gpu_check.main, ["--dry", "--out", str(path)])
    assert result.exit_code == 0, result.output
    assert "DRIVER WITHOUT A GPU" in result.output and "fake H100" in result.output
    assert json.loads(path.read_text()) == report
    CliRunner().invoke(gpu_check.main, ["--dry"])
    assert not gpu_check.DATA.exists()  # what no GPU said is not kept
    assert gpu_check._slug(report) == "fake-h100"


def test_what_is_missing_is_one_line_before_any_part(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(gpu_check, "run", lambda *_: pytest.fail("a part ran"))
    monkeypatch.setattr(gpu_check_setup, "open_driver", lambda: FakeDriver())
    monkeypatch.setenv("RUNTIME_CACHE_DIR", str(tmp_path / "cache"))
    absent, empty = tmp_path / "absent", tmp_path / "empty"
    empty.mkdir()
    for given, says in (
        (["--device", "7"], "no GPU cuda:7: the driver sees 1"),
        (["--carried", absent], f"{absent}: no such folder, see --prepare"),
        (["--carried", empty], f"{empty}: no kernels are in it, see --prepare"),
        (["--prepare", absent, "--target", "sm_75"], "no CUDA target 'sm_75': there are sm_80"),
    ):
        result = CliRunner().invoke(gpu_check.main, list(map(str, given)))
        assert isinstance(result.exception, Error) and result.output == ""
        assert str(result.exception).startswith(says) and not absent.exists()
    monkeypatch.setattr(gpu_check_setup, "open_driver", _no_driver)
    result = CliRunner().invoke(gpu_check.main)
    assert str(result.exception) == "no driver" and result.output == ""


def _no_driver():
    raise BackendError("no driver")


def test_help_keeps_its_lines():
    for name in ("-h", "--help"):
        result = CliRunner().invoke(gpu_check.main, [name])
        assert "\n  ops       the op grid against numpy\n" in result.output, result.output


def test_folders_of_ended_processes_are_removed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """By who is ended with SIGTERM itself; by the next run after a kill; never a living one's."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(gpu_check_scratch.tempfile, "tempdir", None)
    program = tmp_path / "maker.py"
    program.write_text(
        "import signal, sys, time\n"
        "from gpu_check_scratch import scratch\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        "print(scratch(in_memory=False), flush=True); time.sleep(60)\n"
    )
    env = os.environ | {"PYTHONPATH": str(Path(gpu_check.__file__).parent)}
    made = {}
    for how in ("terminated", "killed", "living"):
        process = subprocess.Popen(
            [sys.executable, program], stdout=subprocess.PIPE, text=True, env=env
        )
        assert process.stdout is not None
        made[how] = process, Path(process.stdout.readline().strip())
    try:
        made["terminated"][0].terminate()
        made["killed"][0].kill()
        assert made["terminated"][0].wait() == 143 and made["killed"][0].wait()
        there = {how: folder.is_dir() for how, (_, folder) in made.items()}
        assert there == {"terminated": False, "killed": True, "living": True}
        gpu_check_scratch.sweep(tmp_path)
        assert list(tmp_path.glob("gpu-check-*")) == [made["living"][1]]
    finally:
        for process, _ in made.values():
            process.kill()
            process.communicate()


def test_pictures_lie_beside_the_report(tmp_path: Path):
    report = {"parts": {"speed": {"rows": [{"name": "Llama 8B, Q4", "svg": "<svg/>"}, {}]}}}
    report["parts"]["speed"]["rows"][1]["name"] = "none"
    gpu_check.pictures(report, tmp_path / "h100.json")
    assert report["parts"]["speed"]["rows"][0]["svg"] == "h100-llama-8b-q4.svg"
    assert (tmp_path / "h100-llama-8b-q4.svg").read_text() == "<svg/>"


def test_the_command_fails_with_its_parts(report: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    bad = report | {"parts": report["parts"] | {"golden": {"rows": [], "error": "x", "took_s": 1}}}
    monkeypatch.setattr(gpu_check, "run", lambda *_: bad)
    result = CliRunner().invoke(gpu_check.main, ["--dry"])
    assert result.exit_code == 1 and "ERROR x" in result.output
