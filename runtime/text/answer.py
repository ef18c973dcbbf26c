"""An answer as its tokens are chosen: from a row of logits to a token, its text and the end.

Nothing here knows a model or a session: whoever evaluates tokens feeds the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from runtime.text.sampling import Sampler, Token
from runtime.text.stops import StopFilter
from runtime.text.tokenizer import Tokenizer


class Fed(NamedTuple):
    """What a row of logits became. `text` is what can be shown now and may be empty; `end` is
    None, or why the answer is over: "end", "stop" or the reason given for the limit."""

    token: Token
    text: str
    end: str | None


class Answer:
    """The text of one answer.

    It ends at an end token ("end"), a stop string ("stop") or after `most` tokens (`at_most`).
    """

    def __init__(
        self, tokenizer: Tokenizer, sampler: Sampler, stops: Sequence[str], most: int, at_most: str
    ) -> None:
        self._ends, self._sampler = tokenizer.end_ids, sampler
        self._stream, self._stops = tokenizer.stream(), StopFilter(stops)
        self._stoppable = bool(stops)
        self._left, self._at_most = most, at_most

    def feed(self, row: np.ndarray) -> Fed:
        """The token chosen from `row`, float32 [vocabulary] or longer, and what follows from it.

        Raises BackendError for logits that are not finite.
        """
        token = self._sampler.sample(row[: self._sampler.vocab_size])
        self._sampler.accept(token.id)
        self._left -= 1
        if token.id in self._ends:
            return Fed(token, self._tail(), "end")
        text = self._stream.feed(token.id)
        if self._stoppable:
            text = self._stops.feed(text, self._stream.hidden_text(token.id))
        if self._stops.stopped:
            return Fed(token, text, "stop")
        if self._left <= 0:
            return Fed(token, text + self._tail(), "stop" if self._stops.stopped else self._at_most)
        return Fed(token, text, None)

    def _tail(self) -> str:
        """What was held back: it can become no stop string and no character any more."""
        return self._stops.feed(self._stream.flush()) + self._stops.flush()
