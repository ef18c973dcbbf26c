"""Writing: an answer as it is written, token by token; the one place where answers go on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from runtime.engine.advance import Piece
from runtime.engine.decoder import Next
from runtime.engine.engine import Engine, OnPrompt
from runtime.engine.sequence import Sequence as Evaluated
from runtime.engine.task import Task
from runtime.errors import Error, OptionError
from runtime.session import Session

if TYPE_CHECKING:
    from runtime.engine.reuse import Reuse
    from runtime.model import Model
    from runtime.speculation.drafter import Drafter
    from runtime.speculation.speculation import Drafts, Speculation
    from runtime.text.answer import Fed
    from runtime.text.calls.reader import Reader
    from runtime.text.calls.wanted import Reading
    from runtime.text.grammar.guide import Constraint
    from runtime.text.sampling import Sampling, Token


class Options(NamedTuple):
    """What an answer was asked for, checked. `max_tokens` None: until the context is full.

    constraint: what tokens may be chosen, of this answer alone; reading: how it is read.
    """

    sampling: Sampling
    max_tokens: int | None = None
    on_token: Callable[[Token], Any] | None = None
    on_prompt: OnPrompt | None = None
    drafters: Callable[[Evaluated], Sequence[Drafter]] | None = None
    constraint: Constraint | None = None
    reading: Reading | None = None

    def reader(self) -> Reader:
        """Reads the answer from its beginning."""
        from runtime.text.calls.wanted import Reading

        return (self.reading or Reading()).reader()

    def message(self, text: str) -> dict[str, Any]:
        """An answer of this text as a message."""
        reader = self.reader()
        reader.feed(text)
        reader.close()
        return reader.message


class Prompt(NamedTuple):
    """Tokens to evaluate after the first `keep` of a session; `owned`: made for this.

    session: None where one is made when there is memory for it. turn: at which token of all of
    them what the last message says begins, 0 if unknown.
    """

    session: Session | None
    owned: bool
    keep: int
    ids: list[int]
    turn: int = 0


class Writing(Task):
    """What an answer is evaluated in, and what has become of it.

    `answer` has all that was chosen, `fed` what nobody was told of yet.
    """

    __slots__ = (
        "_engine", "_keep", "answer", "begun", "fed", "options", "owned", "prompt_tokens", "reuse",
        "session", "speculation", "turn",
    )  # fmt: skip

    def __init__(self, model: Model, prompt: Prompt, options: Options) -> None:
        from runtime.text.answer import Answer

        session = prompt.session
        own = None if session is None else session._sequence
        super().__init__(own, prompt.ids, options.on_prompt)
        # the token after the last place of the context is still known, but cannot be evaluated
        room = model.context - prompt.keep - len(prompt.ids) + 1
        shown = () if options.reading is None else options.reading.shown
        self.answer = Answer(
            model.tokenizer, options.sampling, model.vocab_size, room, options.max_tokens,
            options.constraint, shown,
        )  # fmt: skip
        self._engine: Engine = model._engine
        self.session, self.owned, self._keep = session, prompt.owned, prompt.keep
        self.turn = prompt.turn
        self.options = options
        self.speculation: Speculation | None = None
        self.fed: deque[Fed] = deque()
        self.begun, self.prompt_tokens = False, prompt.keep + len(prompt.ids)
        self.reuse: Reuse | None = None

    def begin(self) -> None:
        """Before its first step; once."""
        if self.begun or self.over:
            return
        self.check()
        tokens = self._enter()
        self.begun = True
        self.answer.begin(tokens)
        self._speculate(tokens)
        self.over = self.answer.reason is not None

    def _enter(self) -> list[int]:
        """Its session is left with what comes before `pending`; all tokens up to its end."""
        assert self.session is not None, "who begins has a session"
        assert self.sequence is not None
        tokens = [*self.session.tokens[: self._keep], *self.pending]
        with self._engine.alone():
            reuse = self._engine.prompts.resume(self.sequence, self._keep, tokens, self.turn)
        self.reuse = self.reuse or reuse
        self.length = self.sequence.record.length
        self.pending = tokens[self.length :]
        self.read, self.total, self.said = 0, len(self.pending), -1
        return tokens

    def _speculate(self, tokens: list[int]) -> None:
        """Have the answer to `tokens` drafted, but where a device chooses what follows."""
        make, engine, own = self.options.drafters, self._engine, self.sequence
        if make is None or own is None or self.over:
            return
        if engine.decoder is None or self.answer.choice() is None:
            from runtime.speculation.speculation import Speculation

            self.speculation = Speculation(engine, own, make(own), tokens)

    @property
    def drafts(self) -> Drafts | None:
        """What drafts did for it so far."""
        return None if self.speculation is None else self.speculation.done

    def next(self) -> Next | None:
        """See Task."""
        choice = self.answer.choice() if self.answer.tokens else None
        if choice is None or self.sequence is None:
            return None
        (token,) = self.pending
        return Next(self.sequence, token, choice, self.answer.choice(1))

    def known(self) -> np.ndarray | None:
        """See Task."""
        return None if self.speculation is None else self.speculation.row()

    def piece(self, answers: int, alone: bool) -> Piece:
        """See Task."""
        if alone or self.speculation is None:
            return super().piece(answers, alone)
        return self.speculation.piece(self.pending[0], self.answer.left, answers)

    def row(self, piece: Piece, found: np.ndarray | Error) -> np.ndarray | Error | None:
        """See Task."""
        if piece.drafted is None:
            return super().row(piece, found)
        assert self.speculation is not None
        return self.speculation.first(found)

    def take(self, found: np.ndarray | int) -> None:
        """See Task."""
        fed = self.answer.take(found) if isinstance(found, int) else self.answer.feed(found)
        self.pending = [fed.token.id]
        if self.speculation is not None:
            self.speculation.chosen(fed.token.id)
        self.fed.append(fed)
        self.over = self.over or fed.end is not None
        self.asked = False

    def tell(self) -> str:
        """Tell who wants to know of one token more; the text that it completes, if any."""
        if not self.fed:
            return ""
        token, text, end = self.fed.popleft()
        if self.options.on_token is not None:
            self.options.on_token(token)
        if self.speculation is not None and end is not None and not self.owned:
            self.speculation.settle()
        return text

    def check(self) -> None:
        """OptionError where somebody else has changed its session."""
        if self.sequence is None or self.sequence.record.length != self.length:
            raise self.moved()

    def moved(self) -> OptionError:
        """See Task."""
        have = 0 if self.sequence is None else self.sequence.record.length
        return OptionError(
            f"the session of this answer has {have} tokens and had "
            f"{self.length}: it was used elsewhere meanwhile; ask for the answer again"
        )

    def give_back(self, last: bool = True) -> None:
        """It is over. last: no other answer goes on in the same steps."""
        if self.speculation is not None:
            self.speculation.close()
        if self.owned and self.session is not None:
            self.session.close()
            return
        self._undo()
        if last and self._engine.decoder is not None:
            self._engine.decoder.end()

    def _undo(self) -> None:
        """A session whose prompt was left half way is as it was before it."""
        if self.answer.tokens or not self.read or self.sequence is None:
            return
        with self._engine.alone():
            own = self.sequence
            if own.record.length == self.length and not own.record.closed:
                own.record = own.record.cut(min(self._keep, self.length))


class Written:
    """What can be seen of an answer, whoever has it go on."""

    def __init__(self, model: Model, writing: Writing) -> None:
        self._model, self._writing = model, writing

    @property
    def prompt_tokens(self) -> int:
        """How many tokens come before the first of the answer: those that its session had, those
        that were found in the cache (`cached_tokens` are both) and those that are evaluated."""
        return self._writing.prompt_tokens

    @property
    def cached_tokens(self) -> int:
        """How many of the first tokens of the prompt did not have to be evaluated, because its
        session or the cache of prompts had them; 0 until the answer has begun."""
        return 0 if self.reuse is None else self.reuse.cached_tokens

    @property
    def reuse(self) -> Reuse | None:
        """What of the prompt was not evaluated again; None until the answer has begun."""
        return self._writing.reuse

    @property
    def tokens(self) -> list[int]:
        """Ids chosen so far, an end token included."""
        return [token.id for token in self._writing.answer.tokens]

    @property
    def logprobs(self) -> list[Token]:
        """With `logprobs=N`: of each token chosen so far its id, its natural log-probability
        (`logprob`) and the N best in its place (`top`); without, an empty list."""
        return [token for token in self._writing.answer.tokens if token.logprob is not None]

    @property
    def speculation(self) -> Drafts | None:
        """What drafts did for it so far: how many were `drafted` and `accepted`, in how many
        `steps` of it; None where there are none (see `spec`)."""
        return self._writing.drafts

    def reader(self) -> Reader:
        """What takes the pieces of this answer apart as they come, into content, reasoning and
        parts of calls: see `runtime.text.calls.reader.Reader`."""
        return self._writing.options.reader()
