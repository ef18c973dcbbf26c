"""Options that hold answers to a grammar."""

from __future__ import annotations

from typing import Any

import click

from runtime.cli.parsing import F, decorated, option
from runtime.cli.prompt import text_of

_HELD = "What an answer may be"

_OPTIONS = (
    option("-j --json-schema | -jf --json-schema-file", "JSON of this schema, given as text or as "
           "a file; true: any JSON.", _HELD, metavar="FILE|TEXT"),
    option("--regex", "Text that this regular expression matches as a whole.", _HELD,
           metavar="TEXT"),
    option("--grammar", "Text of this grammar, in GBNF or Lark.", _HELD, metavar="TEXT"),
    option("--grammar-file", "Text of the grammar in FILE.", _HELD, metavar="FILE"),
)  # fmt: skip


def grammar_options(function: F) -> F:
    """--json-schema, --regex, --grammar and --grammar-file."""
    return decorated(function, _OPTIONS)


def grammar_arguments(options: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of `model.generate` from the values of `grammar_options`, those given.

    UsageError for two of them and for what cannot be enforced: before the model is loaded.
    """
    from runtime.errors import OptionError
    from runtime.text.grammar.asked import asked_grammar
    from runtime.text.grammar.guide import check

    names = ("json_schema", "regex", "grammar", "grammar_file")
    given = {name: options[name] for name in names if options[name] is not None}
    if len(given) > 1:
        shown = [f"--{name.replace('_', '-')}" for name in given]
        raise click.UsageError(f"{' and '.join(shown)} cannot go together: give one of them")
    if "grammar_file" in given:
        given = {"grammar": text_of(given["grammar_file"])}
    if "json_schema" in given:
        given["json_schema"] = _schema(given["json_schema"])
    try:
        grammar = asked_grammar(given)
        if grammar is not None:
            check(grammar)
    except OptionError as error:
        raise click.UsageError(str(error)) from None
    return given


def _schema(text: str) -> str:
    """A schema that is given as it is, or as the name of its file."""
    plain = text.strip()
    return plain if plain.startswith(("{", "[")) or plain in ("true", "false") else text_of(text)
