"""What `generate` and `chat` are asked for, checked before anything is evaluated."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from runtime.arguments import check_function, check_spec, flag, listed, token_ids, whole, wrong
from runtime.constraints import asked, constrained, rendered
from runtime.engine.advance import Piece
from runtime.engine.engine import check_room
from runtime.engine.sequence import Sequence as Evaluated
from runtime.errors import Error, OptionError
from runtime.memory.prefix_edges import alike
from runtime.session import Session
from runtime.writing import Options, Prompt

if TYPE_CHECKING:
    from runtime.model import Model

# keywords of `generate` and `chat` that are no fields of `Sampling`
_OWN = ("max_tokens", "ignore_eos", "on_token", "on_prompt", "spec")


def continuation(
    model: Model, prompt: str | Sequence[int], given: dict[str, Any]
) -> tuple[Prompt, Options]:
    """What `generate` is asked for, checked; without a session where none is given."""
    session = _session(model, given.pop("session"))
    content = asked(given)
    options = constrained(model, _options(model, given), content)
    held = 0 if session is None else len(session)
    if isinstance(prompt, str):
        ids = model.tokenizer.encode(prompt, add_special=not held)
    else:
        ids = token_ids(prompt)
    if not ids:
        raise OptionError("the prompt is empty and the model adds no start token; give some text")
    own = Evaluated(model._engine.empty(), "") if session is None else session._sequence
    model._engine.check(Piece(own, ids))
    return Prompt(session, session is None, held, ids), options


def reply(
    model: Model, messages: str | Sequence[Mapping[str, Any]], given: dict[str, Any]
) -> tuple[Prompt, Options]:
    """What `chat` is asked for, checked; without a session where none is given."""
    session = _session(model, given.pop("session"))
    room = whole("room", given.pop("room"), 0)
    extra = _template_options(given.pop("template_options"))
    extra |= {name: given.pop(name) for name in ("tools", "tool_choice", "template")}
    content = asked(given)
    options = _options(model, given)
    asked_for = _messages(messages)
    text, options = rendered(model, asked_for, options, content, extra)
    ids = model.tokenizer.chat_template.ids(model.tokenizer, text)
    if not ids:
        raise OptionError("the chat template makes an empty prompt of these messages")
    model._engine.check_open()
    keep = 0 if session is None else common_start(session, ids)
    check_room(keep, len(ids) - keep + room, model.context)
    turn = _last_turn(model, asked_for, text, ids, extra) if model._engine.memory.slots else 0
    return Prompt(session, session is None, keep, ids[keep:], turn), options


def _last_turn(
    model: Model, messages: list[Any], text: str, ids: list[int], extra: Mapping[str, Any]
) -> int:
    """At which of `ids` what the last message says begins; 0 where the template does not tell."""
    from runtime.text.calls.wanted import chosen_tools
    from runtime.text.messages import plain_messages

    own, chat = dict(extra), model.tokenizer.chat_template
    *before, last = plain_messages(messages)
    own["tools"] = chosen_tools(own["tools"], own.pop("tool_choice")).shown
    try:
        other = chat.render([*before, {**last, "content": "\x00"}], **own)
    except Error:  # a template that wants other content there
        return 0
    start = chat.ids(model.tokenizer, text[: alike(text, other)])
    return alike(start, ids)


def common_start(session: Session, ids: Sequence[int]) -> int:
    """How many tokens of `session` begin `ids`; at least one of `ids` is left to evaluate."""
    return min(alike(session.tokens, ids), len(ids) - 1)


def _messages(given: Any) -> list[Any]:
    """Messages as a list; what one of them may be the template says."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    example = '[{"role": "user", "content": "Hi"}]'
    return listed("messages", given, f"the text of one message, or a list such as {example}")


def _template_options(given: Any) -> dict[str, Any]:
    """What a template is given besides messages, tools and its own choice."""
    if given is None:
        return {}
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise wrong("template_options", given, "a mapping of names to values, or None")
    taken = next((n for n in given if n in ("messages", "tools", "template")), None)
    if taken is not None:
        raise OptionError(f"template_options cannot hold {taken!r}: it is a keyword of chat itself")
    return dict(given)


def _session(model: Model, given: Any) -> Session | None:
    """The session to continue, if there is one and this model can."""
    if given is None:
        return None
    if not isinstance(given, Session):
        raise wrong("session", given, "a session made by model.session(), or None")
    if given.model is not model:
        raise OptionError("a session can only be continued by the model that made it")
    given._open()
    return given


def _options(model: Model, given: dict[str, Any]) -> Options:
    """Checked options; OptionError names what cannot be used."""
    from runtime.speculation.choice import drafters
    from runtime.text.defaults import file_defaults
    from runtime.text.samplers.chain import check_used
    from runtime.text.sampling import Sampling

    if not model.tokenizer.has_text:
        raise OptionError(
            f"{model.file.path}: the file has no vocabulary, so there is no text to generate; "
            "model.eval(ids) gives logits"
        )
    own = {name: given.pop(name) for name in _OWN}
    most = own["max_tokens"]
    if most is not None:
        most = whole("max_tokens", most, -1, ", or None or -1 for no limit")
    spec = model.spec if own["spec"] is None else check_spec(own["spec"])
    check_function("on_token", own["on_token"], "one token")
    check_function("on_prompt", own["on_prompt"], "(done, total)")
    chosen = {name: value for name, value in given.items() if value is not None}
    sampling = Sampling(**file_defaults(model.file.metadata, chosen) | chosen)
    check_used(sampling, chosen)
    unwanted = set(model.tokenizer.suppressed)
    if flag("ignore_eos", own["ignore_eos"]):
        unwanted |= model.tokenizer.end_ids
    if unwanted:
        forbidden = dict.fromkeys((i for i in unwanted if i < model.vocab_size), -math.inf)
        sampling = replace(sampling, logit_bias={**sampling.logit_bias, **forbidden})
    limit = None if most in (None, -1) else most
    return Options(sampling, limit, own["on_token"], own["on_prompt"], drafters(model, spec))
