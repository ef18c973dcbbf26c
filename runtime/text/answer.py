"""An answer as its tokens are chosen: from a row of logits to a token, its text and the end.

Nothing here knows a model or a session: whoever evaluates tokens feeds the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from runtime.backends.base import Choice
from runtime.text.sampling import Sampler, Sampling, Token
from runtime.text.stops import StopFilter
from runtime.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from runtime.text.grammar.guide import Constraint


class Fed(NamedTuple):
    """What a row of logits became. `text` is what can be shown now and may be empty; `end` is
    None, or why the answer is over: "end", "stop", "length" or "context"."""

    token: Token
    text: str
    end: str | None


class Answer:
    """One answer, as far as it has come: its `tokens`, its `text` (in `pieces`) and why it has
    ended, `reason`.

    It ends at an end token or where its grammar does ("end"), at a stop string ("stop"), after
    `most` tokens ("length"; None: no limit), or after as many as there is `room` for ("context");
    the last of them need not be evaluated.
    """

    def __init__(
        self, tokenizer: Tokenizer, sampling: Sampling, vocabulary: int, room: int,
        most: int | None = None, constraint: Constraint | None = None, shown: Sequence[str] = (),
    ) -> None:  # fmt: skip
        """vocabulary: columns of the logits; those past the tokenizer's are padding. constraint:
        what tokens may be chosen, an end token among them where the text may end. shown: control
        tokens that are part of the text."""
        choices = min(vocabulary, tokenizer.vocab_size)
        self._sampler = Sampler(sampling, choices, tokenizer.token_bytes)
        self._choices, self._ends = choices, tokenizer.end_ids
        self._constraint = constraint
        self._stream, self._stops = tokenizer.stream(shown=shown), StopFilter(sampling.stop)
        self._stoppable = bool(sampling.stop)
        self._left = room if most is None else min(most, room)
        self._at_most = "context" if most is None or room < most else "length"
        self.pieces: list[str] = []
        self.tokens: list[Token] = []
        self.reason: str | None = None

    @property
    def text(self) -> str:
        """What can be shown so far."""
        return "".join(self.pieces)

    @property
    def left(self) -> int:
        """How many tokens it may still have."""
        return self._left

    def begin(self, tokens: Sequence[int]) -> None:
        """It follows these tokens, which repetition penalties look at."""
        self._sampler.begin(tokens)
        if self._left <= 0:
            self.reason = self._at_most

    def feed(self, row: np.ndarray) -> Fed:
        """The token chosen from `row`, float32 [vocabulary], all finite, and what follows."""
        row = row[: self._choices]
        if self._constraint is None:
            return self._fed(self._sampler.sample(row, finite=True))
        return self._fed(self._sampler.sample(self._constraint.masked(row)))

    def choice(self, ahead: int = 0) -> Choice | None:
        """How a device chooses the next token, or the one `ahead` of it.

        None: it cannot, or there is none.
        """
        if self._constraint is not None or ahead >= self._left:
            return None
        return self._sampler.choice(ahead)

    def take(self, token: int) -> Fed:
        """The token that a device chose, and what follows."""
        self._sampler.chosen()
        return self._fed(Token(token))

    def _fed(self, token: Token) -> Fed:
        self._sampler.accept(token.id)
        self._left -= 1
        text, self.reason = self._shown(token.id)
        self.tokens.append(token)
        if text:
            self.pieces.append(text)
        return Fed(token, text, self.reason)

    def _shown(self, token: int) -> tuple[str, str | None]:
        """What can be shown with this token, and why it is the last."""
        if token in self._ends:
            return self._tail(), "end"
        over = self._at_most if self._left <= 0 else None
        if self._constraint is not None:
            self._constraint.accept(token)
            over = "end" if self._constraint.over else over
        text = self._stream.feed(token)
        if self._stoppable:
            text = self._stops.feed(text, self._stream.hidden_text(token))
        if not self._stops.stopped and over is not None:
            text += self._tail()
        return text, "stop" if self._stops.stopped else over

    def _tail(self) -> str:
        """What was held back: it can become no stop string and no character any more."""
        return self._stops.feed(self._stream.flush()) + self._stops.flush()
