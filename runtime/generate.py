"""From tokens to text and back: the generation loop, and chats that keep their session."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral
from typing import TYPE_CHECKING, Any

from runtime.batch import check, check_room, token_ids
from runtime.errors import OptionError
from runtime.session import Session

if TYPE_CHECKING:
    from runtime.model import Model
    from runtime.text.sampling import Sampler, Sampling, Token

# options of a generation beside the fields of `Sampling`, as `_options` takes them
_OWN = ("max_tokens", "ignore_eos", "on_token")


def generate(
    model: Model, prompt: str | Sequence[int], *, session: Session | None = None, **options: Any
) -> Generation:
    """The text that continues `prompt` (raw text, or token ids), to be iterated piece by piece.

    session: continue this one, and leave it holding prompt and answer; default a fresh one.
    Options: max_tokens (default or -1: until the context is full); ignore_eos (end tokens are
    never chosen); on_token, called with each sampled `Token` (id, log-probabilities); and the
    fields of `Sampling`, `stop` among them.
    Raises, when called and not while iterating, OptionError for an option or token that cannot
    be used, and MemoryLimitError for a prompt past the context.
    """
    chosen = _options(model, options)
    owned = model.session() if session is None else session
    if isinstance(prompt, str):
        ids = model.tokenizer.encode(prompt, add_special=not len(owned))
    else:
        ids = token_ids(prompt)
    if not ids:
        raise OptionError("the prompt is empty and the model adds no start token; give some text")
    check([(owned, ids)], "last", model.vocab_size, model.context)
    return Generation(model, owned, session is None, len(owned), ids, chosen)


def chat(
    model: Model, messages: Sequence[dict[str, Any]], *, session: Session | None = None,
    room: int = 0, **options: Any,
) -> Generation:  # fmt: skip
    """The answer to `messages`, rendered through the model's chat template; as `generate`.

    With `session` only tokens after the longest common start of what the session holds and the
    rendered chat are evaluated; it is rewound to there when iteration begins. room: tokens of
    context that have to be left for the answer, else MemoryLimitError.
    """
    from runtime.text.chat import ChatTemplate

    chosen = _options(model, options)
    template = ChatTemplate.of(model.tokenizer, model.file.metadata)
    ids = template.encode(model.tokenizer, messages)
    if not ids:
        raise OptionError("the chat template makes an empty prompt of these messages")
    owned = model.session() if session is None else session
    keep = common_start(owned, ids)
    check_room(keep, len(ids) - keep + room, model.context)
    return Generation(model, owned, session is None, keep, ids[keep:], chosen)


def common_start(session: Session, ids: Sequence[int]) -> int:
    """How many tokens of `session` begin `ids`; at least one of `ids` is left to evaluate."""
    same = 0
    while same < min(len(session), len(ids) - 1) and session.tokens[same] == ids[same]:
        same += 1
    return same


@dataclass(frozen=True)
class _Options:
    """What a generation was asked for, checked."""

    sampling: Sampling
    max_tokens: int | None
    on_token: Callable[[Token], Any] | None


class Generation:
    """An answer under way: an iterator of its text.

    `reason` is None until it has ended, then "end" (the model said so), "stop" (a stop string),
    "length" (max_tokens) or "context" (the context is full). `prompt_tokens`: how many tokens
    are evaluated before the first of the answer.
    """

    def __init__(
        self, model: Model, session: Session, owned: bool, keep: int, ids: list[int],
        options: _Options,
    ) -> None:  # fmt: skip
        from runtime.text.sampling import Sampler

        self.reason: str | None = None
        self.prompt_tokens = len(ids)
        self._model, self._session, self._owned = model, session, owned
        self._keep, self._ids, self._options = keep, ids, options
        # rows of the output matrix past the vocabulary are padding, which has no text
        self._choices = min(model.vocab_size, model.tokenizer.vocab_size)
        self._sampler: Sampler = Sampler(options.sampling, self._choices)
        self._pieces = self._run()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """End early; a session of its own is given back."""
        self._pieces.close()
        if self._owned:
            self._session.close()

    def _run(self) -> Generator[str, None, None]:
        try:
            yield from self._text()
        finally:
            if self._owned:
                self._session.close()

    def _text(self) -> Iterator[str]:
        from runtime.text.stops import StopFilter

        tokenizer, on_token = self._model.tokenizer, self._options.on_token
        stops, stream = StopFilter(self._options.sampling.stop), tokenizer.stream()
        for token in self._tokens():
            if on_token is not None:
                on_token(token)
            if token.id in tokenizer.end_ids:
                self.reason = "end"
                break
            text = stops.feed(stream.feed(token.id), stream.hidden_text(token.id))
            if stops.stopped:
                self.reason = "stop"
            if text:
                yield text
            if stops.stopped:
                return
        tail = stops.feed(stream.flush()) + stops.flush()
        if tail:
            yield tail

    def _tokens(self) -> Iterator[Token]:
        """Sampled tokens; each is evaluated only when the next one is asked for."""
        session, sampler, most = self._session, self._sampler, self._options.max_tokens
        session.rewind(len(session) - self._keep)
        for known in (*session.tokens, *self._ids):
            sampler.accept(known)
        # the token after the last place of the context is still known, but cannot be evaluated
        room = self._model.context - self._keep - len(self._ids) + 1
        pending = self._ids
        for _ in range(room if most is None else min(most, room)):
            logits = session.eval(pending, "last")[0, : self._choices]
            token = sampler.sample(logits)
            sampler.accept(token.id)
            pending = [token.id]
            yield token
        self.reason = "context" if most is None or room < most else "length"


def _options(model: Model, given: dict[str, Any]) -> _Options:
    """Checked options; OptionError names what is unknown or cannot be used."""
    from runtime.text.sampling import Sampling

    if not model.tokenizer.has_text:
        raise OptionError(
            f"{model.file.path}: the file has no vocabulary, so there is no text to generate; "
            "model.eval(ids) gives logits"
        )
    own = {name: given[name] for name in _OWN if name in given}
    rest = {name: value for name, value in given.items() if name not in _OWN}
    known = [f.name for f in fields(Sampling)]
    unknown = next((name for name in rest if name not in known), None)
    if unknown is not None:
        names = ", ".join((*_OWN, *known))
        raise OptionError(f"unknown option {unknown!r}; options are {names}")
    most, on_token = own.get("max_tokens"), own.get("on_token")
    if most is not None and (not isinstance(most, Integral) or isinstance(most, bool) or most < -1):
        raise OptionError(
            f"max_tokens={most!r} must be a whole number of at least 0, or -1 for no limit"
        )
    if on_token is not None and not callable(on_token):
        raise OptionError(f"on_token={on_token!r} must be a function of one token")
    sampling = Sampling(**rest)
    unwanted = set(model.tokenizer.suppressed)
    if own.get("ignore_eos"):
        unwanted |= model.tokenizer.end_ids
    if unwanted:
        forbidden = dict.fromkeys((i for i in unwanted if i < model.vocab_size), -math.inf)
        sampling = replace(sampling, logit_bias={**sampling.logit_bias, **forbidden})
    return _Options(sampling, None if most in (None, -1) else int(most), on_token)
