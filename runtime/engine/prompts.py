"""PromptCache: what the sequences of a model have evaluated, for those that begin with the same."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from itertools import count
from typing import NamedTuple

import numpy as np

from runtime.engine.pools import Pools
from runtime.engine.sequence import Record
from runtime.engine.sequence import Sequence as Held
from runtime.memory.holders import Evictable
from runtime.memory.pages import Pages
from runtime.memory.prefix_tree import (
    Edge,
    Node,
    State,
    Step,
    block_keys,
    keys_of,
    nodes,
    pages_of,
    states_of,
    walk,
    walk_known,
)
from runtime.memory.slots import Checkpoint, Recurrent
from runtime.ops import PAGE


class Reuse(NamedTuple):
    """What a prompt of `prompt_tokens` did not have to evaluate.

    cached_tokens: how many of its first tokens. source: "cache", "session" (its own), or "".
    blocks: pages of the cache that it shares. snapshot: where the recurrent state lay that it goes
    on from, 0 without one, None for models without recurrent layers. known: how many of its first
    tokens the cache knows at all. cached_next, prompt_next: the tokens that follow there, of the
    cached sequence that was nearest and of the prompt.
    """

    prompt_tokens: int
    cached_tokens: int = 0
    source: str = ""
    blocks: int = 0
    snapshot: int | None = None
    known: int = 0
    cached_next: tuple[int, ...] = ()
    prompt_next: tuple[int, ...] = ()


_SHOWN = 8  # tokens behind the place where a prompt leaves what is cached


class PromptCache(Evictable):
    """Holds pages and states of sequences of one model after they have ended, for those to come.

    Whoever changes it holds the engine's lock.
    """

    __slots__ = (
        "_clock", "_context", "_counts", "_key", "_pools", "_recurrent", "_root", "_slots",
        "enabled",
    )  # fmt: skip

    def __init__(
        self, pools: Pools, context: int, recurrent: bool, enabled: bool = True, key: bytes = b""
    ) -> None:
        """context: most tokens of a sequence. key: of what makes other pages of the same tokens."""
        self._pools, self._context, self._recurrent = pools, context, recurrent
        self.enabled, self._key = enabled, key
        self._clock = 0
        self.clear()
        pools.holders.add(self)

    def start(self, tokens: Sequence[int]) -> tuple[Record, Reuse]:
        """A record of the longest cached start of `tokens`, at most all but the last of them."""
        self._clock += 1
        ids = np.array(tokens if self.enabled else [], np.int32)
        way = walk(self._root, ids)
        known = way[-1].stop if way else 0
        length, state = min(known, len(tokens) - 1), None
        if self._recurrent:
            states = states_of(way, length)
            state = Recurrent()
            length = states[-1].place if states else 0
            if states:
                states[-1].used = self._clock
                state = _as_checkpoint(states[-1])
        for step in way:
            step.node.used = self._clock
        pages = Pages.room(self._context, pages_of(way, length))
        record = Record(list(tokens[:length]), length, pages, keys_of(way, length), state)
        reuse = Reuse(
            len(tokens), length, "cache" if length else "", pages.used,
            length if self._recurrent else None, known, self._follows(way),
            tuple(tokens[known : known + _SHOWN]),
        )  # fmt: skip
        return record, reuse

    def resume(self, sequence: Held, same: int, tokens: Sequence[int]) -> Reuse:
        """Make a sequence ready to go on to `tokens`, whose first `same` it has.

        It goes on from what it has or from what is cached, whichever leaves fewer to evaluate, and
        is left with a start of `tokens`, short of the last one.
        """
        own = sequence.record.cut(same)
        found, reuse = self.start(tokens)
        if own.given or found.length <= own.evaluated:
            source = "session" if own.evaluated else ""
            blocks = snapshot = 0
            reuse = reuse._replace(
                cached_tokens=own.evaluated, source=source, blocks=blocks,
                snapshot=snapshot or None,
            )  # fmt: skip
            found = own
        sequence.record = found
        return reuse

    def keep(self, record: Record, ends: bool = False) -> None:
        """What a sequence has evaluated is held here as well; ends: it is closed already.

        Of the states of its past those at message ends, and all of them when it ends.
        """
        if not self.enabled or record.closed or record.given:
            return
        length = record.length
        keys = block_keys(record.keys, self._key, record.tokens, length)
        way = walk_known(self._root, record.tokens, length, keys)
        for step in way:
            step.node.used = self._clock
        at = way[-1].stop if way else 0
        if at < length:
            edge = Edge(
                at, np.array(record.tokens[at:length], np.int32),
                record.pages.held[at // PAGE : -(-length // PAGE)].copy(),
                tuple(keys[at // PAGE : length // PAGE]),
            )  # fmt: skip
            self._grow(way, edge)
        if record.state is not None:
            self._keep_states(record, keys, ends)

    def clear(self) -> None:
        """Hold nothing."""
        self._counts: np.ndarray | None = None
        self._slots: frozenset[int] | None = None
        nothing = np.zeros(0, np.int32)
        self._root = Node(Edge(0, nothing, nothing), 0)

    def close(self) -> None:
        """See Holder."""
        self.clear()
        self.enabled = False

    def held_pages(self) -> np.ndarray:
        """See Holder."""
        return np.flatnonzero(self._counted())

    def held_slots(self) -> frozenset[int]:
        """See Holder."""
        if self._slots is None:
            found = (s.slot for step in nodes(self._root) for s in step.node.edge.states)
            self._slots = frozenset(found)
        return self._slots

    def evict(self, pages: int, slots: int) -> bool:
        """See Evictable."""
        dropped = bool(slots) and self._drop_states(slots)
        return (bool(pages) and self._drop_pages(pages)) or dropped

    def _counted(self) -> np.ndarray:
        """int32 [pages of the pool]: how many edges hold each."""
        if self._counts is None:
            counts = np.zeros(self._pools.pages.count, np.int32)
            for step in nodes(self._root):
                counts[step.node.edge.pages] += 1
            self._counts = counts
        return self._counts

    def _put(
        self, above: Node, token: int, node: Node | None, gone: Iterable[Edge], come: Iterable[Edge]
    ) -> None:
        """Put a node in its place, or take away what is there; which edges go and come with it."""
        counts, self._counts = self._counts, None  # broken off in between, they are counted again
        self._slots = None
        if node is None:
            del above.children[token]
        else:
            above.children[token] = node
        if counts is not None:
            for edge in gone:
                counts[edge.pages] -= 1
            for edge in come:
                counts[edge.pages] += 1
            self._counts = counts

    def _grow(self, way: Sequence[Step], new: Edge) -> None:
        """An edge more, behind the end of a way."""
        token = int(new.tokens[0])
        if not way:
            self._put(self._root, token, Node(new, self._clock), (), (new,))
            return
        above, node, at = way[-1]
        edge, first = node.edge, int(node.edge.tokens[0])
        if at < edge.stop:
            upper, lower = edge.before(at), edge.behind(at)
            children = {
                int(lower.tokens[0]): Node(lower, node.used, node.children),
                token: Node(new, self._clock),
            }
            fork = Node(upper, self._clock, children)
            self._put(above, first, fork, (edge,), (upper, lower, new))
        elif node.children:
            self._put(node, token, Node(new, self._clock), (), (new,))
        else:
            longer = edge.joined(new)
            self._put(above, first, Node(longer, self._clock), (edge,), (longer,))

    def _keep_states(self, record: Record, keys: Sequence[bytes], ends: bool) -> None:
        state, length = record.state, record.length
        assert state is not None, "only recurrent layers have states"
        found = [c for c in state.checkpoints if ends or c.message_end]
        if ends and state.place:
            found.append(Checkpoint(state.place, state.slot, True))
        for checkpoint in found:
            way = walk_known(self._root, record.tokens, min(checkpoint.place, length), keys)
            above, node, at = way[-1]
            if at == checkpoint.place and all(s.place != at for s in node.edge.states):
                edge = node.edge.with_state(State(*checkpoint, self._clock))
                more = Node(edge, node.used, node.children)
                self._put(above, int(edge.tokens[0]), more, (), ())

    def _follows(self, way: Sequence[Step]) -> tuple[int, ...]:
        """Cached tokens behind the end of a way, along what was used last."""
        node, at = (way[-1].node, way[-1].stop) if way else (self._root, 0)
        found = list[int](node.edge.tokens[at - node.edge.start :][:_SHOWN].tolist())
        while len(found) < _SHOWN and node.children:
            node = max(node.children.values(), key=lambda child: child.used)
            found += node.edge.tokens[: _SHOWN - len(found)].tolist()
        return tuple(found)

    def _drop_states(self, wanted: int) -> bool:
        """Let go of the states that are missed least, of those that nobody else holds."""
        pinned = set[int]().union(
            *(h.held_slots() for h in self._pools.holders if not isinstance(h, Evictable))
        )
        found = [
            (state.used, state.place, step, state)
            for step in nodes(self._root)
            for state in step.node.edge.states
            if state.slot not in pinned
        ]
        found.sort(key=lambda each: each[:2])
        for _, _, _, state in found[:wanted]:
            self._drop_state(state)
        return bool(found)

    def _drop_state(self, state: State) -> None:
        for above, node, _ in nodes(self._root):
            if state in node.edge.states:
                left = tuple(s for s in node.edge.states if s is not state)
                less = Node(node.edge._replace(states=left), node.used, node.children)
                self._put(above, int(node.edge.tokens[0]), less, (), ())
                return

    def _drop_pages(self, wanted: int) -> bool:
        """Let go of pages at the ends of leaves, those used longest ago first.

        Of leaves that somebody else goes on from only when there are no others.
        """
        pinned = self._pools.pages.holders(pinned=True) > 0
        freed = self._trim(wanted, pinned, pinned)
        if freed < wanted:
            freed += self._trim(wanted - freed, pinned, np.zeros_like(pinned))
        return freed > 0

    def _trim(self, wanted: int, pinned: np.ndarray, kept: np.ndarray) -> int:
        """How many pages more are free, at least `wanted` if there are as many.

        pinned: those that somebody else holds. kept: those that no leaf is cut behind.
        """
        every = list(nodes(self._root))
        above = {step.node: step.above for step in every}
        order = count()
        leaves = [(s.node.used, next(order), s.node) for s in every if not s.node.children]
        heapq.heapify(leaves)
        freed = 0
        while leaves and freed < wanted and not pinned[self.held_pages()].all():
            _, _, node = heapq.heappop(leaves)
            parent, edge, stop = above[node], node.edge, node.edge.stop
            while stop > edge.start and freed < wanted and not kept[edge.pages[-1]]:
                last, stop = edge.pages[-1], max(edge.start, (stop - 1) // PAGE * PAGE)
                less = edge.before(stop)
                more = Node(less, node.used) if stop > edge.start else None
                self._put(parent, int(edge.tokens[0]), more, (edge,), (less,) if more else ())
                freed += not (self._counted()[last] or pinned[last])
                edge = less
            if stop == edge.start and parent is not self._root and not parent.children:
                heapq.heappush(leaves, (parent.used, next(order), parent))
        return freed


def _as_checkpoint(state: State) -> Recurrent:
    kept = Checkpoint(state.place, state.slot, state.message_end)
    return Recurrent(state.slot, state.place, (kept,))
