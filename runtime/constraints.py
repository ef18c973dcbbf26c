"""What holds an answer: a grammar of its own, or a tool that has to be called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.model import Model
    from runtime.text.calls.wanted import Reading
    from runtime.text.grammar.asked import Grammar
    from runtime.writing import Options


def asked(given: dict[str, Any]) -> Grammar | None:
    """The grammar that is asked for, whose options are taken out of `given`."""
    from runtime.text.grammar.asked import OPTIONS, asked_grammar

    return asked_grammar({name: given.pop(name) for name in OPTIONS})


def constrained(
    model: Model, options: Options, grammar: Grammar | None, reading: Reading | None = None
) -> Options:
    """Options of an answer that is a text of a grammar, if there is one."""
    options = options._replace(reading=reading)
    if grammar is None:
        return options
    from runtime.speculation.forced import with_forced

    constraint = model.tokenizer.guide.constraint(grammar)
    drafters = with_forced(constraint, options.drafters)
    return options._replace(constraint=constraint, drafters=drafters)


def rendered(
    model: Model, messages: list[Any], options: Options, content: Grammar | None,
    given: Mapping[str, Any],
) -> tuple[str, Options]:  # fmt: skip
    """The prompt for a chat, and its options with what tools and a grammar make of the answer.

    given: `tools`, `tool_choice` and what the template takes.
    """
    from runtime.text.calls.wanted import Reading, chosen_tools, wanted

    own = dict(given)
    choice = chosen_tools(own["tools"], own.pop("tool_choice"))
    chat = model.tokenizer.chat_template
    text = chat.render(messages, **{**own, "tools": choice.shown})
    form = chat.form(own["template"], bool(choice.parameters))
    reading = Reading(form, text, choice.parameters)
    return text, constrained(
        model, options, wanted(model.tokenizer, reading, choice, content), reading
    )
