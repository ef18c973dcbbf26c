"""Cache pages and slots: sharing, copy on write, exhaustion; and the choice of a context."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import NOVEL, write_model

import runtime
from runtime.errors import MemoryLimitError
from runtime.memory import budget
from runtime.memory.pages import BlockTable, PagePool, reserve
from runtime.memory.slots import CHECKPOINTS, NONE, SPACING, Recurrent, SlotPool
from runtime.memory.slots import reserve as reserve_slots
from runtime.ops import PAGE


def _pool(count: int = 8) -> tuple[PagePool, np.ndarray]:
    memory = np.zeros((count, 4), np.uint8)
    return PagePool(count, [memory]), memory


def test_fork_shares_until_one_writes():
    pool, memory = _pool()
    first = BlockTable(pool, 4 * PAGE)
    first.reserve(0, PAGE + 5)
    memory[first.row[1]] = 7
    second = first.fork()
    assert list(second.row) == list(first.row) and pool.free == 6
    second.reserve(PAGE + 5, PAGE + 6)
    assert second.row[0] == first.row[0] and second.row[1] != first.row[1]
    assert (memory[second.row[1]] == 7).all() and pool.free == 5


def test_closing_gives_every_page_back():
    pool, _ = _pool()
    first = BlockTable(pool, 4 * PAGE)
    first.reserve(0, 3 * PAGE)
    second = first.fork()
    second.reserve(2 * PAGE, 3 * PAGE)
    first.truncate(0)
    second.truncate(0)
    assert pool.free == 8


def test_exhaustion_says_what_to_do():
    pool, _ = _pool(2)
    table = BlockTable(pool, 4 * PAGE)
    with pytest.raises(MemoryLimitError, match=r"all 2 pages .* close sessions"):
        table.reserve(0, 3 * PAGE)


def test_several_sequences_reserve_all_or_nothing():
    pool, _ = _pool(7)
    tables = [BlockTable(pool, 8 * PAGE) for _ in range(2)]
    tables[0].reserve(0, PAGE + 1)
    fork = tables[0].fork()
    with pytest.raises(MemoryLimitError, match="all 7 pages"):
        reserve([(tables[0], PAGE + 1, PAGE + 2), (tables[1], 0, 5 * PAGE)])
    assert pool.free == 5 and list(fork.row) == list(tables[0].row) and not len(tables[1].row)
    # Of two that write to a page they share, the second may keep it: five pages are enough.
    reserve([(t, PAGE + 1, PAGE + 2) for t in (tables[0], fork)] + [(tables[1], 0, 4 * PAGE)])
    assert pool.free == 0 and fork.row[0] == tables[0].row[0] and fork.row[1] != tables[0].row[1]


def test_a_forgotten_table_gives_its_pages_back():
    pool, _ = _pool()
    table = BlockTable(pool, 4 * PAGE)
    table.reserve(0, 2 * PAGE)
    table.abandon()
    assert pool.free == 8


def test_slots_follow_the_table():
    pool, _ = _pool()
    table = BlockTable(pool, 4 * PAGE)
    table.reserve(0, 2 * PAGE)
    slots = table.slots(PAGE - 1, PAGE + 1)
    assert list(slots) == [table.row[0] * PAGE + PAGE - 1, table.row[1] * PAGE]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["grow", "fork", "cut", "close"]),
                          st.integers(1, 70)), max_size=30))  # fmt: skip
def test_any_order_of_operations_keeps_sequences_apart(steps: list[tuple[int, str, int]]):
    """Each sequence's pages always hold what was written through it, whatever forks did."""
    pool, memory = _pool(40)
    tables: list[BlockTable] = [BlockTable(pool, 8 * PAGE)]
    written: list[list[int]] = [[]]
    clock = 0
    for which, what, n in steps:
        i = which % len(tables)
        table, log = tables[i], written[i]
        if what == "grow":
            stop = min(8 * PAGE, len(log) + n)
            try:
                table.reserve(len(log), stop)
            except MemoryLimitError:
                continue
            for place in range(len(log), stop):
                clock = (clock + 1) % 251
                memory[table.row[place // PAGE]] = clock
                log.append(clock)
        elif what == "fork" and len(tables) < 4:
            tables.append(table.fork())
            written.append(list(log))
        elif what == "cut":
            del log[len(log) - min(n, len(log)) // PAGE * PAGE :]
            table.truncate(len(log))
        for t, w in zip(tables, written, strict=True):
            for page in range(len(w) // PAGE):
                assert memory[t.row[page]][0] == w[page * PAGE + PAGE - 1]
    for table in tables:
        table.truncate(0)
    assert pool.free == 40


def test_choose_takes_what_fits(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(budget, "available_memory", lambda: 1000 + 100 * 1000)
    size = budget.choose(None, 100_000, 4, page_nbytes=1000, weights=1000)
    assert size.context == 90 * PAGE and size.pages == 90
    small = budget.choose(None, 5 * PAGE, 4, page_nbytes=1000, weights=1000)
    assert small.context == 5 * PAGE and small.pages == 4 * (5 + 16)


def test_slots_take_their_share(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(budget, "available_memory", lambda: 1000 + 100 * 1000)
    size = budget.choose(None, 100_000, 4, page_nbytes=1000, weights=1000, slot_nbytes=5000)
    assert size == budget.CacheSize((90 - 4 * 5) * PAGE, 70, 4)
    many = budget.choose(None, PAGE, 2, page_nbytes=1000, weights=1000, slot_nbytes=10)
    assert many.slots == 2 * budget.SLOTS_PER_SEQUENCE
    with pytest.raises(MemoryLimitError, match=r"of KV cache and 78\.1 KiB of recurrent state,"):
        budget.choose(50 * PAGE, 100, 1, page_nbytes=1000, weights=1000, slot_nbytes=40_000)
    with pytest.raises(MemoryLimitError, match=r"no room is left for a KV cache beside 97\.7 KiB"):
        budget.choose(None, 100, 1, page_nbytes=1000, weights=1000, slot_nbytes=50_000)


def test_too_large_a_context_says_what_fits(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(budget, "available_memory", lambda: 101_000)
    with pytest.raises(MemoryLimitError, match=rf"at most context={90 * PAGE} fits"):
        budget.choose(10_000_000, 100, 1, page_nbytes=1000, weights=1000)
    with pytest.raises(MemoryLimitError, match="no room is left"):
        budget.choose(None, 100, 1, page_nbytes=1000, weights=200_000)


def test_checkpoints_thin_out_from_the_end():
    pool = SlotPool(20)
    state = Recurrent(pool)
    for place in range(1, 2001):
        state.begin()
        state.end(place)
    places = [c.place for c in state.checkpoints]
    gaps = np.diff([*places, 2000])
    assert len(places) == CHECKPOINTS and places[-1] > 2000 - SPACING - 1
    assert (gaps[:-1] >= SPACING).all() and gaps[0] >= 4 * gaps[-2]
    assert pool.free == 20 - CHECKPOINTS - 1
    state.close()
    assert pool.free == 20


def test_slots_are_reserved_together():
    pool = SlotPool(3)
    states = [Recurrent(pool) for _ in range(4)]
    with pytest.raises(MemoryLimitError, match="all 3 slots"):
        reserve_slots(states)
    assert pool.free == 3 and all(s.slot == NONE for s in states)


@pytest.mark.parametrize(
    "device, width",
    [("reference", 8), pytest.param("cpu", 4, marks=pytest.mark.slow), ("null", 4)],
)
def test_what_a_model_says_of_its_memory(tmp_path: Path, device: str, width: int):
    size = NOVEL["qwen35"]
    channels = 2 * size.key_heads * size.k_dim + size.value_heads * size.v_dim
    each = (size.taps - 1) * channels + size.value_heads * size.k_dim * size.v_dim
    with runtime.load(write_model(tmp_path / "m.gguf", size), devices=device) as model:
        memory = model.memory()
        assert memory.state == model.state_nbytes_per_sequence() == 2 * each * width
        assert memory.of(PAGE + 1) == memory.weights + 2 * memory.page + memory.state
        assert (memory.slots, memory.pages) == (model.slots.count, model._pool.count)


def test_a_model_without_recurrent_layers_has_no_slots(small_model: Path):
    with runtime.load(small_model, devices="null") as model:
        assert model.state_nbytes_per_sequence() == 0 == model.memory().slots
