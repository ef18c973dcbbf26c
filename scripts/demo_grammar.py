"""Text templates: alternatives in brackets, slots in braces, chosen by a seeded generator.

`[a|b|]` picks one of its parts, nested as deep as wanted; `{A.they}` is a slot of `str.format`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping

_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_MAX_DEPTH = 4


def choose(template: str, rng: random.Random) -> str:
    """`template` with every bracket replaced by one of its alternatives, inner ones first."""
    while "[" in template:
        template = _CHOICE.sub(lambda match: rng.choice(match.group(1).split("|")), template)
    return template


def expand(template: str, slots: Mapping[str, object], rng: random.Random) -> str:
    """`template` with brackets chosen and slots filled; slots may hold templates themselves.

    KeyError or AttributeError for a slot that does not exist, ValueError for endless nesting.
    """
    text = template
    for _ in range(_MAX_DEPTH):
        text = choose(text, rng)
        if "{" not in text:
            return capitalise(re.sub(r"  +", " ", text).strip())
        text = text.format_map(slots)
    raise ValueError(f"template nests more than {_MAX_DEPTH} deep: {template!r}")


def capitalise(text: str) -> str:
    """`text` with a capital letter at its start, after an opening quote too."""
    for index, letter in enumerate(text):
        if letter.isalpha():
            return text[:index] + letter.upper() + text[index + 1 :]
        if letter not in "\"'":
            return text
    return text
