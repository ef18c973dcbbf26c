"""Kill writers of a block store in the middle of their work, and look at what they leave.

    python killed_writers.py FOLDER KILLS

Prints how many blocks were found whole, how many files were left unfinished, and how many blocks
were refused, which no kill may bring about.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np

from runtime.memory.block_file import PAGES, Block
from runtime.memory.block_store import BlockStore
from runtime.memory.prefix_edges import block_key

NBYTES, COUNT = 1 << 20, 24


def chain(whose: bytes, seed: int) -> list[tuple[Block, np.ndarray]]:
    found, key = [], whose
    for n in range(COUNT):
        tokens = tuple(range(seed, seed + 32))
        parent, key = key, block_key(key, tokens)
        payload = np.random.default_rng([seed, n]).integers(0, 256, NBYTES, np.uint8)
        found.append((Block(PAGES, whose, key, parent, 32 * n, tokens, NBYTES), payload))
    return found


def opened(folder: Path) -> BlockStore:
    return BlockStore(folder, b"w" * 16, {"model": "test"}, 1 << 40)


def write(folder: Path, blocks: list[tuple[Block, np.ndarray]]) -> None:
    store = opened(folder)
    for block, payload in blocks:
        store.write(block, payload)


def killed(folder: Path, seed: int) -> tuple[int, int, int]:
    """Whole blocks, unfinished files and refused blocks after one kill."""
    blocks = chain(b"w" * 16, seed)
    pid = os.fork()
    if pid == 0:
        write(folder, blocks)
        os._exit(0)
    time.sleep(random.Random(seed).uniform(0, 0.03))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    store, out = opened(folder), np.empty(NBYTES, np.uint8)
    names = [path.name for path in store.folder.iterdir() if path.suffix != ".json"]
    whole = refused = 0
    for block, payload in blocks:
        if store.has(block.key):
            out[:] = 0
            same = store.read(block.key, out) == block and bool((out == payload).all())
            whole, refused = whole + same, refused + (not same)
    for path in store.folder.iterdir():
        if path.suffix != ".json":
            path.unlink()
    return whole, sum(name.endswith(".part") for name in names), refused


def main(folder: str, kills: str) -> None:
    random.seed(7)
    found = [killed(Path(folder), seed) for seed in range(int(kills))]
    print(*(sum(each) for each in zip(*found, strict=True)))


if __name__ == "__main__":
    main(*sys.argv[1:])
