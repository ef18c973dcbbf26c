"""DiskTier: the cache of prompts below memory, which outlives the process.

What the cache in memory keeps is written behind, some pages at a time, between the steps of others.
What a prompt does not find in memory is read into pages and slots of its own, which are given to
the cache in memory when all of it is there: so everything else knows memory alone.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from runtime.engine.identity import fingerprint
from runtime.engine.prompts import Known
from runtime.engine.sequence import Record
from runtime.errors import MemoryLimitError, OptionError
from runtime.memory.block_file import END, PAGES, Block
from runtime.memory.block_store import BlockStore, Tail
from runtime.memory.pages import Pages
from runtime.memory.prefix_edges import alike, block_key, block_keys
from runtime.memory.slots import SPACING, Checkpoint, Recurrent
from runtime.memory.write_behind import WriteBehind
from runtime.ops import PAGE
from runtime.units import counted_as

if TYPE_CHECKING:
    from runtime.engine.engine import Engine

_LOT = 4  # pages that are copied while no step can begin
_PAUSE = 0.2  # seconds between two lots: steps go first
_WORTH = 16  # tokens that reading from disk has to save
_SHOWN = 8  # tokens of each side of a difference
_TRIES = 8  # times that a prompt is looked up, where blocks turn out to be damaged


class Found(NamedTuple):
    """What the disk has of a prompt: up to `place`, of which `tail` ends there, if one has to."""

    place: int
    parent: bytes
    tail: Tail | None


class DiskTier:
    """Reads and writes the blocks of one model."""

    def __init__(self, engine: Engine, cache_dir: Path, budget: int | None) -> None:
        """budget: see BlockStore. An engine is not held: who calls gives it."""
        if not engine.backend.bits:
            raise OptionError(
                f"cache_dir keeps states of devices, and those of {engine.backend.name} are wider "
                "than files: leave it out"
            )
        known = engine.identity
        opened = [list(each[1:]) for each in engine.file.opened]  # bytes and time of change
        self.key = fingerprint({**known, "files": opened})
        about = {**known, "model": str(engine.file.path.resolve())}
        self.store = BlockStore(cache_dir, self.key, about, budget)
        self._writer, self._hurry = WriteBehind(), threading.Event()

    def keep(self, engine: Engine, record: Record, ends: bool = False) -> None:
        """Have written what the cache in memory keeps of a record, and the disk does not have.

        ends: nothing more will come of it. The record's keys are known up to its end.
        """
        if self.store.usable and not (record.closed or record.given):
            tokens, keys = record.tokens[: record.length], record.keys[: record.length // PAGE]
            self._writer.put(lambda: self._write(engine, tokens, keys, ends))

    def fetch(self, engine: Engine, tokens: Sequence[int], least: int) -> int:
        """Bring into memory what the disk has of a start of `tokens`, all but the last at most.

        How many tokens it then has, 0 where that is not more than `least` and not more than memory
        had. The caller holds the engine's lock.
        """
        if not self.store.usable:
            return 0
        self.store.refresh()
        keys = block_keys([], self.key, tokens, len(tokens) - 1)
        recurrent = bool(engine.memory.slots)
        for _ in range(_TRIES):
            known = engine.prompts.known(tokens, len(tokens) - 1, keys)
            here = max(least, known.place)
            found = self._found(tokens, keys, known.stop // PAGE, here, recurrent)
            if found is None:
                return 0
            if self._bring(engine, tokens, keys, known, found):
                return found.place
        return 0

    def explain(
        self, tokens: Sequence[int], recurrent: bool, text: Callable[[Sequence[int]], str]
    ) -> str:
        """What the disk has of a prompt, and why no more, for a person; text: of tokens."""
        from runtime.memory.prompt_folders import folders

        self.store.refresh()
        keys = block_keys([], self.key, tokens, len(tokens) - 1)
        blocks = next((n for n, key in enumerate(keys) if not self.store.has(key)), len(keys))
        found, known = self._found(tokens, keys, 0, 0, recurrent), blocks * PAGE
        place = 0 if found is None else found.place
        lines = [f"{place} of {counted_as(len(tokens), 'token')} would not be read again"]
        lines.append(f"{counted_as(blocks, 'block')} of {PAGE} tokens are on disk")
        if recurrent:
            state = f"the last recurrent state that can be used is behind token {place}"
            lines.append(state if place else "no recurrent state is kept behind any of them")
        last = keys[blocks - 1] if blocks else self.key
        mine = [f for f in folders(self.store.root.parent) if f.path == self.store.folder]
        after = [b for f in mine for b, _ in f.blocks() if b.parent == last and b.tokens]
        other = max(after, key=lambda b: alike(b.tokens, tokens[known:]), default=None)
        if other is None:
            more = known < len(tokens) - 1
            return "\n".join([*lines, *[f"nothing goes on behind token {known}"][: int(more)]])
        same = alike(other.tokens, tokens[known:])
        if same < min(len(other.tokens), len(tokens) - known):
            lines.append(f"first difference: token {known + same + 1}")
            lines.append(f"  kept:   {text(other.tokens[same : same + _SHOWN])!r}")
            lines.append(f"  prompt: {text(tokens[known + same : known + same + _SHOWN])!r}")
        else:
            lines.append(
                f"the next block goes on as the prompt does; whole ones of {PAGE} are read"
            )
        return "\n".join(lines)

    def flush(self, seconds: float | None = None) -> bool:
        """Wait until what was kept is written, at most so long; whether it is."""
        self._hurry.set()
        try:
            return self._writer.drain(seconds)
        finally:
            self._hurry.clear()

    def _found(
        self, tokens: Sequence[int], keys: Sequence[bytes], blocks: int, least: int, recurrent: bool
    ) -> Found | None:
        """What the disk has beyond `least` tokens, of a prompt whose first blocks memory has."""
        most = next((n for n in range(blocks, len(keys)) if not self.store.has(keys[n])), len(keys))
        if not recurrent:
            worth = most * PAGE - least >= _WORTH
            return Found(most * PAGE, keys[most - 1], None) if worth else None
        for block in range(most, least // PAGE - 1, -1):
            parent, start = keys[block - 1] if block else self.key, block * PAGE
            for tail in self.store.ends(parent):
                place = start + tail.tokens
                fits = least + _WORTH <= place < len(tokens)
                if fits and block_key(parent, tokens[start:place]) == tail.key:
                    return Found(place, parent, tail)
        return None

    def _bring(
        self, engine: Engine, tokens: Sequence[int], keys: list[bytes], known: Known, found: Found
    ) -> bool:
        """Read it and give it to the cache in memory; False: something is not there any more."""
        blocks, end = min(known.stop, found.place) // PAGE, found.place // PAGE
        pages = Pages.room(engine.context, known.pages[:blocks])
        start = list(tokens[: found.place])
        record = Record(start, blocks * PAGE, pages, keys[:end], engine.empty().state)
        held = engine.sequence(record, "it is being read", cached=False)
        try:
            (grown,) = engine.pools.pages.prepare([(pages, blocks * PAGE, found.place)])
            if isinstance(grown, MemoryLimitError):
                return True
            held.record = record = record._replace(pages=grown, length=found.place)
            rows = grown.held.tolist()
            if found.tail is not None:
                (slot,) = engine.pools.free_slots(1)
                if not self._read_end(engine, found, rows[-1], slot):
                    return False
                state = Recurrent(slot, found.place, (Checkpoint(found.place, slot, True),))
                held.record = record = record._replace(state=state)

            def read(n: int, out: np.ndarray) -> bool:
                return self.store.read(keys[blocks + n], out) is not None

            if engine.plain.write_from(rows[blocks:end], read) < end - blocks:
                return False
            engine.prompts.keep(record, ends=True)
        except MemoryLimitError:
            return True
        finally:
            held.close()
        ends = [] if found.tail is None else [(found.parent, found.tail)]
        self._writer.put(lambda: self.store.used(keys[:end], ends))
        return True

    def _read_end(self, engine: Engine, found: Found, page: int, slot: int) -> bool:
        assert found.tail is not None, "only of models with recurrent layers"
        plain, partial = engine.plain, found.tail.tokens > 0
        room = np.empty(plain.page_nbytes * partial + plain.slot_nbytes, np.uint8)
        if self.store.read_end(found.parent, found.tail, room) is None:
            return False
        if partial:
            plain.write_pages([page], room[None, : plain.page_nbytes])
        plain.write_slot(slot, room[plain.page_nbytes * partial :])
        return True

    def _write(self, engine: Engine, tokens: Sequence[int], keys: list[bytes], ends: bool) -> None:
        """In the writer's thread: what is in memory still, and not on disk yet."""
        with contextlib.suppress(OptionError):  # the model is closed meanwhile
            self._write_pages(engine, tokens, keys, ends)
            if engine.memory.slots:
                self._write_states(engine, tokens, keys)

    def _write_pages(
        self, engine: Engine, tokens: Sequence[int], keys: list[bytes], ends: bool
    ) -> None:
        missing = self._missing(keys, ends)
        for at in range(0, len(missing), _LOT):
            lot = missing[at : at + _LOT]
            with engine.alone():
                engine.check_open()
                known = engine.prompts.known(tokens, len(tokens), keys)
                lot = [n for n in lot if (n + 1) * PAGE <= known.stop]
                pages = engine.plain.pages(known.pages[lot].tolist()) if lot else ()
            for n, page in zip(lot, pages, strict=True):
                start, parent = n * PAGE, keys[n - 1] if n else self.key
                piece = tuple(tokens[start : start + PAGE])
                block = Block(PAGES, self.key, keys[n], parent, start, piece, page.nbytes)
                if not self.store.write(block, page):
                    return
            self._hurry.wait(_PAUSE)

    def _missing(self, keys: Sequence[bytes], ends: bool) -> list[int]:
        """Blocks that are to be written; only at the end it is asked of all of them."""
        found = []
        for n in range(len(keys) - 1, -1, -1):
            if not self.store.has(keys[n]):
                found.append(n)
            elif not ends:
                break
        return found[::-1]

    def _write_states(self, engine: Engine, tokens: Sequence[int], keys: list[bytes]) -> None:
        """States that memory has, the last one and of others those that are not near another."""
        with engine.alone():
            known = engine.prompts.known(tokens, len(tokens), keys)
        heads = [self._end_at(tokens, keys, state.place) for state in known.states]
        kept = [h for h in heads if self.store.has_end(h.parent, Tail(len(h.tokens), h.key))]
        after = len(tokens) + SPACING
        for head in reversed(heads):
            place = head.start + len(head.tokens)
            before = [k.start + len(k.tokens) for k in kept if k.start + len(k.tokens) <= place]
            if head in kept:
                after = place
            elif after - place >= SPACING and place - max(before, default=0) >= _WORTH:
                with engine.alone():
                    engine.check_open()
                    known = engine.prompts.known(tokens, len(tokens), keys)
                    payload = _end(engine, known, place)
                if payload is not None:
                    self.store.write(head._replace(nbytes=payload.nbytes), payload)
                    after = place

    def _end_at(self, tokens: Sequence[int], keys: Sequence[bytes], place: int) -> Block:
        """The block that ends at a place, of no bytes yet."""
        start = place // PAGE * PAGE
        parent, piece = keys[start // PAGE - 1] if start else self.key, tuple(tokens[start:place])
        return Block(END, self.key, block_key(parent, piece), parent, start, piece, 0)


def _end(engine: Engine, known: Known, place: int) -> np.ndarray | None:
    """uint8: the page that a place lies in, up to there, and the state; None: it has gone."""
    slot = next((state.slot for state in known.states if state.place == place), None)
    if slot is None:
        return None
    parts = [engine.plain.slot(slot)]
    if place % PAGE:
        (page,) = engine.plain.pages([int(known.pages[place // PAGE])])
        parts.insert(0, engine.plain.without(page, place % PAGE))
    return np.concatenate(parts)
