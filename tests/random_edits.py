"""Random edits of conversations on a model with a cache of prompts, beside one without."""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable

import numpy as np

from runtime.engine.advance import Piece
from runtime.engine.prompts import PromptCache
from runtime.errors import MemoryLimitError
from runtime.memory.prefix_edges import block_keys
from runtime.memory.prefix_tree import Node
from runtime.model import Model
from runtime.ops import PAGE
from runtime.session import Session

MOST = 200  # tokens of a conversation


def check(cache: PromptCache) -> None:
    """What must be true of a tree whatever was done."""
    tree = cache.tree
    counted, slots = np.zeros(cache._pools.pages.count, np.int32), list[int]()
    starts: dict[Node, tuple[int, list[int]]] = {tree.root: (0, [])}
    for above, node, stop in tree:
        edge = node.edge
        at, before = starts[above]
        tokens = [*before, *edge.tokens.tolist()]
        assert edge.start == at and len(edge.tokens) and above.children[tokens[at]] is node
        blocks = range(edge.start // PAGE, -(-stop // PAGE))
        assert len(edge.pages) == len(blocks) == len(set(edge.pages.tolist()))
        keys = block_keys([], cache.key, tokens, stop)
        assert list(edge.keys) == keys[edge.start // PAGE :]
        places = [state.place for state in edge.states]
        assert places == sorted(set(places)) and all(edge.start < p <= stop for p in places)
        counted[edge.pages] += 1
        slots += [state.slot for state in edge.states]
        starts[node] = stop, tokens
    assert (counted == tree.counts).all() and len(slots) == len(set(slots))
    assert (np.flatnonzero(counted) == cache.held_pages()).all()
    assert set(slots) == cache.held_slots()


class Edits:
    """Conversations, each a list of tokens and perhaps a session that has evaluated them."""

    def __init__(self, model: Model, cold: Model, seed: int, trees: bool = True) -> None:
        """trees: whether the tree is looked at after each edit, besides logits."""
        self.trees, conversations = trees, 8
        self.model, self.cold, self.rng = model, cold, random.Random(seed)
        self.engine = model._engine
        self.tokens = [self._new(self.rng.randint(1, 40)) for _ in range(conversations)]
        self.sessions: list[Session | None] = [None] * conversations
        self.done, self.cached, self.evaluated = Counter[str](), 0, 0
        self.past = deque[list[int]](maxlen=20)
        self._right: dict[tuple[int, ...], np.ndarray] = {}

    def run(self, steps: int) -> None:
        """So many edits, each of a random conversation."""
        kinds: list[Callable[[int], None]] = [
            self.ask, self.ask, self.append, self.append, self.branch, self.edit, self.truncate,
            self.leave, self.together, self.fork, self.go_back, self.evict, self.decode,
            self.back, self.back,
        ]  # fmt: skip
        for _ in range(steps):
            kind, n = self.rng.choice(kinds), self.rng.randrange(len(self.tokens))
            self.past.append(self.tokens[n])
            kind(n)
            self.done[kind.__name__] += 1
            if self.trees:
                check(self.engine.prompts)
        for n in range(len(self.sessions)):
            self.leave(n)
        pools = self.engine.pools
        assert pools.pages.available == pools.pages.count
        assert pools.slots.available == pools.slots.count

    def ask(self, n: int) -> None:
        """The next token of a conversation, from what is cached of it, in pieces."""
        self.leave(n)
        session = self.sessions[n] = self._begun(self.tokens[n])
        self._evaluate(n, self.tokens[n][len(session) :])

    def append(self, n: int) -> None:
        new = self._new(self.rng.randint(1, 40))[: MOST - len(self.tokens[n])]
        self.tokens[n] = [*self.tokens[n], *new]
        if new and self.sessions[n] is not None:
            self._evaluate(n, new)

    def decode(self, n: int) -> None:
        """Token by token."""
        for _ in range(self.rng.randint(1, 40)):
            if self.sessions[n] is not None and len(self.tokens[n]) < MOST:
                new = self._new(1)
                self.tokens[n] = [*self.tokens[n], *new]
                self._evaluate(n, new)

    def branch(self, n: int) -> None:
        other = self.tokens[self.rng.randrange(len(self.tokens))]
        self.leave(n)
        self.tokens[n] = [*other[: self.rng.randint(1, len(other))], *self._new(1)]

    def edit(self, n: int) -> None:
        """Another token in the middle."""
        tokens, at = list(self.tokens[n]), self.rng.randrange(len(self.tokens[n]))
        tokens[at] = self._new(1)[0]
        self._resumed(n, tokens, at)

    def truncate(self, n: int) -> None:
        tokens = self.tokens[n][: self.rng.randint(1, len(self.tokens[n]))]
        self._resumed(n, tokens, len(tokens) - 1)

    def go_back(self, n: int) -> None:
        """A session rewinds and goes on in the same way or another."""
        if (session := self.sessions[n]) is not None and len(session) > 1:
            session.rewind(self.rng.randint(1, len(session) - 1))
            new = self._new(self.rng.randint(1, 5))
            if self.rng.random() < 0.5:
                new = self.tokens[n][len(session) :][: len(new)]
            self.tokens[n] = [*session.tokens, *new]
            self._evaluate(n, new)

    def fork(self, n: int) -> None:
        other = self.rng.randrange(len(self.tokens))
        if (session := self.sessions[n]) is not None and other != n:
            self.leave(other)
            self.sessions[other], self.tokens[other] = session.fork(), list(self.tokens[n])

    def back(self, n: int) -> None:
        """What a conversation was some edits ago is asked again."""
        self.leave(n)
        self.tokens[n] = self.rng.choice(self.past)
        self.ask(n)

    def leave(self, n: int) -> None:
        """The session of a conversation ends."""
        session, self.sessions[n] = self.sessions[n], None
        if session is not None:
            session.close()

    def evict(self, n: int) -> None:
        with self.engine.alone():
            self.engine.prompts.evict(self.rng.randint(0, 4), self.rng.randint(0, 2))

    def together(self, n: int) -> None:
        """A token more of several in one step."""
        some = [n for n, s in enumerate(self.sessions) if s and len(s) < MOST]
        new = [self._new(self.rng.choice((1, 1, 2))) for _ in some]
        sessions = [s for n in some if (s := self.sessions[n]) is not None]
        pieces = [Piece(s._sequence, ids) for s, ids in zip(sessions, new, strict=True)]
        for n, ids, rows in zip(some, new, self.engine.run(pieces), strict=True):
            if isinstance(rows, np.ndarray):
                self.tokens[n] = [*self.tokens[n], *ids]
                self._compare(rows[-1:], self.tokens[n])
            else:
                assert isinstance(rows, MemoryLimitError)

    def _new(self, n: int) -> list[int]:
        """Few kinds of tokens, so that sequences often have a start in common."""
        return self.rng.choices(range(3), k=n)

    def _begun(self, tokens: list[int]) -> Session:
        with self.engine.alone():
            record, reuse = self.engine.prompts.start(tokens)
            self.cached += reuse.cached_tokens
            return Session(self.model, record)

    def _resumed(self, n: int, tokens: list[int], same: int) -> None:
        """A conversation becomes `tokens`, of which its session has the first `same`."""
        self.tokens[n] = tokens
        if (session := self.sessions[n]) is None:
            return self.ask(n)
        with self.engine.alone():
            same = min(same, len(session), len(tokens) - 1)
            reuse = self.engine.prompts.resume(session._sequence, same, tokens)
            self.cached += reuse.cached_tokens
        self._evaluate(n, tokens[len(session) :])

    def _evaluate(self, n: int, new: list[int]) -> None:
        """In one piece or several; where there is no memory, the session is left."""
        session, at = self.sessions[n], 0
        assert session is not None
        try:
            while at < len(new):
                size = self.rng.choice((len(new), self.rng.randint(1, len(new))))
                rows = session.eval(new[at : at + size])
                self._compare(rows, session.tokens)
                at += size
                self.evaluated += len(rows)
        except MemoryLimitError:
            self.leave(n)
            for other in range(len(self.sessions)):
                if self.rng.random() < 0.5:
                    self.leave(other)

    def _compare(self, rows: np.ndarray, tokens: list[int]) -> None:
        key = tuple(tokens)
        if key not in self._right:
            if len(self._right) > 2000:
                self._right.clear()
            self._right[key] = self.cold.eval(tokens)
        np.testing.assert_array_equal(rows, self._right[key][len(tokens) - len(rows) :])
