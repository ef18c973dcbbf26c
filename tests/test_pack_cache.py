"""Packed weights kept on disk: the same bits, shared, and never taken for what they are not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from small_models import Sizes, write_model

import runtime
from runtime.backends.cpu.run import pack_cache, pack_file, weights
from runtime.backends.cpu.run.pack_file import PackWriter, UnusableError, checksum, read_packs
from runtime.backends.plan.lock import is_held, locked
from runtime.cli import main
from runtime.errors import OptionError

IDS = [1, 2, 3, 4, 5]


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random mixture of experts, Q4_0 but for its norms and routers."""
    path = tmp_path_factory.mktemp("models") / "experts.gguf"
    return write_model(path, Sizes("qwen3moe", experts=4, inner=64), "Q4_0")


@pytest.fixture
def model(quantised: Path, tmp_path: Path) -> Path:
    """A copy of its own, in a folder of its own."""
    (tmp_path / "models").mkdir()
    return Path(shutil.copy(quantised, tmp_path / "models" / "model.gguf"))


def logits(model: Path, **options: object) -> np.ndarray:
    with runtime.load(model, threads=2, progress=False, **options) as loaded:  # type: ignore[arg-type]
        return loaded.eval(IDS)


def packs(model: Path) -> list[Path]:
    return sorted(model.parent.glob("*.packed*"))


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of all weights that are packed."""
    made: list[str] = []
    make = weights.WeightStore._make

    def counted(self, buffer, *given):
        made.append(buffer.key)
        return make(self, buffer, *given)

    monkeypatch.setattr(weights.WeightStore, "_make", counted)
    return made


@pytest.mark.parametrize("devices", ["cpu", "tensor(cpu:0,cpu:1)", "layers(cpu:0,cpu:1)"])
def test_the_same_bits_and_packed_once(model: Path, packed: list[str], devices: str):
    want = logits(model, devices=devices)
    for n in range(2):
        packed.clear()
        assert np.array_equal(want, logits(model, devices=devices, pack_cache="beside"))
        assert bool(packed) == (n == 0)
    count = 1 if devices == "cpu" else 2
    assert [path.suffix for path in packs(model)] == [".packed"] * count  # no locks, no parts


def test_another_split_has_files_of_its_own(model: Path, packed: list[str]):
    for devices in ("cpu", "tensor(3*cpu:0,cpu:1)", "tensor(cpu:0,cpu:1)"):
        logits(model, devices=devices, pack_cache="beside")
    packed.clear()
    for devices in ("tensor(3*cpu:0,cpu:1)", "cpu"):
        logits(model, devices=devices, pack_cache="beside")
    assert not packed and len(packs(model)) == 5


def rewritten(path: Path) -> None:
    other = bytearray(path.read_bytes())
    other[-1000:] = bytes(1000)
    path.write_bytes(other)


def touched(path: Path) -> None:
    os.utime(path, ns=(0, 1))


@pytest.mark.parametrize("change", [rewritten, touched])
def test_another_model_at_its_place(model: Path, packed, capfd, change: Callable[[Path], None]):
    logits(model, pack_cache="beside")
    (file,) = packs(model)
    before = file.stat().st_ino
    change(model)
    packed.clear()
    assert np.array_equal(logits(model, pack_cache="beside"), logits(model))
    assert packed and packs(model) == [file] and file.stat().st_ino != before
    lines = capfd.readouterr().err.splitlines()
    assert lines == [f"runtime: {file} is written anew: the model's file has changed"]


def half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def no_file_of_ours(path: Path) -> None:
    path.write_bytes(b"GGUF" * 4096)


def zeros_at_the_end(path: Path) -> None:
    """What a system that went down can leave: the size is right, the data never came."""
    with path.open("r+b") as file:
        file.seek(pack_file.PAGE)
        file.write(bytes(path.stat().st_size - 2 * pack_file.PAGE))


def index_edited(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"model": ', b'"mOdel": '))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (half, "it is cut short"),
        (empty, "it is no such file, or of another version"),
        (no_file_of_ours, "it is no such file, or of another version"),
        (zeros_at_the_end, "it is damaged"),
        (index_edited, "it is damaged"),
    ],
)
def test_damaged_files_are_written_anew(model: Path, packed, capfd, damage, reason: str):
    want = logits(model, pack_cache="beside")
    (file,) = packs(model)
    damage(file)
    for n in range(2):
        packed.clear()
        assert np.array_equal(want, logits(model, pack_cache="beside"))
        assert bool(packed) == (n == 0)
    assert capfd.readouterr().err == f"runtime: {file} is written anew: {reason}\n"


def test_other_code_packs_anew(model: Path, packed, capfd, monkeypatch: pytest.MonkeyPatch):
    logits(model, pack_cache="beside")
    (file,) = packs(model)
    monkeypatch.setattr(weights.Library, "sources", lambda self, kernels, *modules: "another")
    packed.clear()
    logits(model, pack_cache="beside")
    assert packed and packs(model) == [file]
    assert capfd.readouterr().err.endswith("is written anew: the program has changed\n")


def test_a_folder_that_cannot_be_written(model: Path, capfd, monkeypatch: pytest.MonkeyPatch):
    want = logits(model)
    monkeypatch.setattr(pack_cache.PackCache, "of", in_a_file(model))
    assert np.array_equal(want, logits(model, pack_cache=True))
    (line,) = capfd.readouterr().err.splitlines()
    assert "cannot be kept" in line and line.endswith("packed in memory, in each process")


def in_a_file(model: Path) -> Callable[..., pack_cache.Packs]:
    """`PackCache.of` whose folder is the model, which is none."""

    def of(self, target, layout, sizes):
        return pack_cache.Packs(self, model / "x.packed", self.about, sizes)

    return of


@pytest.mark.parametrize("at", [0, 3, -1])
def test_a_disk_that_becomes_full(model: Path, capfd, monkeypatch: pytest.MonkeyPatch, at: int):
    """When the first weight comes, in the middle, or at the end: the model runs all the same."""
    want, seen = logits(model), [0]

    def full(self, *given):
        seen[0] += 1
        if at < 0 or seen[0] > at:
            raise OSError(28, "No space left on device")
        add(self, *given)

    name = "finish" if at < 0 else "add"
    add = getattr(PackWriter, name)
    monkeypatch.setattr(PackWriter, name, full)
    told: list[tuple[int, int, str]] = []
    loaded = runtime.load(
        model, threads=2, progress=lambda *news: told.append(news), pack_cache="beside"
    )
    assert np.array_equal(want, loaded.eval(IDS))
    loaded.close()
    assert not packs(model)
    assert capfd.readouterr().err.count("No space left on device") == 1
    done, total = [n for n, _, what in told if what == "loading weights"], told[-1][1]
    assert done[-1] == total and max(done) <= total


def test_no_room_is_seen_before(model: Path, capfd, packed, monkeypatch: pytest.MonkeyPatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(pack_cache.shutil, "disk_usage", lambda path: usage)
    logits(model, pack_cache="beside")
    assert "0.0 MB free" in capfd.readouterr().err and not packs(model)


def test_an_interrupt_leaves_nothing(model: Path, monkeypatch: pytest.MonkeyPatch):
    add, seen = PackWriter.add, []

    def interrupted(self, *given):
        seen.append(list(model.parent.glob("*.part")))
        if len(seen) == 3:
            raise KeyboardInterrupt
        add(self, *given)

    monkeypatch.setattr(PackWriter, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        logits(model, pack_cache="beside")
    assert len(seen[-1]) == 1 and not packs(model)


def test_what_a_killed_writer_left_is_removed(model: Path):
    logits(model, pack_cache="beside")
    (file,) = packs(model)
    file.rename(f"{file}.0123456789abcdef.part")
    other = file.with_name("another.packed.0123456789abcdef.part")
    other.write_bytes(b"x")
    logits(model, pack_cache="beside")
    assert packs(model) == sorted([other, file])


TWO = """
import hashlib, json, os, sys, time
import runtime
from runtime.backends.cpu.run import weights
made, make = [], weights.WeightStore._make
def counted(self, *given):
    made.append(1)
    time.sleep(0.02)
    return make(self, *given)
weights.WeightStore._make = counted
model = runtime.load(sys.argv[1], threads=1, progress=False, pack_cache="beside")
digest = hashlib.sha256(model.eval([1, 2, 3]).tobytes()).hexdigest()
fields = {}
if os.path.exists("/proc/self/smaps"):
    inside = False
    for line in open("/proc/self/smaps"):
        if "-" in line.split()[0]:
            inside = line.rstrip().endswith(".packed")
        elif inside:
            name, value = line.split(":")
            value = value.split()[0]
            fields[name] = fields.get(name, 0) + (int(value) if value.isdigit() else 0)
print(json.dumps([len(made), digest, fields]), flush=True)
sys.stdin.readline()
"""


def test_two_processes_at_once_pack_once_and_share(model: Path):
    """Of two that begin together one writes; both map the same pages, neither has a copy."""
    both = [
        subprocess.Popen(
            [sys.executable, "-c", TWO, str(model)], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    try:
        found = [json.loads(p.stdout.readline()) for p in both]  # type: ignore[union-attr]
        third = subprocess.run(
            [sys.executable, "-c", TWO, str(model)], input="\n", capture_output=True, text=True
        )
        found.append(json.loads(third.stdout))
    finally:
        for process in both:
            process.communicate("\n")
    assert sorted(bool(made) for made, *_ in found) == [False, False, True]
    assert len({digest for _, digest, _ in found}) == 1
    if sys.platform == "linux":
        for _, _, fields in found:
            assert fields["Rss"] and not fields["Anonymous"]
        assert found[-1][2]["Pss"] < found[-1][2]["Rss"] / 2  # all three have it


def test_arrays_of_all_sizes(tmp_path: Path, rng: np.random.Generator):
    """Empty, within a page, across what is written at once; on pages of their own."""
    sizes = [0, 1, 63, 4096, 4097, 100_000, (8 << 20) - 4096, (8 << 20) + 5, 3]
    arrays = {str(n): rng.integers(0, 256, n, np.uint8) for n in sizes}
    path = tmp_path / "x.packed"
    writer = PackWriter(path, {"a": 1})
    for name, array in arrays.items():
        writer.add(name, array)
    writer.finish()
    writer.close()
    found = read_packs(path, {"a": 1}, {name: a.nbytes for name, a in arrays.items()})
    for name, array in arrays.items():
        assert np.array_equal(found[name], array)
        assert array.nbytes == 0 or found[name].ctypes.data % pack_file.PAGE == 0
    with pytest.raises(ValueError, match="read-only"):
        found["63"][0] = 1
    with pytest.raises(UnusableError, match="a has changed"):
        read_packs(path, {"a": 2}, {})
    with pytest.raises(UnusableError, match="other weights"):
        read_packs(path, {"a": 1}, {"1": 1})


def test_a_checksum_sees_both_ends_and_between(rng: np.random.Generator):
    raw = rng.integers(1, 256, 40 << 20, np.uint8)
    before = checksum(raw)
    for place in (0, 16 << 20, 32 << 20, len(raw) - 1):
        kept, raw[place] = raw[place], 0
        assert checksum(raw) != before
        raw[place] = kept


@pytest.mark.parametrize("wrong", ["nowhere", 3, "/tmp"])
def test_a_wrong_option(small_model: Path, wrong):
    with pytest.raises(OptionError, match=r"pack_cache=.*'folder' or 'beside'"):
        runtime.load(small_model, pack_cache=wrong)
    with pytest.raises(OptionError, match="devices='null' has none"):
        runtime.load(small_model, devices="null", pack_cache=True)


def test_the_command_lists_and_removes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    logits(model, pack_cache="beside")
    monkeypatch.setattr(pack_cache, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr("runtime.backends.environment.cache_dir", lambda: tmp_path)
    logits(model, pack_cache=True)
    (tmp_path / "packed" / "x.packed.1234.part").write_bytes(b"12")

    def run(*words: str) -> str:
        done = CliRunner().invoke(main, ["cache", *words])
        assert done.exit_code == 0
        return done.output

    assert str(model) in run() and "unfinished" in run()
    assert {f["model"] for f in json.loads(run(str(model), "--json"))} == {str(model)}
    assert "removed 2 files" in run(str(model), "--remove")
    assert not packs(model) and "removed 1 file, 2 B" in run("--remove")
    assert "no packed weights" in run()


def left_by_a_writer(model: Path, folder: Path) -> list[Path]:
    """What one leaves that is killed."""
    folder.mkdir(exist_ok=True)
    finished = folder / f"{model.stem}-{'0' * 16}.packed"
    left = [Path(f"{finished}{ending}") for ending in (".lock", ".0123456789abcdef.part")]
    for path in left:
        path.write_bytes(b"12")
    return left


def cache(*words: object) -> tuple[int, str]:
    done = CliRunner().invoke(main, ["cache", *map(str, words)])
    return done.exit_code, done.output


def test_what_a_killed_writer_left_is_listed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """In the cache folder and beside the model; of another model's files none."""
    monkeypatch.setenv("RUNTIME_CACHE_DIR", str(tmp_path))
    left = [
        path for folder in (model.parent, tmp_path / "packed")
        for path in left_by_a_writer(model, folder)
    ]  # fmt: skip
    others = left_by_a_writer(model.with_name("another.gguf"), tmp_path / "packed")
    code, said = cache(model, "--json")
    found = json.loads(said)
    assert code == 0 and {f["file"] for f in found} == {*map(str, left)}
    assert {f["model"] for f in found} == {"unfinished"}
    assert all(path.exists() for path in left)  # to look changes nothing
    code, said = cache(model, "--remove")
    assert code == 0 and "removed 4 files, 8 B" in said
    assert not any(path.exists() for path in left) and all(path.exists() for path in others)


@pytest.mark.parametrize("whose", [True, False])
def test_what_is_being_written_stays(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whose: bool
):
    monkeypatch.setenv("RUNTIME_CACHE_DIR", str(tmp_path))
    lock, part = left_by_a_writer(model, tmp_path / "packed")
    words = [model] if whose else []
    with locked(lock, lambda: None):
        code, said = cache(*words, "--remove")
        assert code == 1 and "being written" in said and "removed 0 files" in said
        assert lock.exists() and part.exists() and is_held(lock)
    code, said = cache(*words, "--remove")
    assert code == 0 and not part.exists() and not lock.exists()


def test_what_cannot_be_removed(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RUNTIME_CACHE_DIR", str(tmp_path))
    left_by_a_writer(model, tmp_path / "packed")

    def read_only(self: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "unlink", read_only)
    code, said = cache("--remove")
    assert code == 1 and said.count("cannot be removed: Permission denied") == 2


def test_what_nobody_uses_goes(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pack_cache, "cache_dir", lambda: tmp_path)
    folder = tmp_path / "packed"
    folder.mkdir()
    old, new, other = (folder / name for name in ("a.packed", "b.packed", "c.txt"))
    for path in (old, new, other):
        path.write_bytes(b"x")
    for path in (old, other):
        os.utime(path, (0, 0))
    logits(model, pack_cache=True)
    assert not old.exists() and new.exists() and other.exists()


@pytest.mark.parametrize(
    "words", [["cache"], ["cache", "m.gguf"], ["run", "-p", "a", "--pack-cache"]]
)
def test_a_cache_folder_that_is_a_file(words: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RUNTIME_CACHE_DIR", __file__)
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 2 and "a folder, and this is a file" in done.output
