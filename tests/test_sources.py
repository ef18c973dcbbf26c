"""What a kernel is made of: its digest changes when it must, and only then."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.backends.cpu.compile.isa import selected
from runtime.backends.cpu.compile.library import Library
from runtime.backends.cpu.kernels import KERNELS as NUMBA
from runtime.backends.plan.entries import Entries
from runtime.backends.plan.kernel import Kernel
from runtime.backends.plan.library import _APART
from runtime.backends.plan.sources import Sources

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = Library(selected(), None)
APART = (*_APART, *Library.apart)
KERNELS = [
    *map(Kernel.of, NUMBA.names()),
    Kernel.of("matmul", format="Q4_0", columns=8, coding="int8"),
    Kernel.of("matmul_id", format="Q4_0", columns=8, coding="int8"),
    Kernel.of("pack_weights", format="Q4_0"),
    Kernel.of("get_rows", format="q4_0"),
    Kernel.of("get_packed_rows", format="Q4_0"),
]
PROGRAM = """
import json, sys
import runtime
from runtime.backends.plan.kernel import Kernel
from runtime.backends.cpu.compile.library import Library
library = Library("generic", None)
print(json.dumps({text: library.name(Kernel.parse(text)) for text in json.loads(sys.argv[1])}))
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources that can be edited."""
    copy = tmp_path_factory.mktemp("checkout")
    for folder in ("runtime", "ops", "backends"):
        unwanted = shutil.ignore_patterns("__pycache__", "*.gguf")
        shutil.copytree(ROOT / folder, copy / folder, ignore=unwanted)
    return copy


def _names(checkout: Path) -> dict[Kernel, str]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps([k.dump() for k in KERNELS])],
        cwd=checkout, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return {Kernel.parse(text): name for text, name in json.loads(done.stdout).items()}


@pytest.fixture(scope="module")
def before(checkout: Path) -> dict[Kernel, str]:
    return _names(checkout)


def _edited(checkout: Path, before: dict[Kernel, str], *files: str) -> set[str]:
    """Names of the kernels that are others once these files have one more line."""
    sources = {checkout / file: (checkout / file).read_text() for file in files}
    for path, source in sources.items():
        path.write_text(source + "\nFURTHER = 1\n")
    after = _names(checkout)
    for path, source in sources.items():
        path.write_text(source)
    return {kernel.name for kernel in KERNELS if before[kernel] != after[kernel]}


def _numba(*files: str) -> set[str]:
    return {name for name in NUMBA.names() if NUMBA.module(name).rpartition(".")[2] in files}


@pytest.mark.parametrize(
    ("file", "kernels"),
    [
        ("cpu/kernels/norm.py", {"rms_norm"}),
        ("cpu/kernels/moe.py", _numba("moe")),
        ("cpu/tile/emit.py", {"matmul", "matmul_id"}),
        ("cpu/tile/pack.py", {"pack_weights"}),
        ("cpu/tile/get_rows.py", {"get_rows"}),
        ("cpu/tile/packed_rows.py", {"get_packed_rows"}),
        ("cpu/kernels/simd.py", set(NUMBA.names())),
        ("cpu/kernels/attention_block.py", _numba("attention")),
    ],
)
def test_what_an_edited_file_is_part_of_alone_is_compiled_again(
    checkout: Path, before: dict[Kernel, str], file: str, kernels: set[str]
):
    assert _edited(checkout, before, f"backends/{file}") == kernels


def test_other_packages_count_too(checkout: Path, before: dict[Kernel, str]):
    assert _edited(checkout, before, "ops/codebooks.py") >= {"get_rows", "matmul"}


def test_what_no_code_is_made_of_changes_none(checkout: Path, before: dict[Kernel, str]):
    files = (
        "cpu/sizes.py", "cpu/compile/isa.py", "cpu/compile/library.py", "plan/lowering.py",
        "plan/library.py", "plan/catalogue.py", "cpu/run/executor.py",
    )  # fmt: skip
    edited = [f"backends/{file}" for file in files]
    assert _edited(checkout, before, *edited, "ops/errors.py") == set()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_every_module_that_compiling_imports_is_counted():
    """The syntax tree against what Python really imports, kernel by kernel."""
    program = """
import importlib, json, os, sys
import runtime
from runtime.backends.cpu.kernels.target import choose
choose(sys.argv[1])
import numba
before = set(sys.modules)
for modules in json.loads(sys.argv[2]):
    if os.fork() == 0:
        for module in modules:
            importlib.import_module(module)
        print(json.dumps([modules, sorted(set(sys.modules) - before)]), flush=True)
        os._exit(0)
    os.wait()
"""
    wanted = sorted({LIBRARY.modules(kernel) for kernel in KERNELS})
    done = subprocess.run(
        [sys.executable, "-c", program, selected(), json.dumps(wanted)],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert len(lines) == len(wanted)
    for modules, imported in map(json.loads, lines):
        counted = {*Sources(Entries(None), APART).modules(*modules), *APART}
        used = {m for m in imported if m.startswith(("runtime.backends.cpu.", "runtime.ops."))}
        assert {m for m in used - counted if not _is_package(m)} == set(), modules


def _is_package(module: str) -> bool:
    return (ROOT.joinpath(*module.split(".")[1:]) / "__init__.py").is_file()


def test_imports_are_remembered_between_processes(tmp_path: Path, monkeypatch):
    module = "runtime.backends.cpu.kernels.norm"
    first = Sources(Entries(tmp_path)).digest(module)
    monkeypatch.setattr("ast.parse", lambda *a: pytest.fail("parsed again"))
    assert Sources(Entries(tmp_path)).digest(module) == first


def test_a_damaged_memory_of_imports_is_made_again(tmp_path: Path):
    module = "runtime.backends.cpu.kernels.norm"
    first = Sources(Entries(tmp_path)).digest(module)
    (tmp_path / "imports").write_bytes(b"damaged")
    assert Sources(Entries(tmp_path)).digest(module) == first
    assert Entries(tmp_path).read("imports")
