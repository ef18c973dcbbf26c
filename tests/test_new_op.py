"""What a new op touches, by really adding one; and that no table elsewhere knows ops by name."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

from runtime.backends.cpu.rules import RULES
from runtime.ops.registry import FUSED, OPS

ROOT = Path(__file__).resolve().parents[1]
PRODUCT = ("ops", "backends", "runtime")

# file -> what is written at its end; nothing else changes
CUBE = {
    "ops/elementwise.py": '''

@op("cube", kind=Kind.ELEMENTWISE, shape=same_shape, flops=2, cases=[Case(((3, 50),))])
def cube(x: np.ndarray) -> np.ndarray:
    """x * x * x."""
    return x * x * x
''',
    "backends/cpu/kernels/elementwise.py": """

def build_cube():
    return _unary(helper(lambda x: x * x * x))
""",
    "tests/oracles.py": """

@oracle
def cube(x: Array) -> Array:
    return _each(x, lambda at: x[at] ** 3)
""",
}
USE = """
import sys
import numpy as np
from runtime import ops
sys.path.append("tests")
from oracles import ORACLES
from runtime.backends.cpu import CpuBackend
from runtime.backends.reference import ReferenceBackend
x = ops.step_input("x", (3, 50), ops.DTYPES["f32"])
graph = ops.Graph((ops.cube(ops.scale(x, factor=0.5)),))
value = {"x": np.linspace(-2, 2, 150, dtype=np.float32).reshape(3, 50)}
cpu = CpuBackend(threads=2)
got, want = (b.program(graph).run(value, {})[0].copy() for b in (cpu, ReferenceBackend()))
cpu.close()
assert np.allclose(got, want, rtol=1e-6) and sorted(ops.OPS) == sorted(ORACLES)
assert np.allclose(want, ORACLES["cube"](value["x"] / 2)) and graph.cost().flops == 3 * 150
print("agrees")
"""


def test_a_plain_op_touches_three_files(tmp_path: Path):
    for folder in PRODUCT:
        shutil.copytree(ROOT / folder, tmp_path / folder)
    (tmp_path / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "oracles.py", tmp_path / "tests")
    for file, text in CUBE.items():
        with (tmp_path / file).open("a", encoding="utf-8") as out:
            out.write(text)
    found = subprocess.run(
        [sys.executable, "-c", USE], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert found.stdout.strip() == "agrees", found.stderr
    assert len(CUBE) == 3, "its file, its kernel, its oracle"


# An op's own files, its rules and its kernels; and folders that know words, not graphs.
_APART = (
    "ops/", "/rules/", "/kernels/", "/tile/", "/cuda/", "runtime/text/", "runtime/cli/",
    "runtime/conversion/", "runtime/report/",
)  # fmt: skip
_DECLARE = ("op", "fused")


def _named_ops(path: Path) -> set[int]:
    """Lines of a file with the name of an op in a string, declarations left out."""
    tree = ast.parse(path.read_text("utf-8"))
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and n.args]
    own = {n.args[0] for n in calls if getattr(n.func, "id", "") in _DECLARE}
    texts = (n for n in ast.walk(tree) if isinstance(n, ast.Constant) and n not in own)
    return {n.lineno for n in texts if n.value in {*OPS, *FUSED}}


def test_hardly_a_line_names_an_op_by_a_string():
    """What works on graphs asks kinds, or for an op's object: a misspelt one fails at import."""
    assert len(FUSED) > 10 and "linear" in RULES.names()
    files = [p for folder in PRODUCT for p in (ROOT / folder).rglob("*.py")]
    lines = {
        path.relative_to(ROOT).as_posix(): found
        for path in files
        if not any(part in path.relative_to(ROOT).as_posix() for part in _APART)
        if (found := _named_ops(path))
    }
    assert sum(map(len, lines.values())) <= 15, lines
