"""Chat templates: a list of messages to the prompt a model was trained on.

A file may have several templates. The one called "default" is used, or "tool_use" where tools
are given and there is such a one.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from runtime.arguments import flag, wrong
from runtime.ops.errors import OptionError, TextError, shown
from runtime.text.messages import Message, no_text, plain, plain_messages, readings, tool_names
from runtime.text.tools import tool_schemas

if TYPE_CHECKING:
    from runtime.text.calls.forms import Form
    from runtime.text.sandbox import Template
    from runtime.text.tokenizer import Tokenizer

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + (message['content'] or '') + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""The template of files that have none: ChatML, which most instruction models understand."""

_KEY = "tokenizer.chat_template"
_DEFAULT, _TOOLS = "default", "tool_use"
# Names that templates use without asking whether they are there.
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


class ChatTemplate:
    """The chat templates of a model.

    `Tokenizer.chat_template` is that of a file; `render` gives text, `encode` gives ids.
    `sources`: name -> text of the templates. `is_default`: the file had none and ChatML stands in.
    """

    def __init__(
        self,
        sources: str | Mapping[str, str] | None,
        special: Mapping[str, str] | None = None,
    ):
        """`sources` is the template, or several by name; `special` the texts of `bos_token` and
        its like."""
        named = {_DEFAULT: sources} if isinstance(sources, str) and sources else sources
        self.is_default = not named
        self.sources: dict[str, str] = dict(named or {_DEFAULT: CHATML})
        self._special = dict.fromkeys(_SPECIAL, "") | dict(special or {})

    @classmethod
    def of(cls, tokenizer: Tokenizer, metadata: Mapping[str, Any]) -> ChatTemplate:
        """The templates under `tokenizer.chat_template` and `tokenizer.chat_template.NAME`.

        Raises TextError when such a key holds something else than text.
        """
        sources = {}
        for key, value in metadata.items():
            if key != _KEY and not key.startswith(f"{_KEY}."):
                continue
            if not isinstance(value, str):
                raise TextError(f"{key} is {type(value).__name__}, not text")
            sources[key.removeprefix(_KEY).removeprefix(".") or _DEFAULT] = value
        return cls({name: text for name, text in sources.items() if text}, tokenizer.special_texts)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        add_generation_prompt: bool = True,
        tools: Sequence[Any] | None = None,
        template: str | None = None,
        **extra: Any,
    ) -> str:
        """The prompt for `messages`, each a mapping with `role` and `content`.

        add_generation_prompt: open the assistant's turn. tools: functions, or their descriptions
        as OpenAI's interface has them. template: the name of one of `sources`, or the text of
        another. `extra` reaches the template under its names (enable_thinking=False).
        Raises TextError, in one line, for a template that is broken or refuses the messages, and
        OptionError for a template or tools that it does not have a place for.
        """
        given = plain_messages(messages)
        schemas = tool_schemas(tools)
        chosen = self._choose(template, schemas is not None)
        names = self._special | {"documents": None, "tools": plain(schemas), **plain(extra)}
        names["add_generation_prompt"] = flag("add_generation_prompt", add_generation_prompt)
        return _first_that_fits(chosen, given, names)

    def encode(
        self, tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], /, **options: Any
    ) -> list[int]:
        """The ids of `render(messages, **options)`, with one BOS where the model wants it."""
        return self.ids(tokenizer, self.render(messages, **options))

    def ids(self, tokenizer: Tokenizer, text: str) -> list[int]:
        """The ids of a rendered chat, with one BOS where the model wants it."""
        ids = tokenizer.encode(text, add_special=False)
        bos = tokenizer.bos_id
        if tokenizer.add_bos and bos is not None and ids[:1] != [bos]:
            ids.insert(0, bos)
        return ids

    def form(self, template: str | None = None, tools: bool = False) -> Form:
        """How calls of tools and reasoning are written in answers, by the template's own text.

        template: as `render` has it; tools: whether some are given.
        """
        from runtime.text.calls.forms import form_of

        name = self._usual(tools) if template is None else template
        return form_of(self.sources.get(name, name))

    def _choose(self, name: str | None, tools: bool) -> Template:
        if name is None:
            name = self._usual(tools)
        if not isinstance(name, str):
            raise wrong("template", name, "the name of a template, or the text of one")
        own = "{{" in name or "{%" in name
        if not own and name not in self.sources:
            near = difflib.get_close_matches(name, self.sources, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            known = ", ".join(sorted(self.sources))
            raise OptionError(
                f"template={shown(name)} is not in this file, which has {known}{hint}"
            )
        chosen = _compiled(name if own else self.sources[name])
        if tools and "tools" not in chosen.names:
            raise OptionError(
                "tools= cannot be used: the chat template of this model has no place for tools"
            )
        return chosen

    def _usual(self, tools: bool) -> str:
        if tools and _TOOLS in self.sources:
            return _TOOLS
        if _DEFAULT in self.sources:
            return _DEFAULT
        if len(self.sources) > 1:
            raise OptionError(
                "this file has several chat templates and none is the default: choose one of "
                f"{', '.join(sorted(self.sources))} by template="
            )
        return next(iter(self.sources))


@lru_cache(maxsize=16)
def _compiled(source: str) -> Template:
    from runtime.text.sandbox import Template

    return Template(source)


def _first_that_fits(template: Template, messages: list[Message], names: dict[str, Any]) -> str:
    """The text of the first reading of `messages` that the template takes.

    Of those it takes, one that shows all tool calls comes first.
    """
    from runtime.text.sandbox import TemplateLimitError

    wanted = tool_names(messages)
    budget = template.budget([messages, names])
    texts, refusal = [], None
    for reading in readings(messages):
        try:
            text = template.render({**names, "messages": reading}, budget)
        except TemplateLimitError:  # what is left is no more for the next one
            raise
        except TextError as error:
            said = no_text(messages)
            refusal = refusal or (TextError(f"{error}; {said}") if said else error)
            continue
        if all(name in text for name in wanted):
            return text
        texts.append(text)
    if texts:
        return texts[0]
    raise refusal or AssertionError("there is always one reading")
