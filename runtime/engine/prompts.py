"""PromptCache: what the sequences of a model have evaluated, for those that begin with the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from runtime.engine.pools import Pools
from runtime.engine.reuse import Reuse
from runtime.engine.sequence import Record
from runtime.engine.sequence import Sequence as Held
from runtime.memory.eviction import Costs, Eviction, Pinned
from runtime.memory.holders import Evictable
from runtime.memory.pages import Pages
from runtime.memory.prefix_edges import Edge, State, block_keys
from runtime.memory.prefix_tree import PrefixTree, Step, keys_of, pages_of, states_of
from runtime.memory.slots import Checkpoint, Recurrent
from runtime.ops import PAGE

_SHOWN = 8  # tokens behind the place where a prompt leaves what is cached
_BRANCH = 32  # fewest tokens that are read again for which a state is kept at a branch
_GONE = 4096  # blocks that are known to have been there
_SLACK = 64  # share of the pool that is freed at once


class Known(NamedTuple):
    """What the cache has of a sequence of tokens: int32 pages of the first `stop`, states."""

    stop: int
    pages: np.ndarray
    states: list[State]
    recurrent: bool

    @property
    def place(self) -> int:
        """From where on a sequence would go on from it."""
        return max((s.place for s in self.states), default=0) if self.recurrent else self.stop


# Brings more of some tokens into the cache, if it has more than so many; how many are now there.
Below = Callable[[Sequence[int], int], int]


class PromptCache(Evictable):
    """Holds pages and states of sequences of one model after they have ended, for those to come.

    Whoever changes it holds the engine's lock. `enabled`: it keeps and finds anything. `key`: of
    what makes other pages of the same tokens, which the keys of blocks begin from. `below`: asked
    for what is not here.
    """

    __slots__ = (
        "_clock", "_context", "_gone", "_most", "_pools", "_recurrent", "_sizes", "below",
        "enabled", "key", "tree",
    )  # fmt: skip

    def __init__(
        self, pools: Pools, context: int, sizes: tuple[int, int], enabled: bool = True,
        most: int | None = None,
    ) -> None:  # fmt: skip
        """context: most tokens of a sequence. sizes: bytes of a page and of a slot, 0 without
        recurrent layers. most: bytes that it may hold, by default as many as there are."""
        self._pools, self._context = pools, context
        self._sizes, self._recurrent, self._most = sizes, bool(pools.slots.count), most
        self.enabled, self.key, self._clock = enabled, b"", 0
        self.below: Below | None = None
        self.clear()
        pools.holders.add(self)

    def start(self, tokens: Sequence[int], least: int = 0) -> tuple[Record, Reuse]:
        """A record of the longest cached start of `tokens`, at most all but the last of them.

        Of a model with recurrent layers up to where a state was kept; the record says where the
        next one is wanted, if the prompt leaves there what is cached. least: how many there are
        elsewhere, so that it is not worth while to look below for fewer.
        """
        self._clock += 1
        brought = self.below(tokens, least) if self.enabled and self.below is not None else 0
        way = self.tree.walk(np.array(tokens if self.enabled else [], np.int32))
        known = way[-1].stop if way else 0
        length, state, branches = min(known, len(tokens) - 1), None, tuple[int, ...]()
        if self._recurrent:
            branch, states = length, states_of(way, length)
            state = _as_checkpoint(states[-1], self._clock) if states else Recurrent()
            length = state.place
            branches = (branch,) if branch - length >= _BRANCH else ()
        self._used(way)
        pages, keys = Pages.room(self._context, pages_of(way, length)), keys_of(way, known)
        record = Record(
            list(tokens[:length]), length, pages, keys[: length // PAGE], state, branches=branches
        )
        reuse = Reuse(
            len(tokens), length, _source(length, brought), pages.used,
            length if self._recurrent else None, known, self._follows(way),
            tuple(tokens[known : known + _SHOWN]), self._was_there(keys, tokens, known),
            not self.enabled,
        )  # fmt: skip
        return record, reuse

    def resume(self, sequence: Held, same: int, tokens: Sequence[int], turn: int = 0) -> Reuse:
        """Make a sequence ready to go on to `tokens`, whose first `same` it has.

        It goes on from what it has or from what is cached, whichever leaves fewer to evaluate, and
        is left with a start of `tokens`, short of the last one. turn: where others are likely to
        go on in another way.
        """
        own = sequence.record.cut(same)
        if own.given:
            sequence.record = own
            return Reuse(len(tokens), own.evaluated, "session")
        found, reuse = self.start(tokens, own.evaluated)
        if found.length <= own.evaluated:
            state = own.evaluated if self._recurrent else None
            source = "session" if own.evaluated else ""
            reuse = reuse._replace(
                cached_tokens=own.evaluated, source=source, blocks=0, snapshot=state
            )
            found = own._replace(branches=tuple(b for b in found.branches if b > own.length))
        if self._recurrent and min(turn - found.evaluated, len(tokens) - turn) >= _BRANCH:
            found = found._replace(branches=(*found.branches, turn))
        sequence.record = found
        return reuse

    def keep(self, record: Record, ends: bool = False) -> None:
        """What a sequence has evaluated is held here as well; ends: it is closed already.

        Of the states of its past those at message ends, and all of them when it ends.
        """
        if not self.enabled or record.closed or record.given:
            return
        length = record.length
        keys = block_keys(record.keys, self.key, record.tokens, length)
        way = self.tree.walk_known(record.tokens, length, keys)
        self._used(way)
        at = way[-1].stop if way else 0
        way = self._united(way, at, record.pages.held)
        if at < length:
            edge = Edge(
                at, np.array(record.tokens[at:length], np.int32),
                record.pages.held[at // PAGE : -(-length // PAGE)].copy(),
                tuple(keys[at // PAGE : length // PAGE]),
            )  # fmt: skip
            self.tree.grow(way, edge, self._clock)
        if record.state is not None:
            self._keep_states(record, keys, ends)
        if self._most is not None and (over := self.nbytes - self._most) > 0:
            eviction = self._eviction()
            eviction.nbytes(over)
            self._remember(eviction.gone)

    @property
    def nbytes(self) -> int:
        """Bytes of the pages and slots that it holds."""
        page, slot = self._sizes
        return len(self.tree.pages) * page + len(self.tree.slots) * slot

    def known(self, tokens: Sequence[int], length: int, keys: Sequence[bytes]) -> Known:
        """What is held of the first `length` of `tokens`, whose blocks have these keys."""
        way = self.tree.walk_known(tokens, length, keys)
        stop = way[-1].stop if way else 0
        return Known(stop, pages_of(way, stop), states_of(way, stop), self._recurrent)

    def clear(self) -> None:
        """Hold nothing."""
        self.tree, self._gone = PrefixTree(self._pools.pages.count), dict[bytes, None]()

    def close(self) -> None:
        """See Holder."""
        self.clear()
        self.enabled = False

    def held_pages(self) -> np.ndarray:
        """See Holder."""
        return self.tree.pages

    def held_slots(self) -> frozenset[int]:
        """See Holder."""
        return self.tree.slots

    def evict(self, pages: int, slots: int) -> bool:
        """See Evictable."""
        eviction = self._eviction()
        freed = 0
        if slots:
            freed = eviction.slots(max(slots, self._pools.slots.count // _SLACK))
        if pages:
            freed += eviction.pages(max(pages, self._pools.pages.count // _SLACK))
        self._remember(eviction.gone)
        return freed > 0

    def let_go(self, slot: int) -> bool:
        """See Evictable."""
        if slot not in self.tree.slots:
            return False
        for step in list(self.tree):
            edge = step.node.edge
            states = tuple(state for state in edge.states if state.slot != slot)
            if len(states) < len(edge.states):
                self.tree.change(step, edge._replace(states=states))
        return True

    def _eviction(self) -> Eviction:
        others = [h for h in self._pools.holders if not isinstance(h, Evictable)]
        slots = frozenset[int]().union(*(h.held_slots() for h in others))
        pinned = Pinned(self._pools.pages.holders(pinned=True) > 0, slots)
        return Eviction(self.tree, Costs(*self._sizes, self._clock), pinned)

    def _remember(self, gone: Iterable[bytes]) -> None:
        """So that it can be said why they are not found."""
        for key in gone:
            self._gone.pop(key, None)
            self._gone[key] = None
        while len(self._gone) > _GONE:
            del self._gone[next(iter(self._gone))]

    def _was_there(self, keys: list[bytes], tokens: Sequence[int], known: int) -> bool:
        """Whether the block behind what is known had been cached. keys: of what is known."""
        block = known // PAGE
        if not self._gone or len(tokens) < (block + 1) * PAGE:
            return False
        return block_keys(keys[:block], self.key, tokens, (block + 1) * PAGE)[-1] in self._gone

    def _used(self, way: Sequence[Step]) -> None:
        for step in way:
            step.node.used = self._clock

    def _united(self, way: list[Step], at: int, held: np.ndarray) -> list[Step]:
        """Hold the pages that a sequence holds in place of others with the same tokens.

        Where somebody holds those, too, nothing would be won.
        """
        whole = at // PAGE
        if (pages_of(way, whole * PAGE) == held[:whole]).all():
            return way
        pinned = self._pools.pages.holders(pinned=True) > 0
        above, found = self.tree.root, list[Step]()
        for step in way:
            edge, first = step.node.edge, step.node.edge.start // PAGE
            blocks = max(0, min(whole, -(-edge.stop // PAGE)) - first)
            pages = edge.pages.copy()
            other = np.flatnonzero(pages[:blocks] != held[first : first + blocks])
            other = other[~pinned[pages[other]]]
            node = step.node
            if len(other):
                pages[other] = held[first + other]
                node = node.of(edge._replace(pages=pages))
                self.tree.put(above, edge.first, node, (edge,), (node.edge,))
            found.append(Step(above, node, step.stop))
            above = node
        return found

    def _keep_states(self, record: Record, keys: Sequence[bytes], ends: bool) -> None:
        state = record.state
        assert state is not None, "only recurrent layers have states"
        found = [c for c in state.checkpoints if ends or c.message_end]
        if ends and state.place:
            found.append(Checkpoint(state.place, state.slot, True))
        for checkpoint in found:
            place = checkpoint.place
            if checkpoint.slot in self.tree.slots:
                continue
            step = self.tree.walk_known(record.tokens, place, keys)[-1]
            if step.stop == place and all(s.place != place for s in step.node.edge.states):
                kept = State(*checkpoint, self._clock)
                self.tree.change(step, step.node.edge.with_state(kept))

    def _follows(self, way: Sequence[Step]) -> tuple[int, ...]:
        """Cached tokens behind the end of a way, along what was used last."""
        node, at = (way[-1].node, way[-1].stop) if way else (self.tree.root, 0)
        found = list[int](node.edge.tokens[at - node.edge.start :][:_SHOWN].tolist())
        while len(found) < _SHOWN and node.children:
            node = max(node.children.values(), key=lambda child: child.used)
            found += node.edge.tokens[: _SHOWN - len(found)].tolist()
        return tuple(found)


def _source(length: int, brought: int) -> str:
    if not length:
        return ""
    return "disk" if brought == length else "cache"


def _as_checkpoint(state: State, now: int) -> Recurrent:
    state.used = now
    kept = Checkpoint(state.place, state.slot, state.message_end)
    return Recurrent(state.slot, state.place, (kept,))
