"""What an answer to messages has to be, and how it is read: tools, `tool_choice`, a grammar."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from runtime.arguments import wrong
from runtime.ops.errors import OptionError, shown
from runtime.text.calls.enforced import enforced
from runtime.text.calls.forms import Form
from runtime.text.calls.reader import Reader
from runtime.text.grammar.asked import Grammar
from runtime.text.tools import tool_parameters, tool_schemas

if TYPE_CHECKING:
    from runtime.text.tokenizer import Tokenizer


class Reading(NamedTuple):
    """How an answer is read: in the form of a template, to a prompt that ends so, with tools."""

    form: Form = Form()
    prompt: str = ""
    tools: Mapping[str, Mapping[str, Any]] = {}

    def reader(self) -> Reader:
        """Reads the answer from its beginning."""
        return self.form.reader(self.prompt, self.tools)

    @property
    def shown(self) -> tuple[str, ...]:
        """Control tokens that have to be seen."""
        return self.form.marks if self.tools else ()


class Choice(NamedTuple):
    """What `tool_choice` says: which tools the model is told of, name -> JSON schema of their
    `parameters`, and those of which it has to call one, or `many`."""

    shown: Sequence[Any] | None
    parameters: Mapping[str, Mapping[str, Any]]
    required: Mapping[str, Mapping[str, Any]]
    many: bool


def chosen_tools(tools: Any, choice: Any) -> Choice:
    """`tool_choice` as it is given. Raises OptionError for what is none, or names no tool."""
    parameters = tool_parameters(tool_schemas(tools))
    if isinstance(choice, Mapping):
        function = choice.get("function", choice)
        choice = function.get("name") if isinstance(function, Mapping) else None
        choice = choice if isinstance(choice, str) else ""
    if choice is None:
        choice = "auto"
    if not isinstance(choice, str) or not choice:
        raise wrong("tool_choice", choice, "'auto', 'none', 'required' or the name of a tool")
    if choice == "auto":
        return Choice(tools, parameters, {}, True)
    if choice == "none":
        return Choice(None, {}, {}, True)
    if not parameters:
        raise OptionError(f"tool_choice={shown(choice)} needs tools")
    if choice == "required":
        return Choice(tools, parameters, parameters, True)
    if choice not in parameters:
        known = ", ".join(parameters)
        raise OptionError(f"tool_choice={shown(choice)} is none of the tools, which are {known}")
    return Choice(tools, parameters, {choice: parameters[choice]}, False)


def wanted(
    tokenizer: Tokenizer, reading: Reading, choice: Choice, content: Grammar | None
) -> Grammar | None:
    """The grammar of a whole answer, None where it may be anything.

    Where a grammar of the content is given and tools are left to the model, either may come.
    """
    if content is not None and choice.required:
        raise OptionError(f"tool_choice and {content.option} cannot go together: give one of them")
    tools = choice.required or (reading.tools if content is not None and reading.form.kind else {})
    if content is None and not tools:
        return None
    opened = reading.form.opened(reading.prompt)
    return enforced(reading.form, tokenizer, opened, content, tools, choice.many)
