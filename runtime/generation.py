"""Generation: an answer under way, read piece by piece; it evaluates a token when asked for one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from runtime.engine.engine import OnPrompt
from runtime.errors import OptionError
from runtime.session import Session

if TYPE_CHECKING:
    from runtime.model import Model
    from runtime.text.sampling import Sampling, Token


@dataclass(frozen=True)
class Options:
    """What a generation was asked for, checked. `max_tokens` None: until the context is full."""

    sampling: Sampling
    max_tokens: int | None = None
    on_token: Callable[[Token], Any] | None = None
    on_prompt: OnPrompt | None = None


@dataclass(frozen=True)
class Prompt:
    """Tokens to evaluate in a session, after the first `keep` it holds; `owned`: made for this."""

    session: Session
    owned: bool
    keep: int
    ids: list[int]


class Generation:
    """An answer under way: an iterator of its text, made by `model.generate` and `model.chat`.

    Nothing is evaluated before the first piece is asked for. Left early, `close` it (or use
    `with`): a session of its own gives its memory back. An exception ends it too.
    """

    def __init__(self, model: Model, prompt: Prompt, options: Options) -> None:
        from runtime.text.answer import Answer
        from runtime.text.sampling import Sampler

        self.reason: str | None = None
        """None until the answer has ended, then "end" (the model said so), "stop" (a stop
        string), "length" (max_tokens) or "context" (the context is full). It stays None where
        the answer was closed early."""
        self.prompt_tokens: int = len(prompt.ids)
        """How many tokens are evaluated before the first of the answer."""
        # the token after the last place of the context is still known, but cannot be evaluated
        room, most = model.context - prompt.keep - len(prompt.ids) + 1, options.max_tokens
        self._most = room if most is None else min(most, room)
        self._at_most = "context" if most is None or room < most else "length"
        sampling = options.sampling
        # rows of the output matrix past the vocabulary are padding, which has no text
        choices = min(model.vocab_size, model.tokenizer.vocab_size)
        self._sampler = Sampler(sampling, choices, model.tokenizer.token_bytes)
        self._answer = Answer(
            model.tokenizer, self._sampler, sampling.stop, self._most, self._at_most
        )
        self._session, self._owned, self._keep = prompt.session, prompt.owned, prompt.keep
        self._length = len(prompt.session)  # what nobody else may change meanwhile
        self._pending, self._options = prompt.ids, options
        self._tokens: list[Token] = []
        self._pieces: list[str] = []
        self._begun = self._over = False
        self._reading = threading.Lock()

    @property
    def text(self) -> str:
        """The whole answer; what is still to come is generated first."""
        for _ in self:
            pass
        return "".join(self._pieces)

    @property
    def tokens(self) -> list[int]:
        """Ids chosen so far, an end token included."""
        return [token.id for token in self._tokens]

    @property
    def logprobs(self) -> list[Token]:
        """With `logprobs=N`: of each token chosen so far its id, its natural log-probability
        (`logprob`) and the N best in its place (`top`); without, an empty list."""
        return [token for token in self._tokens if token.logprob is not None]

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if not self._reading.acquire(blocking=False):
            raise OptionError(
                "this answer is being read already, by another thread or around this very call; "
                "read it in one place (close() may be called from anywhere)"
            )
        try:
            return self._next_piece()
        except BaseException:  # StopIteration among them
            self._over = True
            raise
        finally:
            self._reading.release()
            if self._over:
                self._give_back()

    def close(self) -> None:
        """End early, from any thread; a session of its own is given back. Twice is once."""
        self._over = True  # who reads just now sees it and gives back after the token under way
        if self._reading.acquire(blocking=False):
            self._reading.release()
            self._give_back()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce_ex__(self, _: object) -> Any:
        raise OptionError(
            "an answer under way holds a session of its model and cannot be copied or pickled; "
            "its .text and .tokens can, and the same seed gives the same answer again"
        )

    def __repr__(self) -> str:
        state = self.reason or ("closed" if self._over else "iterate it, or take .text")
        return f"<Generation of {len(self._tokens)} tokens: {state}>"

    def _next_piece(self) -> str:
        if not (self._begun or self._over):
            self._begin()
        while not self._over:
            text = self._advance()
            if text:
                self._pieces.append(text)
                return text
        raise StopIteration

    def _begin(self) -> None:
        self._check_session()
        self._session.rewind(self._length - self._keep)
        self._length = self._keep
        self._begun = True
        self._sampler.begin([*self._session.tokens, *self._pending])
        if not self._most:
            self._end(self._at_most)

    def _advance(self) -> str:
        """Evaluate what is pending and choose a token; the text it completes."""
        self._check_session()
        on_prompt = None if self._tokens else self._options.on_prompt
        row = self._session.eval(self._pending, "last", on_prompt)[0]
        self._length += len(self._pending)
        token, text, end = self._answer.feed(row)
        self._pending = [token.id]
        self._tokens.append(token)
        if end is not None:
            self._end(end)
        if self._options.on_token is not None:
            self._options.on_token(token)
        return text

    def _end(self, reason: str) -> None:
        self.reason, self._over = reason, True

    def _check_session(self) -> None:
        if len(self._session) != self._length:
            raise OptionError(
                f"the session of this answer has {len(self._session)} tokens and had "
                f"{self._length}: it was used elsewhere meanwhile; ask for the answer again"
            )

    def _give_back(self) -> None:
        if self._owned:
            self._session.close()
