"""How the commands read their options.

An option is its whole name: `-ngl` is never `-n gl`, and only a number may be attached to a
letter (`-n64`). Options that other programs have and that are known here are answered by
`runtime.cli.foreign`; any other unknown name is refused with the nearest known one.
"""

from __future__ import annotations

import difflib
import re
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import click

from runtime.cli import foreign
from runtime.cli.output import note

F = TypeVar("F", bound=Callable[..., Any])

_ATTACHED = re.compile(r"(-[A-Za-z])(\d+)")
_NOTES = "runtime.notes"


THREADS = click.IntRange(1, 1024)  # as backends/cpu has it, which is not imported here


class Option(click.Option):
    """An option with a place in the help text, and other names that the help does not repeat."""

    def __init__(
        self, decls: Sequence[str], *, section: str = "Options", aliases: Sequence[str] = (),
        bare: str | None = None, **attributes: Any,
    ) -> None:  # fmt: skip
        """bare: the value where none follows; None where one has to."""
        self.bare = bare
        super().__init__([*decls, *aliases], **attributes)
        self.section = section
        self._aliases = frozenset(aliases)

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Name and text of the help, without the aliases."""
        kept = self.opts
        self.opts = [name for name in kept if name not in self._aliases]
        try:
            return super().get_help_record(ctx)
        finally:
            self.opts = kept

    def get_error_hint(self, ctx: click.Context | None) -> str:
        """What a message calls it: its names without the aliases."""
        names = [name for name in self.opts if name not in self._aliases]
        return " / ".join(f"'{name}'" for name in names)

    def value(self, rest: deque[str]) -> str | None:
        """The option's value, taken from the words that follow it; None where it is missing."""
        if self.bare is None:
            return rest.popleft() if rest else None
        known = self.type.choices if isinstance(self.type, click.Choice) else None
        follows = bool(rest) and (rest[0] in known if known else not rest[0].startswith("-"))
        if rest and known and not follows:
            self._check_near(rest[0], known)
        return rest.popleft() if follows else self.bare

    def _check_near(self, word: str, known: Iterable[str]) -> None:
        """UsageError for a word that is nearly one of the values."""
        near = difflib.get_close_matches(word.lower(), known, n=1, cutoff=0.75)
        if near:
            raise click.UsageError(
                f"{self.opts[0]} takes {' or '.join(known)}: {word} is neither; did you mean "
                f"{near[0]}?"
            )


def option(names: str, text: str, section: str, **attributes: Any) -> Callable[[F], F]:
    """A decorator that adds an Option.

    names: those that the help shows, and perhaps the parameter's; after "|" its other names.
    """
    shown, _, aliases = names.partition("|")
    return click.option(
        *shown.split(), cls=Option, aliases=aliases.split(), help=text, section=section,
        **attributes,
    )  # fmt: skip


def decorated(function: F, options: Iterable[Callable[[F], F]]) -> F:
    """`function` with all the options, in their order."""
    for add in reversed([*options]):
        function = add(function)
    return function


class Refused(click.UsageError):
    """A command line that cannot be used, for a reason that the help text does not explain."""


class Command(click.Command):
    """A command whose options are matched whole, with a help text in sections."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Options are spelt whole before click looks at them: it would take a part of a name."""
        return super().parse_args(ctx, _whole(self, ctx, args))

    def invoke(self, ctx: click.Context) -> Any:
        """Say the notes that parsing left, on stderr, then run."""
        for line in ctx.meta.get(_NOTES, ()):
            note(line, bool(ctx.params.get("quiet")))
        return super().invoke(ctx)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Options under the headings of their `section`."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                name = getattr(parameter, "section", "Help")
                sections.setdefault(name, []).append(record)
        for name, records in sections.items():
            with formatter.section(name):
                formatter.write_dl(records, col_max=34)


def _whole(command: click.Command, ctx: click.Context, args: Iterable[str]) -> list[str]:
    """The words of a command line with every option's name spelt as click knows it.

    UsageError for an unknown option and for one that cannot be served; what is to be said about
    options without a meaning here is left in the context for `Command.invoke`.
    """
    known: dict[str, click.Option] = {
        name: parameter
        for parameter in command.get_params(ctx)
        if isinstance(parameter, click.Option)
        for name in (*parameter.opts, *parameter.secondary_opts)
    }
    result: list[str] = []
    rest = deque(args)
    while rest:
        word = rest.popleft()
        if word == "--":
            return [*result, word, *rest]
        if word == "-" or not word.startswith("-"):
            result.append(word)
            continue
        name, attached = _split(word, known)
        if name in known:
            result += _own(known[name], name, attached, rest)
        else:
            _foreign(command, ctx, name, attached, rest, known)
    return result


def _split(word: str, known: Iterable[str]) -> tuple[str, str | None]:
    """An option's name and the value that is attached to it."""
    name, equals, value = word.partition("=")
    if name.startswith("--"):
        name = name.replace("_", "-")
    number = _ATTACHED.fullmatch(word)
    if number and number[1] in known and word not in known:
        return number[1], number[2]
    return name, value if equals else None


def _own(
    option: click.Option, name: str, attached: str | None, rest: deque[str]
) -> tuple[str, ...]:
    if option.is_flag or not isinstance(option, Option):
        return (name if attached is None else f"{name}={attached}",)
    value = attached if attached is not None else option.value(rest)
    return (name,) if value is None else (name, value)


def _foreign(
    command: click.Command, ctx: click.Context, name: str, attached: str | None,
    rest: deque[str], known: Iterable[str],
) -> None:  # fmt: skip
    """Take an option of another program, with its value; UsageError where it changes results."""
    found = foreign.OPTIONS.get(name)
    if found is None:
        plain = {other.lstrip("-"): other for other in known}
        near = difflib.get_close_matches(name.lstrip("-"), plain, n=1)
        hint = f": did you mean {plain[near[0]]}?" if near else ""
        ctx.fail(f"no option {name}{hint}")
    value = attached if attached is not None else found.value(rest)
    line = found.says(name, value)
    if found.refused:
        raise Refused(line, ctx)
    notes = ctx.meta.setdefault(_NOTES, [])
    if line and line not in notes:
        notes.append(line)
