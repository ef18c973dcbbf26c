"""Blocks on disk: what was written or nothing, for whoever asks, within a budget."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from runtime.memory import block_file, block_store, disk_budget, write_behind
from runtime.memory.block_file import END, HEAD, PAGES, Block, DamagedError, parsed
from runtime.memory.block_store import BlockStore, Tail
from runtime.memory.prefix_edges import block_key
from runtime.memory.write_behind import WriteBehind

WHOSE, NBYTES = b"f" * 16, 5000
KILLS = int(os.environ.get("CACHE_KILLS", "20"))


def opened(folder: Path, whose: bytes = WHOSE, budget: int = 1 << 30) -> BlockStore:
    return BlockStore(folder, whose, {"model": "a model"}, budget)


def chain(count: int, seed: int = 0, whose: bytes = WHOSE) -> list[tuple[Block, np.ndarray]]:
    """Pages of one prompt, in order, and an end behind them."""
    found, key, rng = [], whose, np.random.default_rng(seed)
    for n in range(count + 1):
        tokens = tuple(rng.integers(0, 1000, 32 if n < count else 7).tolist())
        parent, key = key, block_key(key, tokens)
        kind = PAGES if n < count else END
        payload = rng.integers(0, 256, NBYTES, np.uint8)
        found.append((Block(kind, whose, key, parent, 32 * n, tokens, NBYTES), payload))
    return found


def kept(store: BlockStore, blocks: list[tuple[Block, np.ndarray]]) -> None:
    assert all(store.write(*each) for each in blocks)


def found(store: BlockStore, block: Block) -> np.ndarray | None:
    out = np.zeros(block.nbytes, np.uint8)
    if block.kind == PAGES:
        return out if store.read(block.key, out) else None
    return out if store.read_end(block.parent, Tail(len(block.tokens), block.key), out) else None


def file_of(store: BlockStore, block: Block) -> Path:
    return next(p for p in store.folder.iterdir() if p.stem.endswith(block.key.hex()))


def test_what_was_written_is_read_by_the_next_process(tmp_path: Path):
    blocks = chain(3)
    kept(opened(tmp_path), blocks)
    store = opened(tmp_path)
    for block, payload in blocks:
        np.testing.assert_array_equal(found(store, block), payload)
    end = blocks[-1][0]
    assert all(store.has(block.key) for block, _ in blocks[:-1])
    assert store.ends(end.parent) == [Tail(7, end.key)] and not store.ends(end.key)
    assert store.has_end(end.parent, Tail(7, end.key))
    assert not store.has(block_key(WHOSE, [1])) and not found(store, chain(1, 5)[0][0])


def test_only_the_user_can_read_it(tmp_path: Path):
    store = opened(tmp_path)
    kept(store, chain(1))
    if sys.platform != "win32":
        assert {oct(p.stat().st_mode & 0o777) for p in store.folder.iterdir()} == {"0o600"}
        assert {oct(p.stat().st_mode & 0o777) for p in (store.folder, store.root)} == {"0o700"}


def flipped(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 0x10
    path.write_bytes(content)


@pytest.mark.parametrize("at", [0, 7, 8, 11, 16, 40, 60, 70, 90, 200, HEAD - 1, HEAD, -1])
def test_a_damaged_block_is_dropped_and_said_once(at: int, tmp_path: Path, capfd):
    blocks = chain(2)
    kept(opened(tmp_path), blocks)
    store = opened(tmp_path)
    for block, _ in blocks:
        flipped(file_of(store, block), at)
        assert found(store, block) is None and not store.has(block.key)
    assert [p.name for p in store.folder.iterdir()] == ["about.json"]
    assert len(capfd.readouterr().err.splitlines()) == 1
    kept(store, blocks)
    assert all(np.array_equal(found(store, b), payload) for b, payload in blocks)  # type: ignore[arg-type]


@pytest.mark.parametrize("nbytes", [0, 5, HEAD - 1, HEAD, HEAD + 1, HEAD + NBYTES - 1])
def test_a_block_cut_short_is_dropped(nbytes: int, tmp_path: Path):
    ((block, _), _) = blocks = chain(1)
    kept(store := opened(tmp_path), blocks)
    path = file_of(store, block)
    path.write_bytes(path.read_bytes()[:nbytes])
    assert found(store, block) is None and not path.exists()


def test_a_block_of_another_name_model_or_size_is_not_used(tmp_path: Path):
    (a, _), (b, _), _ = blocks = chain(2)
    kept(store := opened(tmp_path), blocks)
    shutil.copy(file_of(store, a), file_of(store, b))  # another key
    assert found(store, b) is None
    kept(other := opened(tmp_path, b"g" * 16), [(a._replace(fingerprint=b"g" * 16), blocks[0][1])])
    shutil.copy(file_of(other, a), file_of(store, a))  # another model
    assert found(store, a) is None
    kept(store, blocks)
    assert found(store, a._replace(nbytes=NBYTES - 8)) is None


def test_a_page_behind_which_something_stands_is_a_page(tmp_path: Path):
    ((block, payload), _) = blocks = chain(1)
    kept(store := opened(tmp_path), blocks)
    with file_of(store, block).open("ab") as file:
        file.write(b"more")
    np.testing.assert_array_equal(found(store, block), payload)


def test_no_head_of_any_bytes_is_taken_for_one():
    rng = np.random.default_rng(1)
    for _ in range(300):
        with pytest.raises(DamagedError):
            parsed(rng.integers(0, 256, HEAD, np.uint8).tobytes())
    (block, payload), _ = chain(1)
    assert parsed(block.head(payload)) == block


def test_a_folder_of_another_user_is_ignored(tmp_path: Path, monkeypatch, capfd):
    (tmp_path / "prompts").mkdir()
    early = opened(tmp_path / "new")
    monkeypatch.setattr(block_store.os, "geteuid", lambda: 12345, raising=False)
    assert early.usable and not early.write(*chain(1)[0]) and not early.usable
    assert "another user's" in capfd.readouterr().err
    store = opened(tmp_path)
    (block, payload), _ = chain(1)
    assert not store.usable and not store.write(block, payload) and not store.has(block.key)
    assert found(store, block) is None
    assert "another user's" in capfd.readouterr().err


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_a_pipe_in_place_of_a_block_is_dropped(tmp_path: Path, capfd):
    store, blocks = opened(tmp_path), chain(2)
    kept(store, blocks)
    path = file_of(store, blocks[0][0])
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DamagedError, match="no regular file"):
        block_file.read_head(path)
    assert found(store, blocks[0][0]) is None and not path.exists()
    assert "no regular file" in capfd.readouterr().err
    kept(store, blocks)


def test_nothing_is_made_before_the_first_block(tmp_path: Path):
    store = opened(tmp_path / "new")
    assert store.usable and not store.has(chain(1)[0][0].key) and not [*tmp_path.iterdir()]
    kept(store, chain(1))
    assert (store.folder / "about.json").exists()


def test_a_file_in_place_of_the_folder_costs_a_line(tmp_path: Path, capfd):
    (tmp_path / "prompts").write_text("mine")
    store = opened(tmp_path)
    assert not store.usable and not store.write(*chain(1)[0])
    assert "cannot be kept" in capfd.readouterr().err
    assert (tmp_path / "prompts").read_text() == "mine"


def test_a_full_disk_costs_a_line_and_is_tried_again(tmp_path: Path, monkeypatch, capfd):
    store, blocks, write = opened(tmp_path), chain(4), block_file.write_block

    def full(file: int, block: Block, payload: np.ndarray) -> None:
        os.write(file, bytes(100))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(block_store, "write_block", full)
    for each in blocks:
        store.write(*each)
    assert [p.name for p in store.folder.iterdir()] == ["about.json"]
    (line,) = capfd.readouterr().err.splitlines()
    assert "No space left" in line and "memory alone" in line
    monkeypatch.setattr(block_store, "write_block", write)
    assert not store.write(*blocks[0])  # not before a while has gone
    store._rest = 0.0
    kept(store, blocks)


def test_the_budget_is_kept_and_what_was_used_last_stays(tmp_path: Path):
    each = HEAD + NBYTES
    store = opened(tmp_path, budget=each * 16)
    old, used, new = chain(5, 1), chain(5, 2), chain(8, 3)
    for blocks in (old, used):
        kept(store, blocks)
    now = time.time_ns()
    for age, blocks in ((200, old), (300, used)):  # seconds since they were written
        for block, _ in blocks:
            os.utime(file_of(store, block), ns=(now, now - age * 10**9))
    store.used([block.key for block, _ in used[:3]])
    for block in new:
        kept(store, [block])
        assert sum(e.nbytes for e in disk_budget.entries(store.root)) <= store.budget
    store = opened(tmp_path)
    here = [[found(store, block) is not None for block, _ in each] for each in (old, used, new)]
    assert all(here[2]) and here[1][:3] == [True] * 3 and not all(here[0])
    for chain_ in here:  # never a block without those before it
        assert chain_ == sorted(chain_, reverse=True)


def test_what_does_not_fit_at_all_is_not_written(tmp_path: Path):
    store = opened(tmp_path, budget=NBYTES // 2)
    assert not store.write(*chain(1)[0])


def test_by_default_it_takes_no_more_than_a_tenth_of_what_is_free(tmp_path: Path, monkeypatch):
    free = 7 << 30
    usage = shutil.disk_usage(tmp_path)._replace(free=free)
    monkeypatch.setattr(disk_budget.shutil, "disk_usage", lambda _: usage)
    assert BlockStore(tmp_path, WHOSE, {}).budget == free // 10
    usage = usage._replace(free=1 << 50)
    assert BlockStore(tmp_path, WHOSE, {}).budget == disk_budget.USUAL
    assert BlockStore(tmp_path, WHOSE, {}, 123456).budget == 123456


def test_what_a_killed_writer_left_goes_after_a_while(tmp_path: Path):
    store = opened(tmp_path, budget=10 * NBYTES)
    store.folder.mkdir(parents=True)
    for age, name in ((3600, "old"), (0, "new")):
        path = store.folder / f"{name}.page.1.part"
        path.write_bytes(bytes(2 * NBYTES))
        os.utime(path, (time.time() - age,) * 2)
    kept(store, chain(1))
    assert [p.name for p in store.folder.glob("*.part")] == ["new.page.1.part"]


def test_jobs_are_done_in_order_and_the_oldest_of_too_many_are_not():
    behind, done, go = WriteBehind(), list[int](), threading.Event()
    behind.put(lambda: [go.wait(20)] and done.append(-1))
    assert not behind.drain(0.01)
    for n in range(write_behind.MOST + 5):
        behind.put(lambda n=n: done.append(n) if n != 40 else 1 / 0)  # type: ignore[misc]
    go.set()
    assert behind.drain(20)
    assert done in (
        [-1, *(n for n in range(5, 69) if n != 40)],
        [*(n for n in range(5, 69) if n != 40)],
    )


@pytest.mark.skipif(sys.platform == "win32", reason="no such signal")
def test_a_writer_that_is_killed_leaves_no_damaged_block(tmp_path: Path):
    script = Path(__file__).with_name("killed_writers.py")
    done = subprocess.run(
        [sys.executable, script, tmp_path, str(KILLS)],
        capture_output=True, text=True, env=_environment(), timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    whole, unfinished, refused = map(int, done.stdout.split())
    print(f"{KILLS} kills: {whole} whole, {unfinished} unfinished, {refused} refused")
    assert refused == 0 and whole > 0


def _environment() -> dict[str, str]:
    root = str(Path(__file__).resolve().parent.parent)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}


_BESIDE = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import test_block_store as t
store, mine = t.opened(Path(sys.argv[1]), budget=60 * t.NBYTES), int(sys.argv[3])
for round in range(30):
    for seed in (0, mine):  # one prompt of both, one of its own
        for block, payload in t.chain(12, seed):
            got = t.found(store, block)
            assert got is None or (got == payload).all()
            store.write(block, payload)
    store.refresh()
print("good")
"""


def test_two_processes_at_once(tmp_path: Path):
    here = str(Path(__file__).parent)
    beside = [
        subprocess.Popen(
            [sys.executable, "-c", _BESIDE, str(tmp_path), here, str(n)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=_environment(),
        )
        for n in (1, 2)
    ]  # fmt: skip
    for process in beside:
        out, err = process.communicate(timeout=300)
        assert out == "good\n" and not err
