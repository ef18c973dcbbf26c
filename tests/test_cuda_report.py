"""The report of CUDA kernels, as a command."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from fake_nodes import FakeLibrary

from runtime.backends.cuda import report
from runtime.backends.cuda.catalogue import Compiled
from runtime.backends.cuda.report import Figures
from runtime.backends.plan.kernel import Kernel


class Stub(FakeLibrary):
    """Kernels without code, said to be of a target."""

    def __init__(self, target: str) -> None:
        self.target = target

    def get(self, kernel: Kernel) -> Compiled:
        """With registers."""
        return replace(super().get(kernel), registers=40)


def test_a_wrong_target_is_one_line():
    done = subprocess.run(
        [sys.executable, "-m", "runtime.backends.cuda.report", "sm_0"],
        capture_output=True, text=True, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")


def test_what_nvcc_makes_of_a_loop_stands_beside_ours(monkeypatch: pytest.MonkeyPatch):
    kernel, code = Kernel.of("matvec", format="Q4_K", columns=1), Figures(90, "IDP.4A", 73, 4.56, 8)
    monkeypatch.setattr(report, "figures", lambda compiled: code)
    line = report.table(Stub("sm_80"), [kernel], {"sm_80 Q4_K 1": 4.7188})[2]  # type: ignore
    assert line.endswith("| 73 | 4.56 IDP.4A | 4.72 | 8 |")
    line = report.table(Stub("sm_90a"), [kernel], {"sm_80 Q4_K 1": 4.7188})[2]  # type: ignore
    assert line.endswith("| 73 | 4.56 IDP.4A |  | 8 |")
    assert {case.split()[0] for case in report.nvcc_loops()} == {"sm_80", "sm_90a"}
