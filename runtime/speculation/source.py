"""One drafter of an answer: when to ask it, for how many drafts, and what was learnt of them."""

from __future__ import annotations

import time
from typing import NamedTuple

from runtime.engine.engine import Engine
from runtime.speculation.acceptance import Acceptance
from runtime.speculation.drafter import Drafter
from runtime.speculation.lengths import Lengths, Room

_PAUSE, _LONGEST_PAUSE = 8, 256  # tokens until drafts that do not pay are tried again
_PROBE = 2  # so many of them
_NEW = 0.1  # how much one measurement changes of what drafts take, and of how many there are
_LEAST = 0.1  # drafts that are made at once, at least, in what one is said to take


class Offer(NamedTuple):
    """`drafts` of a source for the next step, and how many tokens of a second they would make.

    found: the drafts, where they are known; those that are not worth it as well.
    """

    source: Source
    drafts: int
    rate: float
    found: list[int]


class _Watched(NamedTuple):
    """Drafts of the tokens from place `start` on."""

    drafts: list[int]
    start: int
    certainty: int


_NOTHING = _Watched([], 0, 0)


class _Mean:
    """Of what was added last."""

    def __init__(self) -> None:
        self.value, self._count = 0.0, 0

    def add(self, x: float) -> None:
        """One more."""
        self._count += 1
        self.value += max(_NEW, 1 / self._count) * (x - self.value)


class Source:
    """A drafter, for the steps of an engine. `tokens`: of the text, which grows."""

    def __init__(self, engine: Engine, drafter: Drafter, tokens: list[int]) -> None:
        self.drafter, self._tokens = drafter, tokens
        self._vocabulary = engine.vocabulary
        self._acceptance = Acceptance()
        self._lengths = Lengths(engine, self._acceptance)
        self._watched = _NOTHING
        self._begun = False
        self._spent, self._made = _Mean(), _Mean()
        self._waited, self._pause = 0, _PAUSE

    def offer(self, room: Room) -> Offer:
        """What it would draft for the next step, without asking a drafter that takes time."""
        if self._watched.drafts:
            self._learn()
        drafter = self.drafter
        room = room._replace(drafts=min(room.drafts, drafter.most))
        if not drafter.free:
            each = self._spent.value / max(self._made.value, _LEAST)
            n, rate = self._lengths.best(room, drafter.certainty, each)
            return Offer(self, n or self._tried(room), rate, [])
        found = self._proposed(room.drafts)
        if not found:
            return Offer(self, 0, 0.0, found)
        room = room._replace(drafts=len(found))
        n, rate = self._lengths.best(room, drafter.certainty)
        if not self._watched.drafts:
            self._watch(found)
        return Offer(self, n, rate, found)

    def drafts(self, offer: Offer) -> list[int]:
        """For an offer that was taken."""
        if self.drafter.free:
            found = offer.found
        else:
            self._begin()
            begun = time.perf_counter()
            found = self._proposed(offer.drafts)
            self._spent.add(time.perf_counter() - begun)
            self._made.add(len(found))
        if found:
            self._watch(found)
        return found[: offer.drafts]

    def _tried(self, room: Room) -> int:
        """How many drafts to try though they do not pay: now and then a few."""
        self._waited += 1
        if self._waited < self._pause:
            return 0
        self._waited, self._pause = 0, min(2 * self._pause, _LONGEST_PAUSE)
        return min(_PROBE, room.drafts)

    def _begin(self) -> None:
        if not self._begun:
            self._begun = True
            self.drafter.begin(self._tokens)

    def _proposed(self, most: int) -> list[int]:
        """Up to the first that is no token of the model."""
        self._begin()
        drafts = self.drafter.propose(self._tokens, most)[:most]
        if not drafts or (min(drafts) >= 0 and max(drafts) < self._vocabulary):
            return drafts
        fits = [0 <= token < self._vocabulary for token in drafts]
        return drafts[: fits.index(False)]

    def _watch(self, drafts: list[int]) -> None:
        """See what becomes of these."""
        self._known()
        self._watched = _Watched(drafts, len(self._tokens), self.drafter.certainty)

    def _learn(self) -> None:
        """From drafts whose text is known by now, whether they were verified or not."""
        followed, known = self._follow()
        if followed < known or known == len(self._watched.drafts):
            self._known()

    def _known(self) -> None:
        """Learn what is known of them, and watch them no longer."""
        followed, known = self._follow()
        if known:
            self._acceptance.learn(self._watched.certainty, followed, known)
        if followed > 1:
            self._pause = _PAUSE
        self._watched = _NOTHING

    def _follow(self) -> tuple[int, int]:
        """How many of the drafts watched did follow, and of how many that is known."""
        drafts, start, _ = self._watched
        text = self._tokens[start : start + len(drafts)]
        for i, token in enumerate(text):
            if token != drafts[i]:
                return i, i + 1
        return len(text), len(text)
