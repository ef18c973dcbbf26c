"""What a piece of an answer is: content, reasoning, or a part of a call of a tool."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class CallPart:
    """A part of call `index`: the first one has its `id` and `name`; `arguments` of all of them
    joined are the text of a JSON object."""

    index: int
    id: str
    name: str
    arguments: str


class Delta(NamedTuple):
    """What has come: text to show, reasoning, or a part of a call; one of the three."""

    content: str = ""
    reasoning: str = ""
    call: CallPart | None = None


class Call(NamedTuple):
    """A whole call; `arguments` is the text of a JSON object."""

    id: str
    name: str
    arguments: str
