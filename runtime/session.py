"""Session: one sequence of tokens and its place in the KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from runtime.errors import OptionError
from runtime.memory.pages import BlockTable
from runtime.memory.slots import NONE

if TYPE_CHECKING:
    from runtime.model import Model


class Session:
    """Tokens already evaluated, in order. Made by `model.session()`, continued by `eval`.

    Sessions of one model share its weights and its pool of cache pages; `fork` shares pages too.
    """

    def __init__(
        self, model: Model, table: BlockTable, tokens: Sequence[int] = (), slot: int = NONE
    ) -> None:
        self._closed = True  # until everything is set: __del__ may come at any time
        self.model = model
        self.tokens: list[int] = list(tokens)
        self._table = table
        self.slot = slot  # of recurrent state after `tokens`
        self._closed = False

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def table(self) -> BlockTable:
        """Pages of this sequence; OptionError once the session is closed."""
        if self._closed:
            raise OptionError("this session is closed; make a new one with model.session()")
        return self._table

    def eval(self, ids: Sequence[int], logits: str = "all") -> np.ndarray:
        """Evaluate `ids` after what is there; float32 [len(ids), vocabulary] of the new tokens.

        logits: "all" rows, "last" for [1, vocabulary], "none" for [0, vocabulary].
        """
        return self.model.step([(self, ids)], logits=logits)[0]

    def fork(self) -> Session:
        """A second session that continues from here; pages are shared until one writes."""
        slot = self.model.slots.share(self.slot)
        return Session(self.model, self.table.fork(), self.tokens, slot)

    def rewind(self, n: int) -> None:
        """Drop the last n tokens; OptionError when there are fewer."""
        if not 0 <= n <= len(self.tokens):
            raise OptionError(f"cannot rewind {n} tokens of a session of {len(self.tokens)}")
        if n:
            del self.tokens[-n:]
            self.table.truncate(len(self.tokens))

    def close(self) -> None:
        """Give its pages back; the session cannot be used afterwards."""
        if not self._closed:
            self._table.truncate(0)
            self.model.slots.release(self.slot)
            self._closed = True

    def __repr__(self) -> str:
        state = ", closed" if self._closed else ""
        return f"<Session {len(self.tokens)} of {self.model.context} tokens{state}>"

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            self.close()
