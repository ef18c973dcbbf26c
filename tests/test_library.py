"""The kernel cache: kept between processes, healed when damaged, done without when it must be."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from runtime.backends.cpu.compile import isa
from runtime.backends.cpu.compile.library import Library
from runtime.backends.plan import pool
from runtime.backends.plan.entries import Entries
from runtime.backends.plan.kernel import Kernel
from runtime.ops.errors import BackendError

KERNEL = Kernel.of("pack_weights", format="Q8_0")
OTHER = Kernel.of("pack_weights", format="Q4_0")
POOL = pool.Pool  # before any fixture


@pytest.fixture(autouse=True, scope="module")
def processes_of_its_own() -> Iterator[None]:
    """Not those that tests keep (kept_processes.py)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "Pool", POOL)
        yield


def _library(folder: Path | None) -> Library:
    return Library(isa.selected(), folder)


def _entry(library: Library, kernel: Kernel = KERNEL) -> Path:
    return library.entries.path(library.name(kernel))


def _no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "runtime.backends.cpu.compile.compilers.compile_all",
        lambda *a: pytest.fail("compiled again"),
    )


def test_kernel_round_trips_through_json():
    kernel = Kernel.of("matmul", format="Q4_0", columns=8, coding="int8")
    assert Kernel.parse(kernel.dump()) == kernel
    assert str(kernel) == "matmul-coding=int8-columns=8-format=Q4_0"


def test_compiled_once_then_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert _library(tmp_path).address(KERNEL)
    _no_compiler(monkeypatch)
    second = _library(tmp_path)
    assert second.missing([KERNEL]) == [] and second.address(KERNEL)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[Kernel, bytes]:
    """Entries as they are when they are whole."""
    library = _library(tmp_path_factory.mktemp("kernels"))
    library.prepare([KERNEL, OTHER])
    return {kernel: _entry(library, kernel).read_bytes() for kernel in (KERNEL, OTHER)}


@pytest.fixture
def library(tmp_path: Path, compiled: dict[Kernel, bytes]) -> Library:
    """A new library, with a cache that has both kernels."""
    made = _library(tmp_path)
    for kernel, content in compiled.items():
        _entry(made, kernel).parent.mkdir(exist_ok=True)
        _entry(made, kernel).write_bytes(content)
    return made


def _flipped(good: bytes, at: int) -> bytes:
    return good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :]


def _symbol_changed(good: bytes) -> bytes:
    lines = good.split(b"\n", 3)
    return b"\n".join([*lines[:2], b"other", lines[3]])


@pytest.mark.parametrize(
    "damage",
    [
        lambda good: b"", lambda good: b"garbage", lambda good: good[: len(good) // 2],
        lambda good: good + b"\0", _symbol_changed,
    ],
    ids=["empty", "garbage", "half", "longer", "symbol"],
)  # fmt: skip
def test_damaged_entry_is_compiled_again(
    library: Library, compiled: dict[Kernel, bytes], damage: Callable[[bytes], bytes]
):
    entry = _entry(library)
    entry.write_bytes(damage(compiled[KERNEL]))
    assert library.missing([KERNEL]) == [KERNEL], "and not only when it is used"
    assert library.address(KERNEL)
    assert entry.read_bytes() == compiled[KERNEL]


def test_no_flipped_bit_goes_unseen(library: Library, compiled: dict[Kernel, bytes]):
    entry, good = _entry(library), compiled[KERNEL]
    entries = Entries(library.entries.folder)
    assert entries.read(library.name(KERNEL))
    for at in [*range(300), *range(300, len(good), max(1, len(good) // 300))]:
        entry.write_bytes(_flipped(good, at))
        assert entries.read(library.name(KERNEL)) is None, f"byte {at}"


def test_the_entry_of_another_kernel_is_not_loaded(library: Library, compiled: dict[Kernel, bytes]):
    _entry(library).write_bytes(compiled[OTHER])
    assert library.address(KERNEL)
    assert _entry(library).read_bytes() == compiled[KERNEL]


def test_what_is_compiled_of_a_file_edited_meanwhile_is_not_kept(
    library: Library, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """The process that compiles reads the file later than the one that names the entry."""
    from runtime.backends.plan import sources

    real, edited = sources.source_path, tmp_path / "pack.py"
    library.name(KERNEL)
    _entry(library).unlink()
    edited.write_bytes(real("runtime.backends.cpu.tile.pack").read_bytes() + b"# edited\n")
    changed = {"runtime.backends.cpu.tile.pack": edited}
    monkeypatch.setattr(sources, "source_path", lambda module: changed.get(module) or real(module))
    assert library.address(KERNEL) and not _entry(library).exists()


def test_writers_of_one_entry_never_mix(tmp_path: Path):
    """Threads, as two models loaded side by side are, and processes."""
    contents = [bytes([65 + n]) * (200_000 + n) for n in range(6)]
    program = (
        "import sys; from pathlib import Path; from runtime.backends.plan.entries import Entries\n"
        "for _ in range(60): Entries(Path(sys.argv[1])).write('k/x.o', 'h', b'Z' * 200_100)"
    )
    other = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stderr=subprocess.PIPE)

    def write(content: bytes) -> None:
        for _ in range(60):
            Entries(tmp_path).write("k/x.o", "h", content)

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads) or other.poll() is None:
        found = Entries(tmp_path).read("k/x.o")
        assert found is None or found[1] in (*contents, b"Z" * 200_100)
    assert other.communicate()[1] == b""
    assert Entries(tmp_path).read("k/x.o"), "the last one is whole"
    assert [path.name for path in (tmp_path / "k").iterdir()] == ["x.o"]


def test_unwritable_cache_is_done_without(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    library = _library(blocked)
    library.prepare([KERNEL, OTHER])
    message = capsys.readouterr().err
    assert "cannot write the kernel cache" in message and message.count("\n") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="no limit of file sizes here")
def test_full_disk_is_done_without(tmp_path: Path, compiled: dict[Kernel, bytes]):
    """A write that ends in the middle: one line, everything works, nothing half is left."""
    program = (
        "import resource, sys; from pathlib import Path\n"
        "from runtime.backends.cpu.compile import isa\n"
        "from runtime.backends.plan.kernel import Kernel\n"
        "from runtime.backends.cpu.compile.library import Library\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))\n"
        f"kernels = [Kernel.parse(k) for k in ({KERNEL.dump()!r}, {OTHER.dump()!r})]\n"
        "library = Library(isa.selected(), Path(sys.argv[1])); library.prepare(kernels)\n"
        "print(all(map(library.address, kernels)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout == "True\n", done.stderr
    assert "cannot write the kernel cache" in done.stderr and done.stderr.count("\n") == 1
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_long_unused_entries_go_when_a_new_one_comes(
    library: Library, compiled: dict[Kernel, bytes]
):
    """Of every version, the layout before this one included; never what is not ours."""
    cache = library.entries.path("")
    old, older = cache / "kernels-avx2-0123456789abcdef", cache / "kernels-generic"
    names = {
        old / "gone.o": compiled[KERNEL], older / "gone.o": compiled[KERNEL],
        older / "gone.o.12345.tmp": b"half", older / "foreign.o": b"\x7fELF", cache / "notes": b"x",
        older / "recent.o": compiled[OTHER],
    }  # fmt: skip
    for path, content in names.items():
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        if path.name != "recent.o":
            os.utime(path, (time.time() - 40 * 86400,) * 2)
    Entries(cache).write("kernels-generic/new.o", "", b"")
    assert not old.exists()
    assert {p.name for p in older.iterdir()} == {"foreign.o", "recent.o", "new.o"}
    assert (cache / "notes").exists()


def test_what_is_used_stays(library: Library):
    """Whether or not the system notes when a file is read."""
    entry = _entry(library)
    os.utime(entry, (time.time() - 40 * 86400,) * 2)
    assert library.address(KERNEL)
    Entries(library.entries.folder).write("kernels-generic/new.o", "", b"")
    assert entry.exists() and time.time() - entry.stat().st_mtime < 3600


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
