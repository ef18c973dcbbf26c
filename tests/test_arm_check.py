"""The pieces of scripts/check_arm.sh that need no Arm: compile processes, pins, wrong usage."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.backends.cpu.compile import compilers, isa
from runtime.backends.cpu.compile.symbols import undefined_symbols
from runtime.backends.cpu.tile.emit import emit_matmul
from runtime.backends.cpu.tile.spec import TileSpec
from runtime.backends.plan.kernel import Kernel

SCRIPTS = Path(__file__).parents[1] / "scripts"
AARCH64 = 183  # e_machine of <elf.h>

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or isa.host_arch() != "x86_64", reason="for Linux on x86-64"
)


def asked(name: str, *lines: str) -> list[tuple[dict, bytes]]:
    """Answers of a compile process for Arm: header and object code."""
    command = [sys.executable, str(SCRIPTS / "arm_cross.py"), name]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        command, input="\n".join(lines).encode() + b"\n", capture_output=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-500:]
    answers, rest = [], done.stdout
    while rest:
        head, _, rest = rest.partition(b"\n")
        header = json.loads(head)
        size = header.get("nbytes", 0)
        answers.append((header, rest[:size]))
        rest = rest[size:]
    return answers


def test_kernels_are_compiled_for_arm():
    """Numba's and the emitter's, what a test emits, and an error that names its cause."""
    lines = [
        Kernel.of("rms_norm").dump(),
        Kernel.of("matmul", format="Q4_0", columns=8, coding="int8").dump(),
        json.dumps({"ir": emit_matmul(TileSpec("F32", 1, "f32"), "arm_i8mm")}),
        json.dumps({"ir": "define void @entry() { ret i32 1 }"}),
        Kernel.of("no_such_kernel").dump(),
    ]
    *good, refused, unknown = asked("arm_i8mm", *lines)
    for header, code in good:
        assert code[:4] == b"\x7fELF"
        assert struct.unpack_from("<H", code, 18) == (AARCH64,)
        needed = undefined_symbols(code)
        assert not {n for n in needed if "x86" in n}, needed
        assert header["symbol"]
    assert "LLVM refuses a kernel" in refused[0]["error"]
    assert "error" in unknown[0]


def test_the_script_recognises_a_compile_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """`python-arm` takes what is started with these arguments for one, and its fourth for the set.

    The start of a real process is caught by a program that answers with its fourth argument.
    """
    spy = tmp_path / "python"
    answer = """echo '{"symbol": "'"$4"'", "nbytes": 0}'"""
    spy.write_text(f'#!/bin/sh\nread line\ncase "$2" in *"import serve"*) {answer} ;; esac\n')
    spy.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(spy))
    kernel = Kernel.of("rms_norm")
    [(found, head, code)] = compilers.compile_all([kernel], "arm_i8mm")
    assert (found, head["symbol"], code) == (kernel, "arm_i8mm", b"")
    assert '*"import serve"*' in (SCRIPTS / "check_arm.sh").read_text()


def test_pins_are_what_is_installed():
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "arm_pins.py")], capture_output=True, text=True
    )
    if done.returncode:
        assert "has no package" in done.stderr  # not everything of the tests is installed
        return
    names = {pin.partition("==")[0] for pin in done.stdout.split()}
    assert {"numpy", "numba", "llvmlite", "pytest"} <= names


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["-h"], 0, "cortex-a76 (arm_dotprod)"),
        (["z80"], 2, "unknown processor z80"),
        (["-x"], 2, "-q          quick"),
    ],
)
def test_usage(arguments: list[str], status: int, says: str):
    command = ["bash", str(SCRIPTS / "check_arm.sh"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == status
    assert says in done.stdout + done.stderr


def test_a_python_without_the_dependencies_is_named(tmp_path: Path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'python has no package numba' >&2\nexit 1\n")
    python.chmod(0o755)
    command = ["bash", str(SCRIPTS / "check_arm.sh"), "-d", str(tmp_path / "work"), "max"]
    environment = {**os.environ, "PYTHON": str(python)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("check_arm: ")
    assert not (tmp_path / "work").exists()
