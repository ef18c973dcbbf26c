"""Who holds pages and slots: found by asking those who are alive, never counted.

So nothing is ever given back, and whatever breaks off an operation, before somebody has what it
took, leaves nothing behind.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Set

import numpy as np


class Holder:
    """Somebody who holds pages and slots of a model: a sequence, or a cache of prompts."""

    __slots__ = ("__weakref__",)

    def held_pages(self) -> np.ndarray:
        """int32 pages it holds, each once."""
        raise NotImplementedError

    def held_slots(self) -> Set[int]:
        """Slots of recurrent state it holds."""
        raise NotImplementedError

    def close(self) -> None:
        """Hold nothing any more: the model is closed."""
        raise NotImplementedError


class Evictable(Holder):
    """Somebody who can do without what he holds; what nobody else holds counts as available."""

    __slots__ = ()

    def evict(self, pages: int, slots: int) -> bool:
        """Hold less, so that about so many pages and slots more are free; the least useful first.

        Asked, under the engine's lock, before a reservation fails, and asked again while that
        helps. What others hold as well frees nothing. False: there was nothing to give up.
        """
        raise NotImplementedError

    def let_go(self, slot: int) -> bool:
        """Hold this slot no longer, for the one sequence that holds it as well and goes on from
        it; False: it was not held."""
        return False


class Holders:
    """Those of one model, as long as somebody knows them."""

    def __init__(self) -> None:
        # No `WeakSet`: an interrupt in the Python code that it runs when a member dies would be
        # lost.
        self._members = list[weakref.ref[Holder]]()

    def add(self, member: Holder) -> None:
        """From now on what it says counts."""
        alive = [ref for ref in self._members if ref() is not None]
        self._members = [*alive, weakref.ref(member)]

    def __iter__(self) -> Iterator[Holder]:
        return iter([member for ref in self._members if (member := ref()) is not None])

    def evict(self, pages: int, slots: int) -> bool:
        """Ask everybody who can; whether somebody gave something up."""
        asked = [member.evict(pages, slots) for member in self if isinstance(member, Evictable)]
        return any(asked)
