"""`scripts/gate_nvcc.py`: what is missing is one line, and its file has only what was measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

sys.path.append(str(Path(__file__).resolve().parent.parent / "scripts"))

import gate_nvcc

from runtime.errors import BackendError


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A copy of what was measured."""
    path = tmp_path / "loops.json"
    path.write_bytes(gate_nvcc.FOUND.read_bytes())
    monkeypatch.setattr(gate_nvcc, "FOUND", path)
    return path


def _nvcc(folder: Path, text: str) -> None:
    folder.mkdir()
    (folder / "nvcc").write_text(f"#!/bin/sh\n{text}\n")
    (folder / "nvcc").chmod(0o755)


def test_nothing_is_written_that_was_not_measured(
    kept: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    before = kept.stat().st_mtime_ns
    result = CliRunner().invoke(gate_nvcc.main, ["q9_K"])
    assert result.exit_code == 2 and "'Q4_K'" in result.output
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BackendError, match="no nvcc on the PATH"):
        CliRunner().invoke(gate_nvcc.main, ["Q4_K"], standalone_mode=False, catch_exceptions=False)
    _nvcc(tmp_path / "bin", "echo no such target >&2; echo more >&2; exit 3")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(BackendError, match=r"nvcc ended with 3 for sm_80 Q4_K: no such target$"):
        CliRunner().invoke(gate_nvcc.main, ["Q4_K"], catch_exceptions=False)
    assert kept.stat().st_mtime_ns == before


def test_what_was_measured_is_written(kept: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    before = json.loads(kept.read_text())
    _nvcc(tmp_path / "bin", "exit 0")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(gate_nvcc, "measured", lambda target, format, columns: 1 / 3)
    result = CliRunner().invoke(gate_nvcc.main, ["Q2_K"])
    assert result.exit_code == 0, result.output
    changed = {f"{target} Q2_K {n}": 0.3333 for target in gate_nvcc.TARGETS for n in (1, 8)}
    assert json.loads(kept.read_text()) == before | changed
    assert result.output.startswith("4 loops measured, 4 of them changed: ")
    assert list(before) == sorted(" ".join(map(str, loop)) for loop in gate_nvcc.loops())
