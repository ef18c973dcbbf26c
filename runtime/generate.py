"""From tokens to text and back: the generation loop, and chats that keep their session."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from runtime.batch import check_room
from runtime.errors import OptionError
from runtime.session import Session

if TYPE_CHECKING:
    from runtime.model import Model
    from runtime.text.sampling import Sampling, Token


@dataclass(frozen=True)
class Options:
    """What stops a generation; everything else is `Sampling`."""

    max_tokens: int | None = None
    ignore_eos: bool = False


def generate(
    model: Model, prompt: str | Sequence[int], *, session: Session | None = None,
    max_tokens: int | None = None, ignore_eos: bool = False, on_token: Any = None,
    **sampling: Any,
) -> Iterator[str]:  # fmt: skip
    """Yield text that continues `prompt` (raw text, or token ids), piece by piece.

    session: continue this one, and leave it holding prompt and answer; default a fresh one.
    max_tokens: default (or -1) until the context is full. ignore_eos: go on past end tokens.
    on_token: called with each sampled `Token` (id, log-probabilities). Other options are the
    fields of `Sampling`, `stop` among them.
    Raises OptionError for an unknown option, MemoryLimitError for a prompt past the context.
    """
    if max_tokens is not None and max_tokens < -1:
        raise OptionError(f"max_tokens={max_tokens} must be at least 0, or -1 for no limit")
    most = None if max_tokens == -1 else max_tokens
    chosen, options = _sampling(sampling), Options(most, ignore_eos)
    add_special = session is None or not len(session)
    ids = model.tokenizer.encode(prompt, add_special) if isinstance(prompt, str) else list(prompt)
    if not ids:
        raise OptionError("the prompt is empty and the model adds no start token; give some text")
    check_room(0 if session is None else len(session), len(ids), model.context)
    owned = model.session() if session is None else session
    try:
        yield from _run(model, owned, ids, chosen, options, on_token)
    finally:
        if session is None:
            owned.close()


def chat(model: Model, messages: Sequence[dict[str, Any]], **options: Any) -> Iterator[str]:
    """Yield the answer to `messages`, rendered through the model's chat template.

    Options are those of `generate`. With `session=` only tokens after the longest common start
    of what the session holds and the rendered chat are evaluated.
    """
    from runtime.text.chat import ChatTemplate

    template = ChatTemplate.of(model.tokenizer, model.file.metadata)
    ids = template.encode(model.tokenizer, messages)
    session = options.get("session")
    if session is not None:
        ids = reuse(session, ids)
    return generate(model, ids, **options)


def reuse(session: Session, ids: Sequence[int]) -> list[int]:
    """Rewind `session` to the longest common start with `ids`; the ids still to evaluate."""
    same = 0
    while same < min(len(session), len(ids) - 1) and session.tokens[same] == ids[same]:
        same += 1
    session.rewind(len(session) - same)
    return list(ids[same:])


def _run(
    model: Model, session: Session, ids: list[int], sampling: Sampling, options: Options,
    on_token: Any,
) -> Iterator[str]:  # fmt: skip
    from runtime.text.sampling import Sampler
    from runtime.text.stops import StopFilter

    sampler, stops = Sampler(sampling, model.vocab_size), StopFilter(sampling.stop)
    stream, ends = model.tokenizer.stream(), model.tokenizer.end_ids
    for known in (*session.tokens, *ids):
        sampler.accept(known)
    for token in _tokens(model, session, ids, sampler, options.max_tokens):
        if on_token is not None:
            on_token(token)
        if token.id in ends and not options.ignore_eos:
            break
        text = stops.feed(stream.feed(token.id))
        if text:
            yield text
        if stops.stopped:
            return
    tail = stops.feed(stream.flush()) + stops.flush()
    if tail:
        yield tail


def _tokens(
    model: Model, session: Session, ids: list[int], sampler: Any, most: int | None
) -> Iterator[Token]:
    """Sampled tokens; each is evaluated only when the next one is asked for."""
    room = model.context - len(session) - len(ids)
    count = room + 1 if most is None else min(most, room + 1)
    pending = ids
    for _ in range(count):
        logits = session.eval(pending, "last")[0]
        token = sampler.sample(logits)
        sampler.accept(token.id)
        pending = [token.id]
        yield token


def _sampling(given: dict[str, Any]) -> Sampling:
    from runtime.text.sampling import Sampling

    known = [f.name for f in fields(Sampling)]
    unknown = next((name for name in given if name not in known), None)
    if unknown is not None:
        raise OptionError(f"unknown option {unknown!r}; sampling options are {', '.join(known)}")
    if isinstance(given.get("stop"), str):
        given = {**given, "stop": (given["stop"],)}
    return Sampling(**given)
