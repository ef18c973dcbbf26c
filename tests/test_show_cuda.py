"""`scripts/show_cuda.py`: launches counted where they end, layers cut where they begin, errors."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

pytest.importorskip("greenlet", reason="the CUDA simulator needs greenlet")
sys.path.append(str(Path(__file__).resolve().parent.parent / "scripts"))

import show_cuda

from runtime.backends.cuda import simulator
from runtime.backends.cuda.catalogue import KERNELS
from runtime.backends.plan.kernel import Kernel
from runtime.ops.errors import BackendError


def shown(*arguments: str) -> str:
    result = CliRunner().invoke(show_cuda.main, arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def cells(text: str, name: str) -> list[str]:
    """What a table has behind the cell `name`."""
    (line,) = (line for line in text.splitlines() if re.match(rf"│ {name} +│", line))
    return [cell.strip() for cell in line.split("│")[2:-1]]


def test_what_tests_launch_is_counted():
    tests = Path(__file__).parent / "test_cuda_smoke.py"
    done = subprocess.run(
        [sys.executable, show_cuda.__file__, "coverage", tests], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert cells(done.stdout, "matvec_float") == ["4", "0", "1", "1", "0", "1"]
    assert cells(done.stdout, "all")[1:] == ["0", "2", "2", "0", "2"]
    lines = done.stdout.splitlines()
    assert {"take: no form ran", "matvec_float-columns=8: ran nowhere"} <= set(lines)
    assert "gather_rows: in simulator alone" in lines


def test_a_launch_that_fails_is_not_counted(monkeypatch: pytest.MonkeyPatch):
    def launch(kernel: Any, *arguments: Any) -> None:
        if arguments:
            raise BackendError("wrong")

    monkeypatch.setattr(simulator, "launch", launch)
    launches, kernel = show_cuda.Launches(monkeypatch), Kernel.of("take")
    found = KERNELS.build(kernel)
    simulator.launch(found)
    with pytest.raises(BackendError):
        simulator.launch(found, 1)
    simulator.launch(launches)  # a kernel that is not of the catalogue
    assert launches.ran == {"numpy": {}, "simulator": {kernel: 1}}


def test_launches_of_each_kind_of_layer(hybrid_model: Path):
    titles = re.findall(r"^(\w.*); launches: (\d+)", shown("launches", str(hybrid_model)), re.M)
    assert [title for title, _ in titles] == [
        "before the layers", "delta-net: layer 0, 2", "attention: layer 1", "behind them"
    ]  # fmt: skip
    total = re.search(r"layers: 3, launches: (\d+)", shown("launches", str(hybrid_model)))
    once, twice, other, last = (int(n) for _, n in titles)
    assert total and int(total[1]) == once + 2 * twice + other + last


def test_a_model_decodes_as_on_the_cpu(small_model: Path):
    """Two layers; the prompt and each token are a replayed graph."""
    *_, layers, outside, replays, tokens, cpu, exact = show_cuda.decoded(small_model, 2)
    assert re.fullmatch(r"2 x \d", layers) and outside == "3 + 1" and replays == "3"
    assert len(tokens.split()) == 2
    for errors in (cpu, exact):
        assert float(errors.split()[1]) < 1e-6 and errors.endswith(" 8/8")
