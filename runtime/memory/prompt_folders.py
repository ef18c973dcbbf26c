"""What a cache of prompts has on disk, for people: of which models, and which prompts."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from runtime.memory.block_file import Block, DamagedError, opened, read_head
from runtime.memory.block_store import FOLDER
from runtime.memory.disk_budget import ABOUT, Entry, entries
from runtime.memory.prefix_edges import KEY


class Prompt(NamedTuple):
    """Tokens of which blocks are kept, up to where nothing goes on. used: as `time.time` counts."""

    tokens: list[int]
    used: float


class Folder(NamedTuple):
    """What is kept of one model, loaded in one way. about: of what its fingerprint is, by name."""

    path: Path
    about: dict[str, str]
    files: list[Entry]

    @property
    def nbytes(self) -> int:
        """Bytes of all its files."""
        return sum(entry.nbytes for entry in self.files)

    @property
    def used(self) -> float:
        """When any of it was last of use."""
        return max((entry.used for entry in self.files), default=self.path.stat().st_mtime)

    def blocks(self) -> Iterator[tuple[Block, Entry]]:
        """What its files say that they hold; what is damaged is left out."""
        for entry in self.files:
            with contextlib.suppress(OSError, DamagedError):
                yield read_head(entry.path), entry

    def prompts(self) -> list[Prompt]:
        """Those of which the beginning is there, the last used first."""
        found = {block.key: (block, entry.used) for block, entry in self.blocks()}
        root = bytes.fromhex(self.path.name)
        inner = {block.parent for block, _ in found.values()}
        prompts = []
        for key, (last, used) in found.items():
            parts, at = [last.tokens], last.parent
            while at != root and at in found:
                parts.append(found[at][0].tokens)
                at = found[at][0].parent
            if key not in inner and at == root:
                prompts.append(Prompt([t for part in reversed(parts) for t in part], used))
        return sorted(prompts, key=lambda prompt: -prompt.used)

    def remove(self) -> int:
        """Bytes that are free now. OSError: not all of it can be removed."""
        freed = self.nbytes
        for entry in self.files:
            entry.path.unlink(missing_ok=True)
        (self.path / ABOUT).unlink(missing_ok=True)
        self.path.rmdir()
        return freed


def folders(cache_dir: Path) -> list[Folder]:
    """Of all models below a folder that prompts are kept in."""
    by_folder: dict[Path, list[Entry]] = {}
    with contextlib.suppress(OSError):
        for path in sorted((cache_dir / FOLDER).iterdir()):
            if path.is_dir() and len(path.name) == 2 * KEY:
                by_folder[path] = []
    for entry in entries(cache_dir / FOLDER):
        if entry.path.parent in by_folder:
            by_folder[entry.path.parent].append(entry)
    return [Folder(path, _about(path), files) for path, files in by_folder.items()]


def _about(path: Path) -> dict[str, str]:
    try:
        with opened(path / ABOUT) as file:
            found = json.loads(file.read())
    except (OSError, ValueError, RecursionError, DamagedError):
        found = None
    known = found.items() if isinstance(found, dict) else ()
    return {name: text for name, text in known if isinstance(text, str)}
