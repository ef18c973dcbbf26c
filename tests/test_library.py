"""The kernel cache: kept between processes, healed when damaged, done without when it must be."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from runtime.backends.cpu import isa
from runtime.backends.cpu.kernel import Kernel
from runtime.backends.cpu.library import Library
from runtime.ops.errors import BackendError

KERNEL = Kernel.of("pack_weights", format="Q8_0")


def _library(folder: Path | None) -> Library:
    return Library(isa.selected(), folder)


def _entry(library: Library) -> Path:
    assert library.folder is not None
    return next(library.folder.glob("*.o"))


def test_kernel_round_trips_through_json():
    kernel = Kernel.of("matmul", format="Q4_0", columns=8, activations="int8")
    assert Kernel.parse(kernel.dump()) == kernel
    assert str(kernel) == "matmul-activations=int8-columns=8-format=Q4_0"


def test_compiled_once_then_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert _library(tmp_path).address(KERNEL)
    monkeypatch.setattr(
        "runtime.backends.cpu.compilers.compile_all", lambda *a: pytest.fail("compiled again")
    )
    second = _library(tmp_path)
    assert second.missing([KERNEL]) == [] and second.address(KERNEL)


@pytest.mark.parametrize("damage", [b"", b"garbage", None])
def test_damaged_entry_is_compiled_again(tmp_path: Path, damage: bytes | None):
    library = _library(tmp_path)
    library.address(KERNEL)
    entry = _entry(library)
    good = entry.read_bytes()
    entry.write_bytes(good[: len(good) // 2] if damage is None else damage)
    assert _library(tmp_path).address(KERNEL)
    assert entry.read_bytes() == good


def test_unwritable_cache_is_done_without(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    library = _library(blocked)
    assert library.address(KERNEL)
    message = capsys.readouterr().err
    assert "cannot write the kernel cache" in message and message.count("\n") == 1


def test_full_disk_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert _library(tmp_path).address(KERNEL)
    assert "No space left on device" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.o"))


def test_failing_compile_names_the_kernel(tmp_path: Path):
    with pytest.raises(BackendError, match=r"compiling CPU kernel pack_weights-format=Q9_9 failed"):
        _library(tmp_path).address(Kernel.of("pack_weights", format="Q9_9"))


def test_a_warm_process_never_imports_numba(small_model: Path):
    program = (
        "import sys, runtime\n"
        f"model = runtime.load({str(small_model)!r})\n"
        "model.eval([1, 2, 3]); model.close()\n"
        "print([m for m in ('numba', 'gguf', 'rich', 'jinja2') if m in sys.modules])"
    )
    for attempt in range(2):
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        if attempt:
            assert done.stdout.strip() == "[]"
