"""The report of CUDA kernels, as a command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_a_wrong_target_is_one_line():
    done = subprocess.run(
        [sys.executable, "-m", "runtime.backends.cuda.report", "sm_0"],
        capture_output=True, text=True, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")
