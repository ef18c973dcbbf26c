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
from runtime.memory.holders import Holder, Holders
from runtime.memory.pages import PagePool, Pages
from runtime.memory.slots import CHECKPOINTS, SPACING, Recurrent
from runtime.ops import PAGE


class Sequence(Holder):
    """Someone who holds pages, as sessions do."""

    def __init__(self, pages: Pages) -> None:
        self.pages = pages

    def held_pages(self) -> np.ndarray:
        return self.pages.held


class Pool(PagePool):
    """A pool, memory of four bytes for each of its pages, and the sequences that hold them."""

    def __init__(self, count: int = 8) -> None:
        self.memory, self.sequences = np.zeros((count, 4), np.uint8), list[Sequence]()
        super().__init__(count, self._copy_pages, Holders())

    def _copy_pages(self, sources: list[int], targets: list[int]) -> None:
        self.memory[targets] = self.memory[sources]

    def sequence(self, capacity: int = 8 * PAGE) -> Sequence:
        return self._add(Sequence(Pages.room(capacity)))

    def fork(self, other: Sequence) -> Sequence:
        other.pages = other.pages.shared()
        return self._add(Sequence(other.pages.copy()))

    def _add(self, sequence: Sequence) -> Sequence:
        self.sequences.append(sequence)
        self._holders.add(sequence)
        return sequence

    def close(self, sequence: Sequence) -> None:
        self.sequences.remove(sequence)
        sequence.pages = Pages.room(0)

    def grow(self, *wanted: tuple[Sequence, int, int]) -> None:
        found = self.prepare([(s.pages, start, stop) for s, start, stop in wanted])
        for pages in found:
            if isinstance(pages, MemoryLimitError):
                raise pages
        for (sequence, start, stop), pages in zip(wanted, found, strict=True):
            sequence.pages = pages
            assert pages.writable(start, stop)


def test_fork_shares_until_one_writes():
    pool = Pool()
    first = pool.sequence()
    pool.grow((first, 0, PAGE + 5))
    pool.memory[first.pages.row[1]] = 7
    second = pool.fork(first)
    assert list(second.pages.held) == list(first.pages.held) and pool.free == 6
    assert not first.pages.writable(PAGE + 5, PAGE + 6), "nor can the one that was forked"
    pool.grow((second, PAGE + 5, PAGE + 6))
    ours, theirs = second.pages.row, first.pages.row
    assert ours[0] == theirs[0] and ours[1] != theirs[1]
    assert (pool.memory[ours[1]] == 7).all() and pool.free == 5


def test_what_is_prepared_and_not_taken_is_free_again():
    pool = Pool()
    first = pool.sequence()
    pool.grow((first, 0, PAGE + 5))
    second, before = pool.fork(first), first.pages
    held = list(before.held)
    for _ in range(3):
        pool.prepare([(first.pages, PAGE + 5, 6 * PAGE), (second.pages, 3, 4)])
        assert pool.free == 6 and first.pages is before and list(before.held) == held
    pool.grow((first, PAGE + 5, 6 * PAGE))
    assert pool.free == 1


def test_a_page_is_not_copied_for_its_last_holder():
    pool = Pool()
    first = pool.sequence()
    pool.grow((first, 0, PAGE + 5))
    second, held = pool.fork(first), list(first.pages.held)
    pool.close(second)
    pool.grow((first, PAGE + 5, PAGE + 6))
    assert list(first.pages.held) == held and pool.free == 6


def test_cutting_gives_pages_back():
    pool = Pool()
    first = pool.sequence()
    pool.grow((first, 0, 3 * PAGE))
    second = pool.fork(first)
    pool.grow((second, 2 * PAGE, 3 * PAGE))
    assert pool.free == 4
    first.pages, second.pages = first.pages.cut(PAGE + 1), second.pages.cut(0)
    assert pool.free == 6


def test_exhaustion_says_what_to_do():
    pool = Pool(2)
    with pytest.raises(MemoryLimitError, match=r"all 2 pages .* close sessions"):
        pool.grow((pool.sequence(), 0, 3 * PAGE))
    assert pool.free == 2


def test_several_sequences_reserve_all_or_nothing():
    pool = Pool(7)
    first, other = pool.sequence(), pool.sequence()
    pool.grow((first, 0, PAGE + 1))
    fork = pool.fork(first)
    with pytest.raises(MemoryLimitError, match="all 7 pages"):
        pool.grow((first, PAGE + 1, PAGE + 2), (other, 0, 5 * PAGE))
    held = list(first.pages.held)
    assert pool.free == 5 and list(fork.pages.held) == held and not len(other.pages.held)
    # Of two that write to a page they share, the second may keep it: five pages are enough.
    pool.grow((first, PAGE + 1, PAGE + 2), (fork, PAGE + 1, PAGE + 2), (other, 0, 4 * PAGE))
    ours, theirs = fork.pages.row, first.pages.row
    assert pool.free == 0 and ours[0] == theirs[0] and ours[1] != theirs[1]


def test_slots_follow_the_pages():
    pool = Pool()
    first = pool.sequence()
    pool.grow((first, 0, 2 * PAGE))
    row, slots = first.pages.row, first.pages.kv_slots(PAGE - 1, PAGE + 1)
    assert list(slots) == [row[0] * PAGE + PAGE - 1, row[1] * PAGE]
    assert [first.pages.kv_slot(place) for place in (PAGE - 1, PAGE)] == list(slots)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["grow", "fork", "cut", "close"]),
                          st.integers(1, 70)), max_size=30))  # fmt: skip
def test_any_order_of_operations_keeps_sequences_apart(steps: list[tuple[int, str, int]]):
    """Each sequence's pages always hold what was written through it, whatever others did."""
    pool = Pool(40)
    pool.sequence()
    written: list[list[int]] = [[]]
    clock = 0
    for which, what, n in steps:
        i = which % len(written)
        sequence, log = pool.sequences[i], written[i]
        if what == "grow":
            stop = min(8 * PAGE, len(log) + n)
            try:
                pool.grow((sequence, len(log), stop))
            except MemoryLimitError:
                continue
            for place in range(len(log), stop):
                clock = (clock + 1) % 251
                pool.memory[sequence.pages.row[place // PAGE]] = clock
                log.append(clock)
        elif what == "fork" and len(written) < 4:
            pool.fork(sequence)
            written.append(list(log))
        elif what == "cut":
            del log[len(log) - min(n, len(log)) // PAGE * PAGE :]
            sequence.pages = sequence.pages.cut(len(log))
        elif what == "close" and len(written) > 1:
            pool.close(sequence)
            del written[i]
        for s, w in zip(pool.sequences, written, strict=True):
            assert len(s.pages.held) == -(-len(w) // PAGE)
            for page in range(len(w) // PAGE):
                assert pool.memory[s.pages.row[page]][0] == w[page * PAGE + PAGE - 1]


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
    state = Recurrent()
    for place in range(1, 2001):
        state = state.after(place, place)
    places = [c.place for c in state.checkpoints]
    gaps = np.diff([*places, 2000])
    assert len(places) == CHECKPOINTS and places[-1] > 2000 - SPACING - 1
    assert (gaps[:-1] >= SPACING).all() and gaps[0] >= 4 * gaps[-2]
    assert state.held == {2000, *places}


def test_a_state_goes_back_to_what_was_kept():
    state = Recurrent().after(5, 30, message_end=True).after(6, 40).after(7, 41)
    assert (state.slot, state.place, state.own, state.held) == (7, 41, True, {5, 7})
    assert state.cut(41) == state and state.cut(40) == state.lost()
    assert (state.cut(40).slot, state.cut(40).place, state.cut(40).own) == (5, 30, False)
    assert state.cut(29) == Recurrent()


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
        assert memory.state == 2 * each * width
        assert memory.of(PAGE + 1) == memory.weights + 2 * memory.page + memory.state
        assert (memory.slots, memory.pages) == (
            model._engine.pools.slots.count,
            model._engine.pools.pages.count,
        )


def test_a_model_without_recurrent_layers_has_no_slots(small_model: Path):
    with runtime.load(small_model, devices="null") as model:
        assert model.memory().state == 0 == model.memory().slots
