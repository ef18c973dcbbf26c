"""What a tree of prompts lets go of: what would save the least reading again, for its bytes.

A page at the end of a leaf saves reading its tokens, a state those after the state before it, to
whoever comes back. That is the less likely the more prompts have come since it was last of use.
Pages behind the last state of a recurrent model save nothing until there is one behind them.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from itertools import count
from typing import NamedTuple

import numpy as np

from runtime.memory.prefix_edges import State
from runtime.memory.prefix_tree import Node, PrefixTree, Step
from runtime.ops import PAGE

_MESSAGE_END = 4  # how much likelier somebody goes on from the end of a message
_UNREACHED = 1e-6  # of the worth of a page, without a state behind it


class Costs(NamedTuple):
    """Bytes of a page and of a slot (0: the model has no recurrent layers); `now`: prompts so
    far."""

    page: int
    slot: int
    now: int

    def likely(self, used: int) -> float:
        """How likely somebody comes back to what was last of use then, in no unit."""
        return 1 / (1 + self.now - used)


class Pinned(NamedTuple):
    """What somebody holds who cannot give it up: bool [pages of the pool], and slots."""

    pages: np.ndarray
    slots: frozenset[int]


class _Cut(NamedTuple):
    """A leaf may lose what lies behind `place`, at `loss` a byte; all of it or block by block."""

    loss: float
    order: int
    leaf: Step
    place: int
    whole: bool


class _Row(NamedTuple):
    """A node with states: those whose slots nobody else holds, with the place before; and all."""

    step: Step
    free: dict[State, int]
    states: list[State]


class Eviction:
    """One round of letting go; `gone` are the keys of the first blocks that are no longer there."""

    def __init__(self, tree: PrefixTree, costs: Costs, pinned: Pinned) -> None:
        self._tree, self._costs, self._pinned = tree, costs, pinned
        self._order = count()
        self.gone = list[bytes]()

    def slots(self, wanted: int) -> int:
        """Let go of states until so many slots more are free, if there are as many.

        Without one, more is to be read again to the next one of its edge, which is worth more then.
        """
        rows = [
            _Row(step, self._free(step, before), [s for _, s in _pairs(before, step)])
            for step, before in self._with_states()
            if step.node.edge.states
        ]
        heap = [
            (self._loss(state, before), next(self._order), row, state)
            for row in rows
            for state, before in row.free.items()
        ]
        heapq.heapify(heap)
        gone = set[State]()
        while heap and len(gone) < wanted:
            loss, _, row, state = heapq.heappop(heap)
            if self._loss(state, row.free[state]) > loss:
                continue  # it has become worth more, and stands there once again
            gone.add(state)
            after = next((s for s in row.states if s.place > state.place and s not in gone), None)
            if after in row.free:
                row.free[after] = row.free[state]
                again = self._loss(after, row.free[after]), next(self._order), row, after
                heapq.heappush(heap, again)
        for step in (row.step for row in rows):
            edge = step.node.edge
            if left := tuple(s for s in edge.states if s in gone):
                kept = tuple(s for s in edge.states if s not in left)
                self._tree.change(step, edge._replace(states=kept))
        return len(gone)

    def pages(self, wanted: int) -> int:
        """Let go of ends of leaves until so many pages more are free.

        Of leaves that somebody else goes on from only when there are no others.
        """
        freed = self._trim(wanted, forced=False)
        if freed < wanted:
            freed += self._trim(wanted - freed, forced=True)
        return freed

    def nbytes(self, wanted: int) -> int:
        """Let go of whatever saves least until so many bytes more are free."""
        freed, costs = 0, self._costs
        while freed < wanted:
            share = max(1, (wanted - freed) // 8)  # of what saves least now
            states = [
                self._loss(state, before) / costs.slot
                for step, above in self._with_states()
                for state, before in self._free(step, above).items()
            ]
            leaves = [cut.loss for cut in self._cuts() if self._frees(cut)]
            if states and min(states) < min(leaves, default=np.inf):
                found = costs.slot * self.slots(-(-share // costs.slot))
            else:
                found = costs.page * self._trim(-(-share // costs.page)) if leaves else 0
            if not found:
                break
            freed += found
        return freed

    def _free(self, step: Step, above: int) -> dict[State, int]:
        """The states of a node whose slots nobody else holds, with the place of the one before.

        above: the place of the last one above the node.
        """
        pairs = _pairs(above, step)
        return {state: at for at, state in pairs if state.slot not in self._pinned.slots}

    def _loss(self, state: State, before: int) -> float:
        worth = _MESSAGE_END if state.message_end else 1
        return worth * (state.place - before) * self._costs.likely(state.used)

    def _with_states(self) -> Iterator[tuple[Step, int]]:
        """Every node, with the place of the last state above it."""
        places = {self._tree.root: 0}
        for step in self._tree:
            before, states = places[step.above], step.node.edge.states
            places[step.node] = states[-1].place if states else before
            yield step, before

    def _cuts(self) -> list[_Cut]:
        """The next cut of each leaf."""
        return [self._cut(step, at) for step, at in self._with_states() if not step.node.children]

    def _cut(self, leaf: Step, before: int) -> _Cut:
        """before: the place of the last state above it."""
        edge, likely = leaf.node.edge, self._costs.likely(leaf.node.used)
        per_page = likely * PAGE / self._costs.page
        if not self._costs.slot:
            return _Cut(per_page, next(self._order), leaf, edge.start, False)
        places = [state.place for state in edge.states]
        last = places[-1] if places else edge.start
        if -(-edge.stop // PAGE) > -(-last // PAGE):
            return _Cut(per_page * _UNREACHED, next(self._order), leaf, last, False)
        place = places[-2] if len(places) > 1 else edge.start
        saved = last - (place if len(places) > 1 else before) if places else 0
        nbytes = self._costs.slot * bool(places) + self._costs.page * len(edge.pages)
        loss = _MESSAGE_END * likely * saved / nbytes + per_page * _UNREACHED
        return _Cut(loss, next(self._order), leaf, place, True)

    def _frees(self, cut: _Cut) -> bool:
        pages = cut.leaf.node.edge.pages
        return bool(((self._tree.counts[pages] == 1) & ~self._pinned.pages[pages]).any())

    def _trim(self, wanted: int, forced: bool = False) -> int:
        """How many pages more are free.

        forced: leaves are cut behind pages that somebody else holds as well.
        """
        found = dict(self._with_states_of_parents())
        cuts, freed, before = self._cuts(), 0, self._unpinned()
        heapq.heapify(cuts)
        while cuts and freed < wanted:
            cut = heapq.heappop(cuts)
            above, leaf, edge = cut.leaf.above, cut.leaf.node, cut.leaf.node.edge
            held = self._pinned.pages[edge.pages]
            if (held.all() or held[-1]) and not forced:
                continue
            if forced and not self._unpinned():
                break
            place = cut.place if cut.whole else self._place(cut, wanted - freed, forced)
            lost = edge.pages[-(-place // PAGE) - edge.start // PAGE if place > edge.start else 0 :]
            self.gone += edge.keys[place // PAGE - edge.start // PAGE :][:1]
            left = self._tree.shorten(above, leaf, place)
            freed += int(((self._tree.counts[lost] == 0) & ~self._pinned.pages[lost]).sum())
            after = found[above] if left is None else Step(above, left, place)
            if after is not None and not after.node.children:
                heapq.heappush(cuts, self._cut(after, self._state_above(after, found)))
        self._tree.compact()
        return before - self._unpinned()

    def _unpinned(self) -> int:
        """How many pages the tree alone holds."""
        return int((~self._pinned.pages[self._tree.pages]).sum())

    def _place(self, cut: _Cut, wanted: int, forced: bool) -> int:
        """Where to cut a leaf for so many pages, or as far as that goes."""
        edge = cut.leaf.node.edge
        most = -(-edge.stop // PAGE) - -(-cut.place // PAGE)
        blocks = min(wanted, max(1, most))
        if not forced:
            held = self._pinned.pages[edge.pages[::-1][:blocks]]
            blocks = int(held.argmax()) if held.any() else blocks
        return max(cut.place, (-(-edge.stop // PAGE) - blocks) * PAGE)

    def _with_states_of_parents(self) -> Iterator[tuple[Node, Step | None]]:
        yield self._tree.root, None
        for step in self._tree:
            yield step.node, step

    def _state_above(self, step: Step, steps: dict[Node, Step | None]) -> int:
        """The place of the last state above a node."""
        at = steps[step.above]
        while at is not None:
            if at.node.edge.states:
                return at.node.edge.states[-1].place
            at = steps[at.above]
        return 0


def _pairs(before: int, step: Step) -> Iterator[tuple[int, State]]:
    """Each state of a node, with the place of the one before it."""
    for state in step.node.edge.states:
        yield before, state
        before = state.place
