"""Generation: an answer under way, read piece by piece; it evaluates a token when asked for one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np

from runtime.engine.advance import Piece
from runtime.engine.decoder import Next
from runtime.engine.engine import OnPrompt, checked
from runtime.engine.reuse import Reuse
from runtime.engine.sequence import Sequence as Evaluated
from runtime.errors import Error, OptionError
from runtime.session import Session

if TYPE_CHECKING:
    from runtime.model import Model
    from runtime.speculation.drafter import Drafter
    from runtime.speculation.speculation import Drafts, Speculation
    from runtime.text.answer import Fed
    from runtime.text.sampling import Sampling, Token


class Options(NamedTuple):
    """What a generation was asked for, checked. `max_tokens` None: until the context is full."""

    sampling: Sampling
    max_tokens: int | None = None
    on_token: Callable[[Token], Any] | None = None
    on_prompt: OnPrompt | None = None
    drafters: Callable[[Evaluated], Sequence[Drafter]] | None = None


class Prompt(NamedTuple):
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

        self.prompt_tokens: int = len(prompt.ids)
        """How many tokens are evaluated before the first of the answer; until it has begun, how
        many more than its session has."""
        self.reuse: Reuse | None = None
        """What of the prompt was not evaluated again; None until the answer has begun."""
        # the token after the last place of the context is still known, but cannot be evaluated
        room = model.context - prompt.keep - len(prompt.ids) + 1
        self._answer = Answer(
            model.tokenizer, options.sampling, model.vocab_size, room, options.max_tokens
        )
        self._session, self._owned, self._keep = prompt.session, prompt.owned, prompt.keep
        self._length = len(prompt.session)  # what nobody else may change meanwhile
        self._pending, self._options = prompt.ids, options
        self._speculation: Speculation | None = None
        self._begun = self._over = False
        self._reading = threading.Lock()

    @property
    def reason(self) -> str | None:
        """None until the answer has ended, then "end" (the model said so), "stop" (a stop
        string), "length" (max_tokens) or "context" (the context is full). It stays None where
        the answer was closed early."""
        return self._answer.reason

    @property
    def cached_tokens(self) -> int:
        """How many of the first tokens of the prompt did not have to be evaluated, because its
        session or the cache of prompts had them; 0 until the answer has begun."""
        return 0 if self.reuse is None else self.reuse.cached_tokens

    def explain(self) -> str:
        """Lines that say what of the prompt was not read again, and why not more of it: `reuse` in
        words. The answer is begun for it."""
        self._take_turn()
        try:
            self._begin()
        finally:
            self._reading.release()
        if self.reuse is None:
            return "the answer was closed before it began"
        return self.reuse.explain(self._session.model.tokenizer.decode)

    @property
    def text(self) -> str:
        """The whole answer; what is still to come is generated first."""
        for _ in self:
            pass
        return self._answer.text

    @property
    def tokens(self) -> list[int]:
        """Ids chosen so far, an end token included."""
        return [token.id for token in self._answer.tokens]

    @property
    def logprobs(self) -> list[Token]:
        """With `logprobs=N`: of each token chosen so far its id, its natural log-probability
        (`logprob`) and the N best in its place (`top`); without, an empty list."""
        return [token for token in self._answer.tokens if token.logprob is not None]

    @property
    def speculation(self) -> Drafts | None:
        """What drafts did for it so far: how many were `drafted` and `accepted`, in how many
        `steps` of it; None where there are none (see `spec`)."""
        return None if self._speculation is None else self._speculation.done

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        self._take_turn()
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
        return f"<Generation of {len(self._answer.tokens)} tokens: {state}>"

    def _take_turn(self) -> None:
        """Be the one who reads, until `_reading` is released."""
        if not self._reading.acquire(blocking=False):
            raise OptionError(
                "this answer is being read already, by another thread or around this very call; "
                "read it in one place (close() may be called from anywhere)"
            )

    def _next_piece(self) -> str:
        self._begin()
        while not self._over:
            text = self._advance()
            if text:
                return text
        raise StopIteration

    def _begin(self) -> None:
        """Before the first piece; once."""
        if self._begun or self._over:
            return
        self._check_session()
        engine, sequence = self._session.model._engine, self._session._sequence
        tokens = [*self._session.tokens[: self._keep], *self._pending]
        with engine.alone():
            self.reuse = engine.prompts.resume(sequence, self._keep, tokens)
        self._length = len(self._session)
        self._pending = tokens[self._length :]
        self.prompt_tokens = len(self._pending)
        self._begun = True
        self._answer.begin(tokens)
        if self._options.drafters is not None and not self._over:
            self._speculate(self._options.drafters, tokens)
        self._over = self._answer.reason is not None

    def _speculate(
        self, drafters: Callable[[Evaluated], Sequence[Drafter]], tokens: list[int]
    ) -> None:
        """Have the answer to `tokens` drafted, but where a device chooses what follows."""
        from runtime.speculation.speculation import Speculation

        engine, sequence = self._session.model._engine, self._session._sequence
        if engine.decoder is None or self._answer.choice() is None:
            self._speculation = Speculation(engine, sequence, drafters(sequence), tokens)

    def _first(self) -> str:
        """What the first token completes, if there is one."""
        self._begin()
        return "" if self._over else self._advance()

    def _advance(self) -> str:
        """Evaluate what is pending and choose a token; the text it completes."""
        self._check_session()
        chosen = self._chosen()
        return self._took(self._fed_by(self._evaluated() if chosen is None else chosen))

    def _took(self, fed: Fed) -> str:
        """The text that a token completes; the token is to be evaluated next."""
        token, text, end = fed
        self._pending = [token.id]
        self._over = self._over or end is not None
        if self._speculation is not None:
            self._speculation.chosen(token.id)
        if self._options.on_token is not None:
            self._options.on_token(token)
        if self._speculation is not None and end is not None and not self._owned:
            self._speculation.settle()
        return text

    def _fed_by(self, found: int | np.ndarray) -> Fed:
        """The token that a device chose behind what was pending, or that its logits give."""
        self._length += len(self._pending)
        return self._answer.take(found) if isinstance(found, int) else self._answer.feed(found)

    def _next(self) -> Next | None:
        """What is pending, where a device can choose what follows."""
        choice = self._answer.choice() if self._answer.tokens else None
        if choice is None:
            return None
        (token,) = self._pending
        return Next(self._session._sequence, token, choice, self._answer.choice(1))

    def _chosen(self) -> int | None:
        """The next token, chosen by the device where that can be."""
        decoder = self._session.model._engine.decoder
        wanted = self._next() if decoder is not None else None
        return None if decoder is None or wanted is None else decoder.choose(*wanted)

    def _evaluated(self) -> np.ndarray:
        """The logits after what is pending, float32 [vocabulary]."""
        if not self._answer.tokens:
            return self._session.eval(self._pending, "last", self._options.on_prompt)[0]
        drafted = self._drafted()
        if drafted is not None:
            return drafted
        engine, piece = self._session.model._engine, self._piece()
        row = self._row(piece, *engine.run([piece]))
        if row is None:
            piece = self._piece(alone=True)
            row = self._row(piece, *engine.run([piece]))
        assert row is not None, "a token alone has logits or an error"
        return checked(row)

    def _drafted(self) -> np.ndarray | None:
        """The logits after what is pending where they are known already."""
        return None if self._speculation is None else self._speculation.row()

    def _piece(self, answers: int = 1, alone: bool = False) -> Piece:
        """What is pending, for a step of so many answers, with drafts behind it; alone: without."""
        if alone or self._speculation is None:
            return Piece(self._session._sequence, self._pending)
        return self._speculation.piece(self._pending[0], self._answer.left, answers)

    def _row(self, piece: Piece, found: np.ndarray | Error) -> np.ndarray | Error | None:
        """Of what a step found for it the logits after what is pending, or an error.

        None: it has to be evaluated without drafts.
        """
        if piece.drafted is None:
            return found if isinstance(found, Error) else found[0]
        assert self._speculation is not None
        return self._speculation.first(found)

    def _check_session(self) -> None:
        if len(self._session) != self._length:
            raise OptionError(
                f"the session of this answer has {len(self._session)} tokens and had "
                f"{self._length}: it was used elsewhere meanwhile; ask for the answer again"
            )

    def _give_back(self, last: bool = True) -> None:
        """last: no other answer goes on in the same steps."""
        if self._speculation is not None:
            self._speculation.close()
        if self._owned:
            self._session.close()
        elif last and (decoder := self._session.model._engine.decoder) is not None:
            decoder.end()
